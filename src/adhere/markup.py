"""Text of a model or a user made fit to be shown, in a terminal, in HTML, in Markdown; and the HTML page around it."""

from __future__ import annotations

import html
import re
from importlib import resources

# What a browser or terminal would drop, obey or choke on instead of showing: control characters, line and paragraph
# separators, direction overrides, blanks of no width (but the joiners, which scripts and emoji need), lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# What begins markup within a line of GitHub's Markdown, in a cell of a table too. Each may stand after a backslash.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&#!])")
# No script, image, font or request whatever a text contains, even if an escape were forgotten.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def visible(text: object) -> str:
    r"""`text` with its invisible characters written out; line ends and tabs stay.

    >>> visible("a" + chr(0x2028) + chr(27))
    'a\\u2028\\u001b'
    """
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text).replace("\r\n", "\n"))


def escape(text: object) -> str:
    r"""`text` as HTML text or attribute value: markup characters escaped, invisible ones written out.

    >>> escape('<b title="x">' + chr(0x2028))
    '&lt;b title=&quot;x&quot;&gt;\\u2028'
    """
    return html.escape(visible(text))


def markdown(text: object) -> str:
    r"""`text` as one line of Markdown, for a sentence or a cell: markup characters escaped, invisible ones written out.

    >>> markdown("a|b <i>" + chr(10) + "*c*")
    'a\\|b \\<i\\> \\*c\\*'
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))


def document(title: str, body: str, nonce: str = "", posts: bool = False) -> str:
    """A whole page around `body`, which is HTML and already escaped, in the style that all pages share.

    It runs no scripts but those that carry `nonce`, and sends nothing; with `posts`, only to where it came from.
    """
    policy = f"{_POLICY}; script-src 'nonce-{nonce}'" if nonce else _POLICY
    policy += "; connect-src 'self'" if posts else ""
    style = resources.files("adhere").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
