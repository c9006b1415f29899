"""Text of a model or a user made fit to be shown: in a terminal, in HTML, in Markdown."""

from __future__ import annotations

import html
import re

# What a browser or terminal would drop, obey or choke on instead of showing: control characters, line and paragraph
# separators, direction overrides, blanks of no width (but the joiners, which scripts and emoji need), lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# What begins markup within a line of GitHub's Markdown, in a cell of a table too. Each may stand after a backslash.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&#!])")


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
