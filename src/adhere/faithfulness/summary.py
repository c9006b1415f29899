"""The figures of a bench, from its records alone: what a reward prefers, in which order, and by how much more than
another. Pure functions; `rows.jsonl` is all they need.

*Pairs in order*: of a question's (right, wrong) pairs, the share in which the right response gets more, ½ for a tie;
0.5 is chance. `same kind`, `elsewhere` and `empty` are the wrong responses of the split `unchanged`, each by itself.

*Best of n*: the share of questions whose best sample is right (of equals, the share that is), over questions with right
and wrong samples. *Accuracy* is the same over all questions.

*Correction, resistance, agreement*: what comes of what the model knows, after TriState-Bench (Jiang et al. 2026, arXiv
2606.10298; the do-no-harm requirement of NWCAD, Tao & Agrawal 2026, arXiv 2604.16686, is the third). The *prior* is the
model's greedy answer without the passage; all three are the share of responses with the *true* answer, that of the row:

    correction   prior wrong, passage as it is     does reading mend what the model does not know?
    agreement    prior right, passage as it is     does reading leave alone what it knows?
    resistance   prior right, passage swapped      does it keep what it knows against the passage?

A faithful reader corrects, agrees, and does *not* resist. The response is the best of n by the reward; beside it stand
`greedy`, the model's likeliest response, and `sample`, any of its samples.

*Evidence hit*: the sentence of the passage that the response looks at most holds a right answer; `chance` is the share
of such sentences in the passage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adhere.measure.audit import TIE
from adhere.measure.stats import Estimate, bootstrap

Record = dict[str, Any]
Figures = Mapping[str, Mapping[str, Estimate]]
"""Figure → reward, or what else has one → estimate."""
Values = dict[str, dict[str, dict[int, float]]]
"""Figure → reward → question → value."""

PAIRS = ("swapped", "distractor", "unanswerable", "same kind", "elsewhere", "empty", "samples", "swapped-samples")
CHOICES = ("best of n", "accuracy", "swapped best of n", "swapped accuracy", "correction", "agreement", "resistance")
LOOKED = {"unchanged": "answer", "swapped": "swapped answer", "samples": "samples"}
"""Split → whose evidence is told of it: the right answer's, or the samples' (their mean)."""
GREEDY, SAMPLE = "greedy", "sample"
"""The model's responses without a reward that chooses."""


@dataclass(frozen=True)
class Bench:
    """What a bench found."""

    questions: int
    cases: Mapping[str, int]
    """Split → questions in it."""
    pairs: Figures
    """Pairs in order."""
    choices: Figures
    """What the best of n is like."""
    evidence: Figures
    """Evidence hits: kind of response → heads."""
    differences: Mapping[str, Figures]
    """Reward → figure → another reward → how much more the first has, question by question."""
    cut_off: float | None
    """Share of the samples that did not end by themselves; None without samples."""
    records: Sequence[Record]

    def to_json(self) -> dict[str, Any]:
        """The figures as {mean, low, high, n}; the records stand in a file of their own."""
        return {
            "questions": self.questions,
            "cases": dict(self.cases),
            "cut_off": self.cut_off,
            "pairs": _json(self.pairs),
            "choices": _json(self.choices),
            "evidence": _json(self.evidence),
            "differences": {name: _json(figures) for name, figures in self.differences.items()},
        }


def summarise(records: Sequence[Record], seed: int = 0) -> Bench:
    """All figures with 95 % intervals, bootstrapped over passages (questions on one passage are not independent)."""
    pairs: Values = {name: {} for name in PAIRS}
    choices: Values = {name: {} for name in CHOICES}
    evidence: Values = {name: {} for name in LOOKED.values()}
    for record in records:
        _add_pairs(pairs, record)
        _add_evidence(evidence, record)
        if "samples" in record["bench"]["split"]:
            _add_choices(choices, record)
    passages = {record["bench"]["question"]: record["bench"]["passage"] for record in records}

    def estimates(values: Values) -> dict[str, dict[str, Estimate]]:
        return {
            figure: {name: _estimate(found, passages, seed) for name, found in named.items()}
            for figure, named in values.items()
            if named
        }

    rewards = list(dict.fromkeys(name for record in records for c in record["candidates"] for name in c["scores"]))
    everything = {**pairs, **choices}
    differences = {
        reward: {
            figure: {
                other: _estimate(_less(named[reward], named[other]), passages, seed)
                for other in named
                if other != reward and named[reward].keys() & named[other].keys()
            }
            for figure, named in everything.items()
            if reward in named
        }
        for reward in rewards
    }
    splits = [record["bench"]["split"] for record in records]
    cases = {split: splits.count(split) for split in dict.fromkeys(splits)}
    ended = [c["ended"] for record in records for c in record["candidates"] if c["kind"] == "sample"]
    return Bench(
        len(passages),
        cases,
        estimates(pairs),
        estimates(choices),
        estimates(evidence),
        differences,
        1 - sum(ended) / len(ended) if ended else None,
        records,
    )


