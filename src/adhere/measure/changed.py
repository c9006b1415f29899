"""What a change of answer looks like inside: one prompt that two models answer differently, both answers inspected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from adhere.measure.evaluate import Evaluation
from adhere.model.policy import Policy
from adhere.reward.heads import CopyHeads
from adhere.reward.inspecting import inspect

FILE = "attention.json"
"""Where it is kept, in the folder of the evaluation."""


def differ(before: str, after: str) -> bool:
    """Whether two answers differ, blanks at their ends aside."""
    return before.strip() != after.strip()


def drawn_place(before: Sequence[str], after: Sequence[str]) -> int | None:
    """A place where the answers differ, by lot: neither the best nor the worst. None where none do."""
    places = [place for place, pair in enumerate(zip(before, after, strict=True)) if differ(*pair)]
    return random.Random(0).choice(places) if places else None


def inspect_changed(
    evaluation: Evaluation, policy: Policy, baseline: Policy, heads: CopyHeads | None
) -> dict[str, Any] | None:
    """Both greedy answers to the drawn prompt: {"before": …, "after": …}, each an `Inspection.to_json`; None where no
    answer changed. `heads`: copy heads of the baseline, which show both."""
    assert evaluation.before is not None
    place = drawn_place(evaluation.before.greedy, evaluation.after.greedy)
    if place is None:
        return None
    prompt = evaluation.rows[place].prompt
    said = {"before": (baseline, evaluation.before.greedy[place]), "after": (policy, evaluation.after.greedy[place])}
    return {when: inspect(model, prompt, text, heads=heads).to_json() for when, (model, text) in said.items()}
