"""Preference pairs that can teach something: two responses that differ, and the better one does not repeat the prompt.

Public sets of pairs hold a few that do not. They are left out, counted, and told once with the first of them: a set of
tens of thousands should not have to be mended for a handful, nor be learned from as if they said something.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from adhere.data import Row
from adhere.errors import UserError

GREETING = 12
"""Characters of a prompt that a response may well begin with: "Good morning"."""


def sound_pairs(rows: Sequence[Row], warn: Callable[[str], None] = warnings.warn) -> list[Row]:
    """The rows whose `chosen` and `rejected` say which of two responses is better.

    White space makes no difference. Raises `UserError` where pairs were given and none is left.
    """
    sound: list[Row] = []
    faults: dict[str, list[str]] = {}
    for row in rows:
        if (fault := pair_fault(row)) is None:
            sound.append(row)
        else:
            faults.setdefault(fault, []).append(row.where)
    if not faults:
        return sound
    told = "; ".join(
        f"{len(places)} {fault}" + (f", the first: {places[0]}" if places[0] else "")
        for fault, places in faults.items()
    )
    left_out = len(rows) - len(sound)
    if not sound:
        raise UserError(f"none of {left_out} pairs teaches anything: {told}", fix="give pairs that differ")
    warn(f"{left_out} of {len(rows)} pairs are left out: {told}")
    return sound


def pair_fault(row: Row) -> str | None:
    """Why a pair teaches nothing, to be read after a number of them; None where it does."""
    chosen, rejected = (" ".join((text or "").split()) for text in (row.chosen, row.rejected))
    turn = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    prompt = " ".join(turn.split())
    if chosen == rejected:
        return "with two equal texts"
    if not chosen:
        return "with an empty `chosen`"
    if chosen == prompt or (len(prompt) > GREETING and chosen.startswith(prompt)):
        return "whose `chosen` repeats the prompt (write what comes after it)"
    return None
