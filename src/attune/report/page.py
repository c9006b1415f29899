"""The page of a run: did training help, how did it go, what does the policy say now. Reads a run directory, never a
live object, so it can be written again later, for a run that was broken off too.

    config.yaml     the resolved settings                      metrics.jsonl   a row a step
    samples.jsonl   what was sampled in training, optional     results.json    an `Evaluation.to_json`, optional
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attune.errors import UserError
from attune.measure.metrics import METRICS, Metric, exact_match
from attune.measure.stats import Figure
from attune.report.curves import Point, curve, interval, number
from attune.report.markup import clip, document, escape

# Samples of the evaluation, then rows from either end of training: 50 together.
EVALUATION_SAMPLES, TRAINING_SAMPLES = 30, 10
CONFIG_LIMIT = 20_000

# The first of these with a difference to the baseline decides the headline: what is right before what is related.
HEADLINE = ("exact_match", "f1", "rouge_l", "faithfulness", "relevance")
CARDS = ("faithfulness", "relevance", "consistency", "repetition", "length", "kl")

CURVES = {
    "reward": "Reward",
    "kl": "KL from the start (nats)",
    "length": "Response length (tokens)",
    "completions/mean_length": "Response length (tokens)",
    "entropy": "Entropy (nats)",
}


@dataclass(frozen=True)
class Finding:
    """One metric as results.json has it."""

    name: str
    after: Figure | None
    before: Figure | None
    difference: Figure | None
    p: float | None

    @property
    def metric(self) -> Metric:
        return METRICS.get(self.name, Metric(self.name, 0, ""))

    @property
    def moved(self) -> int:
        """1 = rose, −1 = fell, 0 = the interval or the test leaves it open."""
        if self.difference is None or (self.p is not None and self.p >= 0.05):
            return 0
        return int(self.difference.low > 0) - int(self.difference.high < 0)

    @property
    def kind(self) -> str:
        """`up` for a change to the better, `down` for one to the worse, nothing where neither."""
        return {1: "up", -1: "down"}.get(self.moved * self.metric.better, "")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `run_dir` to `out` (default: `run_dir/report.html`) and return where it is.

    The page is one file without scripts or external resources. At most 500 points of a curve, 50 samples and 2,000
    characters of a text are shown. Lines of the logs that cannot be read (a run that was killed while it wrote) are
    left out, and the page says how many.

    Raises `UserError`: `run_dir` is no folder, holds neither metrics.jsonl nor results.json, or results.json is not
    what `Evaluation.to_json` writes.
    """
    if not run_dir.is_dir():
        raise UserError("not a folder", where=str(run_dir), fix="give the --output folder of a run")
    if not any((run_dir / name).is_file() for name in ("metrics.jsonl", "results.json")):
        raise UserError(
            "neither metrics.jsonl nor results.json is here", where=str(run_dir), fix="give the --output folder of a run"
        )
    page = _page(run_dir)
    out = out or run_dir / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=out.parent, suffix=".html.part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(draft, out)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return out


def _page(run_dir: Path) -> str:
    config_text, config = _config(run_dir / "config.yaml")
    log = _Lines(run_dir / "metrics.jsonl")
    steps = list(log)
    results = _results(run_dir / "results.json")
    findings = _findings(results.get("metrics"), "metrics")
    training = _Lines(run_dir / "samples.jsonl")
    title = f"Run {run_dir.resolve().name}"
    sections = [
        f"<header><h1>{escape(title)}</h1>{_chips(config, steps)}</header>",
        _verdict(findings, results, steps),
        _cards(findings),
        _table(findings),
        _groups(findings, results),
        _curves(steps),
        _phases(steps),
        _evaluation_samples(results),
        _training_samples(training),
    ]
    if config_text:
        sections.append(f"<details><summary>All settings (config.yaml)</summary><pre>{clip(config_text, CONFIG_LIMIT)}</pre></details>")
    unread = log.unread + training.unread
    note = f" {unread} lines of the logs could not be read and were left out." if unread else ""
    sections.append(f"<footer>Written by attune from the files of this run alone.{note}</footer>")
    return document(f"{title} · attune", "\n".join(section for section in sections if section))


# ------------------------------------------------------------------------------------------------------------ reading


class _Lines:
    """The objects of a JSON Lines file, read as they are asked for; a file that is missing has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
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
    except yaml.YAMLError:
        values = None
    return text, values if isinstance(values, dict) else {}


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=str(path), fix="evaluate again") from error
    if not isinstance(results, dict) or not isinstance(results.get("metrics", {}), dict):
        raise UserError("holds no `metrics`", where=str(path), fix="evaluate again")
    return results


def _findings(metrics: Any, where: str) -> dict[str, Finding]:
    """The metrics of results.json, in the order of `METRICS`, unknown ones last."""
    if not isinstance(metrics, dict):
        return {}
    order = [name for name in METRICS if name in metrics] + [name for name in metrics if name not in METRICS]
    return {name: _finding(name, metrics[name], f"results.json: {where}.{name}") for name in order}


def _finding(name: str, entry: Any, where: str) -> Finding:
    if not isinstance(entry, dict):
        raise UserError("is not an object", where=where, fix="evaluate again")
    after, before, difference = (_figure(entry.get(key), f"{where}.{key}") for key in ("after", "before", "difference"))
    p = entry.get("p")
    return Finding(name, after, before, difference, float(p) if _is_number(p) else None)


def _figure(entry: Any, where: str) -> Figure | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(_is_number(entry.get(key)) for key in ("mean", "low", "high", "n")):
        raise UserError("is not {mean, low, high, n} in numbers", where=where, fix="evaluate again")
    return Figure(float(entry["mean"]), float(entry["low"]), float(entry["high"]), int(entry["n"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
