"""The page of one prompt and response or a few: the attention of each laid over the text."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from adhere.files import atomic_write
from adhere.inspection.inspection import Inspection
from adhere.report.markup import document, escape


def write_inspections(inspections: Sequence[Inspection], model: str, out: Path) -> None:
    """Write the views, one below the other, to `out`: one file that asks the network for nothing."""
    nonce = secrets.token_urlsafe(12)
    cards = "\n".join(f'<section class="card sample">{inspection.html(nonce)}</section>' for inspection in inspections)
    lead = (
        "The stronger the shade of a word, the more attention it got: from the response, or from the token pointed at."
    )
    body = f'<h1>Where {escape(model)} looked</h1><p class="lead">{lead}</p>\n{cards}'
    atomic_write(out, document(f"{model} · adhere", body, nonce))
