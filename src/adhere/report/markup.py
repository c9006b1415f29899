"""What every page is made of: escaped text, the document around it, the one style. No text gets past `escape`."""

from __future__ import annotations

from importlib import resources

from adhere.markup import escape

TEXT_LIMIT = 2_000
"""Characters of a prompt or response that a page shows."""

# No script, image, font or request whatever a prompt or response contains, even if an escape were forgotten.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

__all__ = ["clip", "document", "escape"]


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Escaped text of at most `limit` characters; what is left out is said."""
    if len(text) <= limit:
        return escape(text)
    left = f"{len(text) - limit:,} more characters"
    return f'{escape(text[:limit])}<span class="cut">… ({left})</span>'


def document(title: str, body: str, nonce: str = "") -> str:
    """A whole page around `body` (HTML already escaped), which runs no scripts but those that carry `nonce`."""
    policy = f"{_POLICY}; script-src 'nonce-{nonce}'" if nonce else _POLICY
    style = resources.files("adhere.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
