"""The curves of a run's page, and where its time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adhere.report.curves import SMOOTHED_FROM, Point, curve, number, smooth
from adhere.report.markup import clip
from adhere.report.run import is_number
from adhere.report.shown import value_text

CURVES = {
    "reward": "Reward",
    "kl": "KL from start, nats",
    "length": "Response length, tokens",
    "completions/mean_length": "Response length, tokens",
    "entropy": "Entropy, nats",
}
SIGNALS, SECONDS = "signals/", "seconds/"


def curves(steps: Sequence[Mapping[str, Any]]) -> str:
    """Reward, KL, length, entropy and every signal, step by step."""
    names = {key: label for key, label in CURVES.items() if any(key in row for row in steps)}
    if "length" in names:
        names.pop("completions/mean_length", None)
    signals = sorted({key for row in steps for key in row if key.startswith(SIGNALS)})
    names |= {key: f"Signal: {key.removeprefix(SIGNALS).replace('_', ' ')}" for key in signals}
    drawn = [(label, points) for key, label in names.items() if (points := series(steps, key))]
    if not drawn:
        return ""
    cards = "".join(
        f'<figure class="card" style="margin:0"><div class="head"><h3>{clip(label, 60)}</h3>'
        f"<small>{_ends(points)}</small></div>{curve(points, label)}</figure>"
        for label, points in drawn
    )
    return (
        '<p class="lead">One point a step, with a moving average in front. The reward is what was '
        f'trained on: its rise alone shows nothing.</p><div class="grid">{cards}</div>'
    )


def _ends(points: Sequence[Point]) -> str:
    """Where a curve starts and ends: of its moving average where there is one, for single steps are noise."""
    shown = smooth(points) if len(points) >= SMOOTHED_FROM else points
    return f"{value_text(shown[0][1])} → {value_text(shown[-1][1])}"


def series(steps: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has both as finite numbers, by step; the later of two rows for one step wins, as
    a run that was resumed logs some steps again."""
    found: dict[float, float] = {}
    for place, row in enumerate(steps, 1):
        step = row.get("step", place)
        if is_number(step) and is_number(row.get(key)):
            found[float(step)] = float(row[key])
    return sorted(found.items())


def phases(steps: Sequence[Mapping[str, Any]]) -> str:
    """Mean seconds of each phase of a step."""
    keys = sorted({key for row in steps for key in row if key.startswith(SECONDS)})
    means = {key.removeprefix(SECONDS): _mean([y for _, y in series(steps, key)]) for key in keys}
    speed = series(steps, "tokens_per_second")
    parts = [
        f"<li>{clip(name, 40)} <b>{number(mean)} s</b></li>"
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]
    if speed:
        parts.append(f"<li>tokens per second <b>{number(_mean([y for _, y in speed]))}</b></li>")
    listed = f'<ul class="chips">{"".join(parts)}</ul>'
    return f'<p class="lead">Mean of a step.</p>{listed}' if parts else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
