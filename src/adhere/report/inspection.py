"""The page of one prompt and response or a few: the attention of each laid over the text."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from adhere.files import atomic_write
from adhere.inspection.html import view
from adhere.inspection.inspection import COPY, Inspection
from adhere.report.markup import clip, document, escape

TITLE_LIMIT = 90
"""Characters of a response that stand in a title."""


def write_inspections(rows: Sequence[Mapping[str, Inspection]], model: str, out: Path) -> None:
    """Write a view a row, one below the other, to `out`: one file that asks the network for nothing.

    Each row is one response, or several by label, to stand side by side. `model`: a name or a path, of which the last
    part is told.
    """
    nonce = secrets.token_urlsafe(12)
    name = Path(model).name or model
    title = _title(rows, name)
    cards = "\n".join(_card(row, nonce, numbered) for numbered, row in enumerate(rows, 1 if len(rows) > 1 else 0))
    body = f'<h1>{escape(title)}</h1><p class="lead">{_lead(rows)}</p>\n{cards}'
    atomic_write(out, document(f"{title} · adhere", body, nonce))


def _title(rows: Sequence[Mapping[str, Inspection]], model: str) -> str:
    """What is seen: where which model read which answer."""
    if len(rows) > 1:
        return f"Where {model} read its answers to {len(rows)} prompts"
    if len(rows[0]) > 1:
        return f"Where {model} read {len(rows[0])} answers to one prompt"
    return f"Where {model} read {quoted(next(iter(rows[0].values())))}"


def quoted(inspection: Inspection) -> str:
    """A response in a title: its text without special tokens, cut."""
    pieces = zip(inspection.response_tokens, inspection.response_special.tolist(), strict=True)
    text = " ".join("".join(token for token, special in pieces if not special).split())
    return "an empty answer" if not text else f"“{text if len(text) <= TITLE_LIMIT else text[: TITLE_LIMIT - 1] + '…'}”"


def _lead(rows: Sequence[Mapping[str, Inspection]]) -> str:
    known = any(COPY in inspection.maps for row in rows for inspection in row.values())
    heads = "the copy heads, which look at the word being said" if known else "all heads"
    lead = (
        f"The bluer a word of the prompt, the more attention it got, by {heads}: from the whole response, or from the "
        "word pointed at."
    )
    if any(inspection.passages for row in rows for inspection in row.values()):
        lead += " Underlined: the sentences of the context that the response was read from, with their share."
    return lead


def _card(row: Mapping[str, Inspection], nonce: str, number: int) -> str:
    head = f"<h2>{number}. {clip(quoted(next(iter(row.values()))))}</h2>" if number and len(row) == 1 else ""
    head = head or (f"<h2>Prompt {number}</h2>" if number else "")
    panels = [inspection.panel(label if len(row) > 1 else "") for label, inspection in row.items()]
    return f'{head}<section class="card sample">{view(panels, nonce)}</section>'