def in_order(right: Iterable[float], wrong: Iterable[float]) -> float | None:
    """Share of (right, wrong) pairs whose right one gets more, ½ for a tie; None without pairs.

    >>> in_order([2.0, 0.0], [1.0, 0.0])  # 2 > 1, 2 > 0, 0 < 1, 0 = 0
    0.625
    """
    wrong = list(wrong)
    won = [0.5 if abs(a - b) <= TIE else float(a > b) for a in right for b in wrong]
    return sum(won) / len(won) if won else None


def best(scores: Sequence[float], marks: Sequence[bool]) -> float:
    """Whether the response with the highest score has the mark; of equals, the share that has it.

    >>> best([1.0, 3.0, 3.0], [True, True, False])
    0.5
    """
    top = max(scores)
    leaders = [mark for score, mark in zip(scores, marks, strict=True) if score >= top - TIE]
    return sum(leaders) / len(leaders)


def _add_pairs(values: Values, record: Record) -> None:
    candidates, about = record["candidates"], record["bench"]
    right = [c for c in candidates if c["right"]]
    kinds: dict[str, list[Record]] = {}
    for candidate in candidates:
        if not candidate["right"]:
            name = candidate["kind"] if about["split"] == "unchanged" else about["split"]
            kinds.setdefault(name, []).append(candidate)
    for figure, wrong in kinds.items():
        for reward in candidates[0]["scores"]:
            share = in_order((c["scores"][reward] for c in right), (c["scores"][reward] for c in wrong))
            if share is not None:
                values[figure].setdefault(reward, {})[about["question"]] = share


def _add_choices(values: Values, record: Record) -> None:
    candidates, about = record["candidates"], record["bench"]
    swapped = "swapped " if about["split"] == "swapped-samples" else ""
    known = about["prior"]["true"]
    state = {("", False): "correction", ("", True): "agreement", ("swapped ", True): "resistance"}.get((swapped, known))
    for mark, figures in (("right", [f"{swapped}accuracy"]), ("true", [state] if state else [])):
        marks = [candidate[mark] for candidate in candidates]
        found = {name: best([c["scores"][name] for c in candidates], marks) for name in candidates[0]["scores"]}
        found |= {GREEDY: float(about["greedy"][mark]), SAMPLE: sum(marks) / len(marks)}
        if mark == "right" and 0 < sum(marks) < len(marks):
            figures.append(f"{swapped}best of n")
        for figure in figures:
            for name, value in found.items():
                values[figure].setdefault(name, {})[about["question"]] = value


def _add_evidence(values: Values, record: Record) -> None:
    about = record["bench"]
    counted = [c for c in record["candidates"] if c["right"] or c["kind"] == "sample"]
    told = [c["evidence_hit"] for c in counted if "evidence_hit" in c]
    if about["split"] not in LOOKED or not told:
        return
    found = {heads: sum(one[heads] for one in told) / len(told) for heads in told[0]}
    for name, value in (found | {"chance": about["holding"]}).items():
        values[LOOKED[about["split"]]].setdefault(name, {})[about["question"]] = value


def _less(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    return {question: first[question] - second[question] for question in first if question in second}


def _estimate(values: Mapping[int, float], passages: Mapping[int, str], seed: int) -> Estimate:
    return bootstrap(list(values.values()), seed, clusters=[passages[question] for question in values])


def _json(figures: Figures) -> dict[str, Any]:
    return {figure: {name: value.to_json() for name, value in named.items()} for figure, named in figures.items()}
