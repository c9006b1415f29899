"""Given responses, scored: the reward and every signal of each row of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from attune.data import Row
from attune.errors import UserError
from attune.reward.reward import Reward

# Prompts that copy heads are measured on: more change the weights by less than their rounding.
HEAD_PROMPTS = 64


def score_rows(
    reward: Reward,
    rows: Sequence[Row],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Each row as it was read, plus `reward` and `signals`; in the order given.

    Rows with the same prompt form a group wherever they stand, so a group-normalised reward compares them. About
    `batch_size` rows are scored at a time; a group is never split. Raises `UserError` when a prompt does not fit
    the model.
    """
    reward.policy.encode(
        [row.prompt for row in rows], names=[row.where for row in rows]
    )  # all readable, or none scored
    if reward.needs_heads and reward.copy_weights is None:
        prompts = list({_key(row): row.prompt for row in rows}.values())[:HEAD_PROMPTS]
        reward.copy_weights = reward.measure(reward.policy.encode(prompts))
    scored: list[dict[str, Any]] = [{} for _ in rows]
    done = 0
    for places in _batches(rows, batch_size):
        part = [rows[place] for place in places]
        scores = reward.score(
            [row.prompt for row in part], [row.response or "" for row in part], [row.answers for row in part]
        )
        table = torch.stack([scores.reward, *scores.signals.values()]).tolist()
        for column, place in enumerate(places):
            signals = {name: line[column] for name, line in zip(scores.signals, table[1:], strict=True)}
            scored[place] = {**rows[place].fields, "reward": table[0][column], "signals": signals}
        done += len(places)
        progress(done)
    return scored


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places of the rows, whole groups at a time, at least `size` rows each but the last."""
    if size < 1:
        raise UserError(f"batch_size is {size}", fix="set it to 1 or above")
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(_key(row), []).append(place)
    batch: list[int] = []
    for group in groups.values():
        batch += group
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _key(row: Row) -> str:
    return json.dumps(row.prompt)
