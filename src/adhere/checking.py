"""Given answers checked: how far each of their sentences rests on the context, and on which sentences of it.

The model reads an answer again without each sentence of the context in turn. A sentence of the answer is supported as
far as its words become less likely without the one that it needs most: 1 − exp(−drop), the drop in nats a token. What
the model would say anyway, from habit or because nothing in the context bears on it, loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adhere.data import Row, require_documents
from adhere.errors import UserError
from adhere.measure import metrics
from adhere.measure.settings import CheckConfig
from adhere.model.policy import Policy
from adhere.ranking import batched
from adhere.reward.salience import token_classes
from adhere.reward.signals import LOWEST_LOGPROB
from adhere.reward.sources import context_sentences, document_sentences, token_spans
from adhere.text import sentences
from adhere.types import Rollout

NAMED = 3
"""Sentences of the context that are named for a sentence of an answer."""
BINS = 5
"""Bins of a calibration curve."""
RESAMPLES = 1_000


def check_rows(policy: Policy, rows: Sequence[Row], config: CheckConfig | None = None) -> Iterator[dict[str, Any]]:
    """Each row with `faithfulness`, the mean support of the sentences of its `response` in [0, 1], and `sentences`:
    `{"span", "text", "support", "supported", "sources": [{"document", "span", "text", "drop"}, …]}`, best source first;
    `logprob` of the response, nats a token, stands beside. A response without a sentence has no faithfulness: null.

    Raises `UserError` for a row without a context, and where prompt and response do not fit the model's context.
    """
    config = config or CheckConfig()
    require_documents(rows)
    classes = token_classes(policy.tokenizer)
    pieces = batched(rows, config.batch_size)
    for batch in policy.progress(pieces, "checking", len(rows), size=len):
        prompts, responses = [row.prompt for row in batch], [row.response or "" for row in batch]
        rollout = policy.paired(prompts, responses, [row.where for row in batch])
        logprobs = policy.read(rollout, attention=False, spread=()).logprobs.clamp(min=LOWEST_LOGPROB)
        without = policy.read_without(rollout, context_sentences(rollout.prompts, classes)).clamp(min=LOWEST_LOGPROB)
        drops = logprobs.unsqueeze(1) - without
        for place, row in enumerate(batch):
            told = _sentences(policy, rollout, place, drops[place], config.threshold)
            support = [one["support"] for one in told]
            mean = float(logprobs[place].sum() / rollout.response_mask[place].sum().clamp(min=1))
            faithful = round(sum(support) / len(support), 4) if support else None
            yield {**row.fields, "faithfulness": faithful, "logprob": round(mean, 4), "sentences": told}


def _sentences(policy: Policy, rollout: Rollout, place: int, drops: Tensor, threshold: float) -> list[dict[str, Any]]:
    """The sentences of response `place`; `drops` is [S, R]."""
    number = int(rollout.prompt_index[place])
    spans, there = document_sentences(rollout.prompts, number)
    seen = set(there[there >= 0].tolist())
    texts = [document.text for document in rollout.prompts.documents[number]]
    response, within = rollout.responses[place], token_spans(rollout, place, policy.tokenizer)
    found = []
    for start, end in sentences(response):
        tokens = [t for t, (first, last) in enumerate(within) if last > start and first < end]
        if not tokens:
            continue
        fall = drops[:, tokens].mean(-1).tolist()
        order = sorted(seen, key=lambda source: -fall[source])
        support = 1.0 - math.exp(-max(0.0, fall[order[0]])) if order else 0.0
        sources = [
            {
                "document": spans[n][0],
                "span": list(spans[n][1:]),
                "text": texts[spans[n][0]][spans[n][1] : spans[n][2]],
                "drop": round(fall[n], 4),
            }
            for n in order[:NAMED]
            if fall[n] > 0
        ]
        found.append(
            {
                "span": [start, end],
                "text": response[start:end],
                "support": round(support, 4),
                "supported": support >= threshold,
                "sources": sources,
            }
        )
    return found


@dataclass(frozen=True)
class RocArea:
    """How well a score tells supported answers from others: the area under the ROC curve, 0.5 = chance."""

    area: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """What labelled rows say of faithfulness."""

    rows: int
    supported: int
    areas: dict[str, RocArea]
    """Of `faithfulness`, with `logprob` and word `overlap` beside it; 95 % bootstrap intervals over rows."""
    curve: list[dict[str, float]]
    """Bins of equally many rows, lowest faithfulness first: `from`, `to`, `rows`, and the share `supported`."""
    threshold: float
    """Faithfulness from which on rows are told supported best: the mean of both classes' accuracies is highest."""
    accuracy: float
    """That mean, on these very rows: what fresh rows give is lower."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibration(checked: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Calibration | None:
    """Faithfulness against the labels of rows that have a field `supported` (true or false); None where fewer than two
    do, or all are labelled alike. Raises `UserError` for a label that is neither."""
    for row in rows:
        if not isinstance(row.fields.get("supported"), bool | None):
            raise UserError("`supported` is neither true nor false", where=row.where, fix="write true or false")
    known = [
        (one, row)
        for one, row in zip(checked, rows, strict=True)
        if row.fields.get("supported") is not None and one["faithfulness"] is not None
    ]
    labels = np.array([bool(row.fields["supported"]) for _, row in known])
    if not labels.any() or labels.all():
        return None
    scores = {name: np.array([one[name] for one, _ in known]) for name in ("faithfulness", "logprob")}
    prompts, responses = [str(row.prompt) for _, row in known], [row.response or "" for _, row in known]
    scores["overlap"] = np.array([value or 0.0 for value in metrics.overlap(prompts, responses)])
    own = scores["faithfulness"]
    cut, best = max(
        ((value, ((own >= value)[labels].mean() + (own < value)[~labels].mean()) / 2) for value in np.unique(own)),
        key=lambda item: item[1],
    )
    curve = [
        {
            "from": float(own[some].min()),
            "to": float(own[some].max()),
            "rows": len(some),
            "supported": float(labels[some].mean()),
        }
        for some in np.array_split(own.argsort(kind="stable"), min(BINS, len(own)))
    ]
    areas = {name: area(values, labels) for name, values in scores.items()}
    return Calibration(len(labels), int(labels.sum()), areas, curve, float(cut), float(best))


def area(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], seed: int = 0) -> RocArea:
    """Area under the ROC curve, ties half, with its bootstrap interval over rows. [n] floats, [n] bools of both kinds.

    >>> area(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).area
    0.75
    """

    def of(rows: np.ndarray[Any, Any]) -> float:
        good, bad = scores[rows][labels[rows]], scores[rows][~labels[rows]]
        if not len(good) or not len(bad):
            return math.nan
        return float(((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean())

    generator, count = np.random.default_rng(seed), len(scores)
    drawn = [of(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return RocArea(of(np.arange(count)), float(low), float(high))
