"""The samples of a run's page: those whose answer changed first, then the others, then what training sampled."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from adhere.measure.changed import differ, drawn_place
from adhere.measure.metrics import exact_match
from adhere.report.curves import number
from adhere.report.markup import clip
from adhere.report.run import Run, is_number
from adhere.report.shown import items_of, text_of

CHANGED, UNCHANGED = 20, 10
"""Samples of the evaluation shown; with ten from either end of training that makes 50."""

Sample = Mapping[str, Any]


def drawn_sample(samples: Sequence[Sample]) -> Sample | None:
    """The changed sample that stands on the first screen: the one that an evaluation inspects."""
    pairs = [sample for sample in samples if sample.get("before") is not None and sample.get("after") is not None]
    place = drawn_place(*([text_of(sample[key]) for sample in pairs] for key in ("before", "after")))
    return None if place is None else pairs[place]


def evaluation_samples(samples: Sequence[Sample]) -> str:
    """Samples drawn by lot, those that changed first."""
    compared = any(sample.get("before") is not None for sample in samples)
    changed = [sample for sample in samples if _changed(sample)] if compared else list(samples)
    same = [sample for sample in samples if not _changed(sample)] if compared else []
    parts = []
    if compared:
        parts.append(f'<p class="lead">{_counted(samples, len(changed))} Greedy answers to the same prompts.</p>')
    if changed:
        parts.append(_drawn_by_lot(changed, CHANGED, "changed" if compared else ""))
    if same:
        shown = _drawn_by_lot(same, UNCHANGED, "unchanged")
        parts.append(f"<details><summary>Answers that stayed the same</summary>{shown}</details>")
    return "".join(parts)


def _counted(samples: Sequence[Sample], changed: int) -> str:
    """How many answers changed, and how many of them to what is accepted, or from it."""
    said = f"{changed:,} of {len(samples):,} answers changed"
    sides = [(_right(sample, "before"), _right(sample, "after")) for sample in samples]
    if all(None in pair for pair in sides):
        return f"{said}."
    gained, lost = sides.count((False, True)), sides.count((True, False))
    return f"{said}: {gained:,} from wrong to right, {lost:,} from right to wrong."


def _right(sample: Sample, key: str) -> bool | None:
    """Whether an answer is accepted; None where there is none, or nothing that is accepted is known."""
    answers = _answers(sample)
    if sample.get(key) is None or not answers:
        return None
    return exact_match([text_of(sample[key])], [answers]) == [1.0]


def _answers(sample: Sample) -> list[str]:
    return [answer for answer in items_of(sample.get("answers")) if isinstance(answer, str)]


def _changed(sample: Sample) -> bool:
    return differ(*(text_of(sample.get(key, "")) for key in ("before", "after")))


def _drawn_by_lot(samples: Sequence[Sample], limit: int, kind: str) -> str:
    shown = min(len(samples), limit)
    # By lot, with a fixed seed: neither the best nor every tenth row, which may be all of one kind.
    picked = [samples[place] for place in sorted(random.Random(0).sample(range(len(samples)), shown))]
    name = f"{kind} ones" if kind else "answers"
    how = f"{shown} of {len(samples):,} {name}, drawn by lot." if shown < len(samples) else f"All {shown} {name}."
    return f'<p class="soft">{how}</p>' + "".join(map(card, picked))


def card(sample: Sample) -> str:
    """One prompt with the answers to it."""
    answers = _answers(sample)
    tags = "".join(f' <span class="tag">{clip(str(sample[k]), 60)}</span>' for k in ("split", "kind") if k in sample)
    known = ", ".join(clip(answer, 200) for answer in answers[:5])
    expected = f'<p class="soft">Accepted: {known}</p>' if known else ""
    sides = "".join(
        _side(label, text_of(sample[key]), answers)
        for key, label in (("before", "Before"), ("after", "After"))
        if sample.get(key) is not None
    )
    prompt = clip(text_of(sample.get("prompt", "")))
    return (
        f'<article class="card sample"><div class="head"><h3>Prompt</h3><span>{tags}</span></div>'
        f'<p class="text" dir="auto">{prompt}</p>{expected}<div class="sides">{sides}</div></article>'
    )


def _side(label: str, response: str, answers: Sequence[str]) -> str:
    kind, mark = "", ""
    if answers:
        right = exact_match([response], [answers]) == [1.0]
        kind, mark = ("right", " · right") if right else ("wrong", " · wrong")
    text = clip(response) if response.strip() else '<span class="cut">(empty)</span>'
    return f'<div class="side {kind}"><small>{label}{mark}</small><p class="text" dir="auto">{text}</p></div>'


def training_samples(run: Run) -> str:
    """What training sampled at its beginning and at its end."""
    blocks = []
    for title, rows in (("First", run.first), ("Last", run.last)):
        if rows:
            cards = "".join(_drawn(row) for row in rows)
            blocks.append(f"<details><summary>{title} {len(rows)} samples of training</summary>{cards}</details>")
    return "".join(blocks)


def _drawn(row: Mapping[str, Any]) -> str:
    signals = row.get("signals")
    scores = [("reward", row.get("reward")), *(signals.items() if isinstance(signals, dict) else ())]
    tags = " ".join(f'<span class="tag">{clip(k, 40)} {number(v)}</span>' for k, v in scores[:12] if is_number(v))
    return (
        f'<article class="card sample"><div class="head"><h3>Step {clip(str(row.get("step", "?")), 20)}</h3></div>'
        f'<p class="text soft" dir="auto">{clip(text_of(row.get("prompt", "")))}</p>'
        f'<div class="sides">{_side("Response", text_of(row.get("response", "")), [])}</div><p>{tags}</p></article>'
    )
