"""A run directory, read: settings, a row a step, samples, and the evaluation. Files in, records out; no markup."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from adhere import origin
from adhere.errors import UserError
from adhere.inspection.inspection import Inspection
from adhere.measure import changed
from adhere.measure.metrics import METRICS, Metric
from adhere.measure.stats import Estimate

AUDIT = "audit-before.json"
"""What an audit before training found, in the run directory."""
TRAINING_SAMPLES = 10
"""Rows of samples.jsonl kept from either end of training."""


@dataclass(frozen=True)
class Finding:
    """One metric as results.json has it."""

    name: str
    after: Estimate | None
    before: Estimate | None
    difference: Estimate | None
    p: float | None
    p_holm: float | None = None

    @property
    def metric(self) -> Metric:
        return METRICS.get(self.name, Metric(self.name, 0, ""))

    @property
    def moved(self) -> int:
        """1 = rose, −1 = fell, 0 = the interval holds 0 or the test does not tell."""
        if self.difference is None or (self.p is not None and self.p >= 0.05):
            return 0
        return int(self.difference.low > 0) - int(self.difference.high < 0)

    @property
    def kind(self) -> str:
        """`up` for a change to the better, `down` for one to the worse, nothing where neither."""
        return {1: "up", -1: "down"}.get(self.moved * self.metric.better, "")


Findings = dict[str, Finding]


@dataclass(frozen=True)
class Run:
    """What a run directory holds. Everything is optional: a run may be broken off, or evaluated only."""

    name: str
    config_text: str
    config: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    """Rows of metrics.jsonl."""
    first: tuple[dict[str, Any], ...]
    """The first rows of samples.jsonl."""
    last: tuple[dict[str, Any], ...]
    """The last rows of samples.jsonl that are not among the first."""
    findings: Findings
    """The metrics of results.json, in the order of `METRICS`, unknown ones last."""
    groups: dict[str, dict[str, Findings]]
    """The same by `split` and by `kind`: {"split": {"test": findings}}."""
    samples: tuple[dict[str, Any], ...]
    """Prompts with the greedy responses before and after."""
    audit: dict[str, Any] | None = None
    """What the audit before training found."""
    attention: dict[str, Inspection] = field(default_factory=dict)
    """`before` and `after`: a prompt whose answer changed, as both models read it."""
    evaluated: dict[str, Any] = field(default_factory=dict)
    """The settings of the evaluation."""
    commands: tuple[str, ...] = ()
    """The commands that made the run, in order."""
    versions: dict[str, str] = field(default_factory=dict)
    """What they ran with."""
    unread: int = 0
    """Lines of the logs that could not be read."""


def read_run(folder: Path) -> Run:
    """Read `folder`.

    Raises `UserError`: it is no folder, holds neither metrics.jsonl nor results.json, or a JSON document in it is not
    what was written there.
    """
    fix = "give the --output folder of a run"
    if not folder.is_dir():
        raise UserError("not a folder", where=str(folder), fix=fix)
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "results.json")):
        raise UserError("neither metrics.jsonl nor results.json is here", where=str(folder), fix=fix)
    log, samples = _Lines(folder / "metrics.jsonl"), _Lines(folder / "samples.jsonl")
    steps, drawn = tuple(log), iter(samples)
    first = tuple(islice(drawn, TRAINING_SAMPLES))
    last = tuple(deque(drawn, TRAINING_SAMPLES))
    config_text, config = _config(folder / "config.yaml")
    results = _results(folder / "results.json")
    return Run(
        folder.resolve().name,
        config_text,
        config,
        steps,
        first,
        last,
        _findings(results.get("metrics"), "metrics"),
        {name: _grouped(results.get(f"by_{name}"), f"by_{name}") for name in ("split", "kind")},
        tuple(sample for sample in _list(results.get("samples")) if isinstance(sample, dict)),
        _audit(folder / AUDIT),
        _attention(folder / changed.FILE),
        settings if isinstance(settings := results.get("config"), dict) else {},
        *origin.read(folder),
        log.unread + samples.unread,
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` can be drawn: finite, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class _Lines:
    """The objects of a JSON Lines file, one at a time; a file that is missing has none.

    A run that was killed while it wrote leaves half a line: such lines are counted, not fatal.
    """

    path: Path
    unread: int = field(default=0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    self.unread += bool(line.strip())


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
        values = None
    return text, values if isinstance(values, dict) else {}


def _json(path: Path, fix: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})", where=str(path), fix=fix) from error


def _audit(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    fix = "remove it, or run `adhere audit` again"
    found = _json(path, fix)
    if not isinstance(found, dict) or not {"verdict", "gameable", "prompts"} <= found.keys():
        raise UserError("is not what an audit writes", where=str(path), fix=fix)
    return found


def _attention(path: Path) -> dict[str, Inspection]:
    if not path.is_file():
        return {}
    fix = "remove it, or run the evaluation again"
    found = _json(path, fix)
    try:
        return {when: Inspection.from_json(found[when]) for when in ("before", "after")}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"is not what an evaluation writes ({error})", where=str(path), fix=fix) from error


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    results = _json(path, "run the evaluation again")
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise UserError("holds no `metrics`", where=str(path), fix="run the evaluation again")
    return results


def _findings(metrics: Any, where: str) -> Findings:
    if not isinstance(metrics, dict):
        return {}
    order = [name for name in METRICS if name in metrics] + [name for name in metrics if name not in METRICS]
    return {name: _finding(name, metrics[name], f"results.json: {where}.{name}") for name in order}


def _grouped(groups: Any, where: str) -> dict[str, Findings]:
    if not isinstance(groups, dict):
        return {}
    return {name: _findings(metrics, f"{where}.{name}") for name, metrics in groups.items()}


def _finding(name: str, entry: Any, where: str) -> Finding:
    if not isinstance(entry, dict):
        raise UserError("is not an object", where=where, fix="run the evaluation again")
    after, before, difference = (_figure(entry.get(key), f"{where}.{key}") for key in ("after", "before", "difference"))
    p, adjusted = (float(value) if is_number(value := entry.get(key)) else None for key in ("p", "p_holm"))
    return Finding(name, after, before, difference, p, adjusted)


def _figure(entry: Any, where: str) -> Estimate | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(is_number(entry.get(key)) for key in ("mean", "low", "high", "n")):
        raise UserError("is not {mean, low, high, n} in numbers", where=where, fix="run the evaluation again")
    return Estimate(float(entry["mean"]), float(entry["low"]), float(entry["high"]), int(entry["n"]))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
