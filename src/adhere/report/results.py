"""The tables of a run's page: every metric, by split and kind; and the same as CSV and JSON."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from adhere.files import to_json
from adhere.measure.stats import Estimate
from adhere.report.curves import interval
from adhere.report.markup import clip, escape
from adhere.report.run import Finding, Run
from adhere.report.shown import p_text, signed, value_text
from adhere.report.verdict import headline

UNSCALED = ("length", "kl", "follow_up")
"""Counted in tokens or nats: on the scale of the shares they would dwarf them."""
HEADS = ("Before", "After", "Difference", "", "p", "Prompts")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet would take for a formula at the beginning of a text."""


def table(findings: Mapping[str, Finding]) -> str:
    """Every metric over all prompts."""
    if not findings:
        return ""
    shares = [f.difference for f in findings.values() if f.difference and f.name not in UNSCALED]
    scale = max((max(abs(d.low), abs(d.high)) for d in shares), default=0.0)
    rows = "".join(_row(f, _named(f), scale if f.name not in UNSCALED else None) for f in findings.values())
    return (
        '<p class="lead">Means over prompts; below each, its 95 % bootstrap interval. Differences are '
        "taken prompt by prompt and coloured where the interval excludes 0 and p &lt; 0.05. p: paired permutation "
        "test; below it Holm’s adjustment for the number of rows, for of twenty that mean nothing one has p &lt; 0.05."
        "</p>" + _framed("Metric", rows)
    )


def group_table(run: Run, field: str) -> str:
    """The metric of the verdict by `split` or `kind`."""
    first = headline(run.findings) or next(iter(run.findings.values()), None)
    shown = {n: f[first.name] for n, f in run.groups[field].items() if first and first.name in f}
    if first is None or len(run.groups[field]) < 2 or not shown:  # one group is the table above again
        return ""
    bounds = [max(abs(f.difference.low), abs(f.difference.high)) for f in shown.values() if f.difference]
    scale = max(bounds, default=0.0)
    rows = "".join(_row(finding, f'<th scope="row">{clip(name, 80)}</th>', scale) for name, finding in shown.items())
    label = f"{escape(first.metric.label)} by {escape(field)}"
    return f"<h3>{label}</h3>" + _framed(field.capitalize(), rows)


def _framed(first: str, rows: str) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (first, *HEADS))
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="card scroll"><table class="stacked">{body}</table></div>'


def _named(finding: Finding) -> str:
    metric = finding.metric
    wish = {1: " Higher is better.", -1: " Lower is better."}.get(metric.better, "")
    about = f"<small>{escape(metric.about)}.{wish}</small>" if metric.about else ""
    return f'<th scope="row">{escape(metric.label)}{about}</th>'


def _row(finding: Finding, head: str, scale: float | None) -> str:
    change = finding.difference
    counted = change or finding.after or finding.before
    drawn = interval(change.low, change.mean, change.high, scale, finding.kind) if change and scale else ""
    p = p_text(finding.p, alone=True) if finding.p is not None else "–"
    if finding.p_holm is not None:
        p += f"<small>Holm: {p_text(finding.p_holm, alone=True)}</small>"
    cells = (
        _cell(finding.before, value_text),
        _cell(finding.after, value_text),
        _cell(change, signed, finding.kind),
        drawn,
        p,
        f"{counted.n if counted else 0:,}",
    )
    told = zip(HEADS, cells, strict=True)
    shown = "".join(f'<td data-label="{name}"{"" if name else " class=plot"}>{cell}</td>' for name, cell in told)
    return f"<tr>{head}{shown}</tr>"


def _cell(figure: Estimate | None, shown: Callable[[float], str], kind: str = "") -> str:
    if figure is None:
        return "–"
    ends = f"{shown(figure.low)} to {shown(figure.high)}"
    return f'<span class="{kind}">{shown(figure.mean)}</span><small>{ends}</small>'


def downloads(run: Run) -> str:
    """Links that save the figures of all tables, unrounded, as CSV and as JSON; the page itself holds them."""
    rows = _records(run)
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    files = {"csv": ("text/csv", buffer.getvalue()), "json": ("application/json", to_json(rows, indent=2))}
    links = "".join(
        f'<a download="results.{suffix}" href="data:{kind};charset=utf-8;base64,'
        f'{base64.b64encode(content.encode("utf-8", "backslashreplace")).decode("ascii")}">{suffix.upper()}</a>'
        for suffix, (kind, content) in files.items()
    )
    return f'<p class="links">The tables: {links}</p>'


def _records(run: Run) -> list[dict[str, Any]]:
    """A row a metric and group: `of` (all, split or kind), `group`, `metric`, the figures, p and p (Holm)."""
    parts = [("all", "", run.findings)]
    parts += [(field, name, findings) for field, groups in run.groups.items() for name, findings in groups.items()]
    return [
        {
            "of": field,
            "group": group,
            "metric": finding.name,
            **_figures(finding),
            "p": finding.p,
            "p_holm": finding.p_holm,
        }
        for field, group, findings in parts
        for finding in findings.values()
    ]


def _figures(finding: Finding) -> dict[str, Any]:
    sides = {"before": finding.before, "after": finding.after, "difference": finding.difference}
    found: dict[str, Any] = {}
    for name, figure in sides.items():
        ends = ("", "_low", "_high", "_n")
        values = (None,) * 4 if figure is None else (figure.mean, figure.low, figure.high, figure.n)
        found |= {f"{name}{end}": value for end, value in zip(ends, values, strict=True)}
    return found


def _plain(value: Any) -> Any:
    """A cell that no spreadsheet runs: a text that looks like a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
