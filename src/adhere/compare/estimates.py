"""What a comparison found: results of runs in, estimates with intervals out, over prompts with the seeds averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from adhere.compare.plan import NONE, Job
from adhere.compare.settings import CompareConfig
from adhere.measure.stats import Estimate, bootstrap, paired_bootstrap, permutation_test

RunResult = Mapping[str, Any]
"""What `work.perform` wrote to result.json."""
Values = list[float | None]
"""Of each evaluation prompt, or None where it has none."""


@dataclass(frozen=True)
class ArmSummary:
    """An arm on one model."""

    labels: int
    metrics: dict[str, Estimate]
    gain: dict[str, tuple[Estimate, float]]
    """Metric → arm less the arm without training, and the p of a paired permutation test."""
    behind: dict[str, tuple[Estimate, float]]
    """Metric → the arm in `against` less this one, and its p."""
    by_split: dict[str, dict[str, Estimate]]
    pairs: Estimate | None
    """Share of held-out labelled pairs that its reward puts in order."""
    hacked: tuple[str, float] | None
    """The degenerate family that its reward pays for most often, and the share of prompts."""
    tokens: float
    """Tokens sampled in training, a run."""
    seconds: float
    """Seconds of making the reward and of training, a run."""
    kl: float | None
    """Nats a response at the end of training."""
    stopped: int
    """Runs that stopped early."""
    curve: list[dict[str, float]]
    """A row a step, averaged over the runs that got there."""
    responses: list[str]
    """What the first seed says to the first evaluation prompts."""

    def to_json(self) -> dict[str, Any]:
        def compared(found: Mapping[str, tuple[Estimate, float]]) -> dict[str, Any]:
            return {name: {**estimate.to_json(), "p": p} for name, (estimate, p) in found.items()}

        return {
            "labels": self.labels,
            "metrics": {name: estimate.to_json() for name, estimate in self.metrics.items()},
            "gain": compared(self.gain),
            "behind": compared(self.behind),
            "by_split": {
                split: {name: estimate.to_json() for name, estimate in found.items()}
                for split, found in self.by_split.items()
            },
            "pairs": None if self.pairs is None else self.pairs.to_json(),
            "hacked": self.hacked,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "kl": self.kl,
            "stopped": self.stopped,
            "curve": self.curve,
            "responses": self.responses,
        }


def summarise(
    config: CompareConfig, jobs: Sequence[Job], results: Sequence[RunResult], splits: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, ArmSummary]]:
    """Model → arm → its runs in one summary. `splits`: name → numbers of the evaluation rows that belong to it."""
    by_model: dict[str, dict[str, list[tuple[Job, RunResult]]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_model.setdefault(job.model, {}).setdefault(job.name, []).append((job, result))
    out: dict[str, dict[str, ArmSummary]] = {}
    for model, arms in by_model.items():
        values = {name: _values([result for _, result in runs]) for name, runs in arms.items()}
        start = next((values[name] for name, runs in arms.items() if runs[0][0].arm.reward == NONE), None)
        out[model] = {
            name: _summary(runs, values[name], start, values[config.against], splits) for name, runs in arms.items()
        }
    return out


def _summary(
    runs: Sequence[tuple[Job, RunResult]],
    own: Mapping[str, Values],
    start: Mapping[str, Values] | None,
    best: Mapping[str, Values],
    splits: Mapping[str, Sequence[int]],
) -> ArmSummary:
    results = [result for _, result in runs]
    first = results[0]
    pairs = [result["pairs"] for result in results if result.get("pairs")]
    families = {name: entry["beats_best"]["mean"] for name, entry in first.get("audit", {}).get("families", {}).items()}
    worst = max(families, key=lambda name: families[name]) if families else None
    curves = [result.get("curve", []) for result in results]
    ends = [curve[-5:] for curve in curves if curve and "kl" in curve[-1]]
    return ArmSummary(
        runs[0][0].arm.labels,
        {name: bootstrap(known) for name, values in own.items() if (known := _known(values))},
        {} if start is None or start is own else _compared(own, start),
        {} if best is own else _compared(best, own),
        {
            split: {
                name: bootstrap(known)
                for name, values in own.items()
                if (known := _known([values[row] for row in rows]))
            }
            for split, rows in splits.items()
        },
        bootstrap([fmean(each) for each in zip(*pairs, strict=True)]) if pairs else None,
        None if worst is None else (worst, families[worst]),
        fmean(result.get("tokens", 0) for result in results),
        fmean(result["seconds"].get("reward", 0) + result["seconds"].get("training", 0) for result in results),
        fmean(fmean(row["kl"] for row in end) for end in ends) if ends else None,
        sum(result.get("stopped") is not None for result in results),
        _mean_curve(curves),
        list(first["responses"]),
    )


def _values(results: Sequence[RunResult]) -> dict[str, Values]:
    """Metric → each prompt's figure, averaged over the seeds that have one."""
    names = list(dict.fromkeys(name for result in results for name in result["values"]))
    out: dict[str, Values] = {}
    for name in names:
        each = zip(*(result["values"][name] for result in results), strict=True)
        out[name] = [fmean(known) if (known := _known(list(prompt))) else None for prompt in each]
    return out


def _compared(a: Mapping[str, Values], b: Mapping[str, Values]) -> dict[str, tuple[Estimate, float]]:
    """Metric → a less b where both have a figure, and p."""
    out = {}
    for name in (name for name in a if name in b):
        both = [(x, y) for x, y in zip(a[name], b[name], strict=True) if x is not None and y is not None]
        if both:
            new, old = [x for x, _ in both], [y for _, y in both]
            out[name] = (paired_bootstrap(new, old), permutation_test(new, old))
    return out


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    out = []
    for step in range(max((len(curve) for curve in curves), default=0)):
        rows = [curve[step] for curve in curves if len(curve) > step]
        out.append({name: fmean(row[name] for row in rows) for name in rows[0]})
    return out
