"""What every page is made of: escaped text, the document around it, the one style. No text gets past `escape`."""

from __future__ import annotations

import html
import re
from importlib import resources

TEXT_LIMIT = 2_000
"""Characters of a prompt or response that a page shows."""

# No script, image, font or request whatever a prompt or response contains, even if an escape were forgotten.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

# What a browser would drop, obey or choke on instead of showing: control characters, line and paragraph separators,
# direction overrides, blanks of no width (but the joiners, which scripts and emoji need), lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def escape(text: object) -> str:
    r"""`text` as HTML text or attribute value: markup characters escaped, invisible ones written out.

    >>> escape('<b title="x">' + chr(0x2028))
    '&lt;b title=&quot;x&quot;&gt;\\u2028'
    """
    plain = str(text).replace("\r\n", "\n")
    return html.escape(_HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", plain))


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Escaped text of at most `limit` characters; what is left out is said."""
    if len(text) <= limit:
        return escape(text)
    left = f"{len(text) - limit:,} more characters"
    return f'{escape(text[:limit])}<span class="cut">… ({left})</span>'


def document(title: str, body: str) -> str:
    """A whole page around `body` (HTML already escaped)."""
    style = resources.files("attune.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
