"""What every page of a report is made of: text cut to a length and escaped, and the document around it."""

from __future__ import annotations

from adhere.markup import document, escape

TEXT_LIMIT = 2_000
"""Characters of a prompt or response that a page shows."""

__all__ = ["clip", "document", "escape"]


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Escaped text of at most `limit` characters; what is left out is said."""
    if len(text) <= limit:
        return escape(text)
    left = f"{len(text) - limit:,} more characters"
    return f'{escape(text[:limit])}<span class="cut">… ({left})</span>'
