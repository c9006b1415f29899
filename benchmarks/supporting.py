"""Does the model look where the answer is? Attention on bAbI's supporting sentences, before and after training.

    python benchmarks/supporting.py --models runs/real/base runs/real/study/attention/model

The model answers every row greedily. The figures, of all heads and of the copy heads (measured on the first model and
kept for all): the share of the answer's attention to the passage that lies on the supporting sentences,
less the share of the passage that they are (0 = no better than even); and Spearman's rank correlation, over rows, of
that with being right. Intervals are bootstrapped over rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from adhere.data import Row, read_rows
from adhere.measure.stats import Estimate, bootstrap, paired_bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.heads import measure_on_answers
from adhere.text import is_answer

BATCH = 50
HEADS = ("all heads", "copy heads")


@dataclass(frozen=True)
class Looked:
    """What a model did with each row."""

    right: list[float]
    lift: dict[str, list[float]]
    """Heads → share of attention on the supporting sentences less their share of the passage."""


def spans(row: Row) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Characters of the prompt: where the passage stands, and where each supporting sentence does.

    Raises ValueError where the prompt does not hold the passage, or a sentence that is named is not there."""
    passage = str(row.fields["context"])
    assert isinstance(row.prompt, str), "bAbI rows are plain text"
    start = row.prompt.index(passage)
    ends = [match.end() for match in re.finditer(r"\.(?=\s|$)", passage)]
    sentences = list(zip([0, *ends[:-1]], ends, strict=True))
    named = row.fields["supporting"]
    if not named or max(named) >= len(sentences):
        raise ValueError(f"{row.where}: supporting {named} of {len(sentences)} sentences")
    return (start, start + len(passage)), [(start + sentences[n][0], start + sentences[n][1]) for n in named]


def token_mask(policy: Policy, row: Row, kept: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """[P] bool: the prompt tokens that begin within one of `places`; `kept` [P] bool marks the prompt's own tokens."""
    offsets = policy.tokenizer(row.prompt, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == int(kept.sum()), "the prompt was cut or extended"
    mask = torch.zeros_like(kept)
    mask[kept] = torch.tensor([any(a <= first and last <= b and last > first for a, b in places)
                               for first, last in offsets])  # fmt: skip
    return mask


def look(policy: Policy, rows: list[Row], copy_weights: Tensor) -> Looked:
    """Answer every row greedily and measure where the answer looked."""
    right: list[float] = []
    lift: dict[str, list[float]] = {name: [] for name in HEADS}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts = policy.encode([row.prompt for row in part], [row.answers for row in part])
        rollout = policy.sample(prompts, 1, sampling=Sampling(temperature=0.0, max_new_tokens=8))
        reading = policy.read(rollout, copy_weights=copy_weights)
        for i, row in enumerate(part):
            passage, supporting = spans(row)
            inside = token_mask(policy, row, prompts.mask[i], [passage])
            support = token_mask(policy, row, prompts.mask[i], supporting)
            right.append(float(is_answer(rollout.responses[i], row.answers)))
            for name, attention in zip(HEADS, (reading.attention, reading.copy_attention), strict=True):
                assert attention is not None
                # The end of the sequence looks at nothing in particular; the words of the answer count.
                words = attention[i, : max(1, int(rollout.lengths[i]) - 1)].sum(0)
                mass = float(words[support].sum() / words[inside].sum().clamp(min=1e-12))
                lift[name].append(mass - float(support.sum() / inside.sum()))
    return Looked(right, lift)


def correlation(lift: list[float], right: list[float], resamples: int = 2000) -> dict[str, float | int]:
    """Spearman's rank correlation with its bootstrap interval over rows."""
    pairs, rng = np.array([lift, right]), np.random.default_rng(0)
    draws = (pairs[:, rng.integers(0, len(lift), len(lift))] for _ in range(resamples))
    found = [spearmanr(*draw).statistic for draw in draws if len(set(draw[1])) > 1]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(spearmanr(*pairs).statistic), float(low), float(high), len(lift)).to_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--models", nargs="+", required=True, help="model folders; the first is the start")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    options = parser.parse_args()
    path = options.data / "babi" / f"{options.part}.jsonl"
    if not path.exists():
        print(f"error: no {path}; give the folder of the data sets with --data", file=sys.stderr)
        raise SystemExit(2)
    rows = [row for row in read_rows(path) if row.fields.get("supporting")]
    found: dict[str, Any] = {"rows": len(rows)}
    first: Looked | None = None
    copy_weights: Tensor | None = None
    for model in options.models:
        policy = Policy.load(model, device="cpu")
        if copy_weights is None:
            prompts = policy.encode([row.prompt for row in rows[:64]])
            copy_weights = measure_on_answers(policy, prompts).weights
        looked = look(policy, rows, copy_weights)
        found[model] = {"right": bootstrap(looked.right).to_json()}
        for name in HEADS:
            found[model][name] = {
                "lift": bootstrap(looked.lift[name]).to_json(),
                "correlation with being right": correlation(looked.lift[name], looked.right),
            }
            if first is not None:
                change = paired_bootstrap(looked.lift[name], first.lift[name])
                found[model][name]["change from the first model"] = change.to_json()
        first = first or looked
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
