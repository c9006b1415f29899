"""Results as plain tables, for a terminal: (title, columns, rows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adhere.faithfulness.summary import CHOICES, PAIRS, Bench, Figures
from adhere.measure.audit import Verdict
from adhere.measure.evaluate import Result
from adhere.measure.stats import Estimate
from adhere.report.compare import metrics_of

Table = tuple[str, list[str], list[list[object]]]
COMPARED = ("swapped", "distractor", "unanswerable", "samples", "best of n", "swapped best of n")
"""Figures of a bench whose differences are shown; the file has those of all."""
WINS = 5
"""Families whose winner is shown."""
WIDE = 60
"""Characters of a response that are shown."""
ACROSS = 3
"""Figures with intervals beside each other that 80 columns have room for."""


def results_table(title: str, results: Mapping[str, Result]) -> Table:
    """A row a metric; before, after and the difference where there was a baseline."""
    compared = any(result.before is not None for result in results.values())
    columns = ["metric", "before", "after", "difference", "p", "p (Holm)"] if compared else ["metric", "value"]
    rows: list[list[object]] = []
    for name, result in results.items():
        after = _interval(result.after)
        if compared:
            ps = ["" if p is None else f"{p:.4f}" for p in (result.p, result.p_holm)]
            rows.append([name, _interval(result.before), after, _interval(result.difference, "+"), *ps])
        else:
            rows.append([name, after])
    return title, columns, rows


def audit_tables(verdicts: Mapping[str, Verdict]) -> list[Table]:
    """What each reward would pay for; and, where answers are known, whether it prefers what is right."""
    families = dict.fromkeys(family for verdict in verdicts.values() for family in verdict.hacks)
    hacks = {family: [v.hacks.get(family) for v in verdicts.values()] for family in families}
    groups = dict.fromkeys(group for verdict in verdicts.values() for group in verdict.ranking)
    tables = [
        _shares(
            "share of prompts where it beats the best own sample",
            ["degenerate response", *verdicts],
            {family: [hack.beats_best if hack else None for hack in found] for family, found in hacks.items()},
        )
    ]
    if groups:
        ranks = {group: [verdict.ranking.get(group) for verdict in verdicts.values()] for group in groups}
        tables.append(
            _shares("right before wrong, own samples of a prompt (0.5 = chance)", ["prompts", *verdicts], ranks)
        )
    return tables


def win_table(verdict: Verdict, limit: float) -> Table:
    """Of a gameable reward: what won, beside the best own sample, for the families that win most often."""
    families = sorted(verdict.gameable(limit), key=lambda name: -verdict.hacks[name].beats_best.mean)[:WINS]
    rows: list[list[object]] = []
    for name in families:
        win = verdict.hacks[name].win
        assert win is not None, "a family above the limit has won somewhere"
        for label, paid in ((name, win.won), ("best own sample", win.best)):
            rows.append([label, f"{paid.reward:.2f}", win.through if paid is win.won else "", _clipped(paid.text)])
    return "what won most clearly", ["response", "paid", "through", "text"], rows


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= WIDE else f"{line[: WIDE - 1]}…") or "(empty)"


def compare_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table a model: a row an arm."""
    tables: list[Table] = []
    for model, arms in found["models"].items():
        names = metrics_of(arms)
        rows: list[list[object]] = []
        for name, arm in arms.items():
            figures = [arm["metrics"].get(metric) for metric in names]
            shown = ["" if f is None else f"{f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
            rows.append([name, *shown, "" if arm["kl"] is None else f"{arm['kl']:.2f}", f"{arm['seconds']:.0f}"])
        tables.append((f"{model}: {found['prompts']} fresh prompts", ["arm", *names, "KL", "seconds"], rows))
    return tables


def bench_tables(found: Bench, names: Sequence[str], own: Sequence[str]) -> list[Table]:
    """The figures of the rewards `names`, and how far those of `own` are ahead of the others."""
    drawn, heads = ["greedy", "sample"], ["copy heads", "all heads", "chance"]
    tables = _figures("pairs in order, right before wrong (0.5 = chance)", found.pairs, PAIRS, names)
    tables += _figures("the sample that the reward likes best", found.choices, CHOICES, [*drawn, *names])
    tables += _figures("the sentence looked at most holds the answer", found.evidence, list(found.evidence), heads)
    for name in own:
        others = [*drawn, *(other for other in names if other != name)]
        tables += _figures(
            f"{name}: how far ahead, question by question, of", found.differences[name], COMPARED, others, "+"
        )
    return tables


def _figures(title: str, figures: Figures, shown: Sequence[str], names: Sequence[str], sign: str = "") -> list[Table]:
    """A table for every `ACROSS` of the figures `shown` that there are: a row a name, and the number of questions."""
    there = [figure for figure in shown if figures.get(figure)]
    tables: list[Table] = []
    for start in range(0, len(there), ACROSS):
        part = there[start : start + ACROSS]
        rows: list[list[object]] = [
            [name, *(_short(figures[figure].get(name), sign) for figure in part)]
            for name in names
            if any(name in figures[figure] for figure in part)
        ]
        counts = [str(max(estimate.n for estimate in figures[figure].values())) for figure in part]
        tables.append((title, ["", *part], [*rows, ["questions", *counts]]))
    return tables


def _short(figure: Estimate | None, sign: str = "") -> str:
    """A share and its interval in a few signs: .57 [.49, .65]."""
    if figure is None:
        return ""
    shown = [
        f"{value:{sign}.2f}".replace("0.", ".").replace("1.00", "1.0")
        for value in (figure.mean, figure.low, figure.high)
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _shares(title: str, columns: list[str], rows: Mapping[str, Sequence[Estimate | None]]) -> Table:
    shown = [[name, *("" if figure is None else f"{figure.mean:.2f}" for figure in row)] for name, row in rows.items()]
    return title, columns, [list(row) for row in shown]


def _interval(figure: Estimate | None, sign: str = "") -> str:
    return "" if figure is None else f"{figure.mean:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"
