"""Curves and interval bars as inline SVG: numbers in, markup out. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from adhere.report.markup import escape

MAX_POINTS = 500
"""Points drawn of one curve."""
SMOOTHED_FROM = 20
"""Points from which a moving average is drawn."""
TONES = 4
"""Colours of series; a fifth has the first one again."""

# The drawing in its own units; the page scales it.
_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 8, 34

Point = tuple[float, float]


def curve(points: Sequence[Point], label: str, x_label: str = "step") -> str:
    """An SVG of finite `points` (x never falls), the moving average of a long one in front."""
    return curves({"": points}, label, x_label)


def curves(series: Mapping[str, Sequence[Point]], label: str, x_label: str = "step") -> str:
    """An SVG of some series of finite points on the same axes, each with its name where there are several."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def across(x: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        return _LEFT + (width * (x - x_low) / (x_high - x_low) if x_high > x_low else width / 2)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - y_low) / (y_high - y_low)

    def path(shown: Sequence[Point], kind: str) -> str:
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in shown)
        return f'<polyline class="{kind}" points="{line}"/>'

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)} by {escape(x_label)}">']
    for y in y_ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    floor = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        parts.append(f'<text x="{across(x):.1f}" y="{floor + 15}" text-anchor="middle">{number(x)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for place, (name, points) in enumerate(series.items()):
        tone = f" tone-{place % TONES}" if place else ""
        x, y = points[-1]
        if len(points) == 1:
            parts.append(f'<circle class="dot{tone}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>')
        elif len(points) < SMOOTHED_FROM:
            parts.append(path(points, f"curve{tone}"))
        else:
            parts += [path(thin(points), f"raw{tone}"), path(thin(smooth(points)), f"curve{tone}")]
        if name:
            parts.append(f'<text class="name{tone}" x="{_LEFT + 8}" y="{_TOP + 12 + 14 * place}">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def interval(low: float, mean: float, high: float, scale: float, kind: str) -> str:
    """A bar from `low` to `high` with a dot at `mean`, on an axis from −`scale` to `scale` with a rule at 0."""

    def across(x: float) -> float:
        return 60 + 54 * (max(-scale, min(scale, x)) / scale if scale else 0.0)

    return (
        '<svg class="interval" viewBox="0 0 120 22" aria-hidden="true">'
        '<line class="axis" x1="60" x2="60" y1="1" y2="21"/>'
        f'<line class="interval-line {kind}" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="11" y2="11"/>'
        f'<circle class="interval-dot" cx="{across(mean):.1f}" cy="11" r="3.5"/></svg>'
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def number(value: float) -> str:
    """Three significant digits, a true minus, no trailing zeros: 0.25, −1.5, 1,200, 3e−05."""
    if value == 0:
        return "0"
    thousands = 999.5 <= abs(value) < 1e6
    text = f"{value:,.0f}" if thousands else f"{value:.3g}"
    return text.replace("-", "−")


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each y replaced by the mean of its neighbours, a twentieth of the points to either side, fewer at the ends."""
    half = max(2, len(points) // 20)
    sums = list(accumulate((y for _, y in points), initial=0.0))
    smoothed = []
    for place, (x, _) in enumerate(points):
        start, stop = max(0, place - half), min(len(points), place + half + 1)
        smoothed.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return smoothed


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    stretches = limit // 2
    kept = []
    for stretch in range(stretches):
        start, stop = (len(points) * s // stretches for s in (stretch, stretch + 1))
        places = range(start, stop)
        ends = {min(places, key=lambda i: points[i][1]), max(places, key=lambda i: points[i][1])}
        kept += [points[place] for place in sorted(ends)]
    return kept
