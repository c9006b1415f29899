"""The page of a comparison: arms beside each other, with intervals, cost, curves and samples. Reads compare.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import atomic_write
from adhere.measure.metrics import METRICS
from adhere.report.curves import curve, curves
from adhere.report.markup import clip, document, escape

MAIN = (
    "exact_match",
    "f1",
    "contained",
    "relevance",
    "relevance_words",
    "rouge_l",
    "consistency",
    "faithfulness",
    "length",
)
"""Metrics of the table, where the rows have what they need."""
QUALITY = ("exact_match", "rouge_l", "relevance", "relevance_words")
"""The first of these that was measured is the quality of the label-efficiency curve."""
LABELLED = {"human": "reward model", "hybrid": "hybrid"}
SAMPLES = 12


def write_compare(folder: Path) -> Path:
    """Write `folder`/compare.html from `folder`/compare.json and return where it is. One file, no scripts, all escaped.

    Raises `UserError` where compare.json is not there or not what `adhere compare` writes.
    """
    path = folder / "compare.json"
    try:
        page = _page(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), fix="run `adhere compare` again") from error
    atomic_write(folder / "compare.html", page)
    return folder / "compare.html"


def metrics_of(arms: Mapping[str, Any]) -> list[str]:
    """The metrics of `MAIN` that some arm has."""
    return [name for name in MAIN if any(name in arm["metrics"] for arm in arms.values())]


def _page(found: Mapping[str, Any]) -> str:
    config = found["config"]
    chips = {"prompts": found["prompts"], "seeds": len(config["seeds"]), "arms": len(config["arms"])}
    listed = "".join(f"<li>{name} <b>{value}</b></li>" for name, value in chips.items())
    body = (
        f'<header><h1>Comparison</h1><ul class="chips">{listed}</ul></header>'
        '<p class="lead">Every arm starts from the same model, is trained on the same prompts with the same seeds, and '
        "answers the same fresh prompts. A figure is a mean over prompts, seeds averaged, with its 95 % interval. "
        "No correction for the number of comparisons is made: of twenty that mean nothing, one will look so.</p>"
    )
    for model, arms in found["models"].items():
        body += f"<h2>{clip(model, 80)}</h2>" + _table(arms) + _differences(arms, config["against"])
        body += _splits(arms) + _labels(arms, config["arms"]) + _cost(arms) + _curves(arms)
        body += _samples(found["shown"], arms)
    return document("Comparison · adhere", body)


def _table(arms: Mapping[str, Any]) -> str:
    names = metrics_of(arms)
    rows = ""
    for name, arm in arms.items():
        cells = "".join(_figure(arm["metrics"].get(metric), arm["gain"].get(metric), metric) for metric in names)
        kl = "–" if arm["kl"] is None else f"{arm['kl']:.2f}"
        stopped = f"<small>{arm['stopped']} stopped early</small>" if arm["stopped"] else ""
        rows += f'<tr><th scope="row">{clip(name, 80)}{stopped}</th>{cells}<td>{kl}</td></tr>'
    return _grid(["Arm", *(METRICS[name].label for name in names), "KL, nats"], rows)


def _differences(arms: Mapping[str, Any], against: str) -> str:
    names = metrics_of(arms)
    rows = ""
    for name, arm in arms.items():
        if arm["behind"]:
            cells = "".join(_signed(arm["behind"].get(metric), metric) for metric in names)
            rows += f'<tr><th scope="row">{clip(name, 80)}</th>{cells}</tr>'
    lead = f"{clip(against, 80)} less each other arm, prompt by prompt; p of a paired permutation test."
    return (
        f"<h3>{clip(against, 80)} against the others</h3>"
        + _lead(lead)
        + _grid(["Arm", *(METRICS[name].label for name in names)], rows)
    )


def _splits(arms: Mapping[str, Any]) -> str:
    splits = list(dict.fromkeys(split for arm in arms.values() for split in arm["by_split"]))
    metric = _quality(arms)
    if not splits:
        return ""
    rows = ""
    for name, arm in arms.items():
        cells = "".join(_figure(arm["by_split"].get(split, {}).get(metric), None, metric) for split in splits)
        rows += f'<tr><th scope="row">{clip(name, 80)}</th>{cells}</tr>'
    return f"<h3>{METRICS[metric].label} by split</h3>" + _grid(["Arm", *splits], rows)


def _labels(arms: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    """Quality, and pairs put in order, against the number of labels."""
    metric = _quality(arms)
    quality: dict[str, list[tuple[float, float]]] = {}
    ordered: dict[str, list[tuple[float, float]]] = {}
    for name, arm in sorted(arms.items(), key=lambda item: item[1]["labels"]):
        kind = LABELLED.get(str(written[name].get("reward")))
        if kind is not None:
            quality.setdefault(kind, []).append((arm["labels"], arm["metrics"][metric]["mean"]))
            ordered.setdefault(kind, []).append((arm["labels"], arm["pairs"]["mean"]))
    if not quality:
        return ""
    figures = "".join(
        f'<figure class="card"><div class="head"><h3>{label}</h3></div>{curves(series, label, "labelled pairs")}'
        "</figure>"
        for label, series in ((METRICS[metric].label, quality), ("Held-out pairs in order", ordered))
    )
    return "<h3>What a label buys</h3>" + f'<div class="grid">{figures}</div>'


def _cost(arms: Mapping[str, Any]) -> str:
    rows = ""
    for name, arm in arms.items():
        family, rate = arm["hacked"] or (None, 0.0)
        hacked = "–" if family is None else f'<span class="{"down" if rate > 0.05 else ""}">{rate:.0%}</span>'
        below = f"<small>{clip(family, 60)}</small>" if family is not None else ""
        rows += (
            f'<tr><th scope="row">{clip(name, 80)}</th><td>{arm["labels"] or "–"}</td><td>{arm["tokens"]:,.0f}</td>'
            f"<td>{arm['seconds']:,.0f}</td>{_figure(arm['pairs'], None, 'pairs')}<td>{hacked}{below}</td></tr>"
        )
    head = ["Arm", "Labels", "Tokens sampled", "Seconds", "Held-out pairs in order", "Worst degenerate response"]
    lead = (
        "Labels, tokens and seconds a run. Pairs: the share of labelled pairs, seen by no arm, that the reward puts in "
        "order before training. Last, the degenerate response that the reward would pay for most often."
    )
    return "<h3>What it costs, and what the reward is worth</h3>" + _lead(lead) + _grid(head, rows)


def _curves(arms: Mapping[str, Any]) -> str:
    figures = ""
    for name, arm in arms.items():
        for key, label in (("reward", "its reward"), ("kl", "KL, nats")):
            points = [(row["step"], row[key]) for row in arm["curve"] if row.get(key) is not None]
            if points:
                figures += (
                    f'<figure class="card"><div class="head"><h3>{clip(name, 60)}: {label}</h3></div>'
                    f"{curve(points, f'{name}, {label}')}</figure>"
                )
    lead = "Each arm's own reward, on its own scale, and how far it went from the start; seeds averaged."
    return f'<details><summary>Learning curves</summary>{_lead(lead)}<div class="grid">{figures}</div></details>'


def _samples(shown: Sequence[Mapping[str, Any]], arms: Mapping[str, Any]) -> str:
    blocks = ""
    for place, row in enumerate(shown[:SAMPLES]):
        sides = ""
        for name, arm in arms.items():
            said = arm["responses"][place] if place < len(arm["responses"]) else ""
            sides += f'<div class="side"><small>{clip(name, 60)}</small><p class="text">{clip(said)}</p></div>'
        answers = f"<small>answers: {clip(', '.join(row['answers']))}</small>" if row["answers"] else ""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        blocks += f'<div class="card sample"><p class="text">{clip(prompt)}</p>{answers}'
        blocks += f'<div class="sides">{sides}</div></div>'
    return f"<details><summary>Samples side by side</summary>{blocks}</details>"


def _quality(arms: Mapping[str, Any]) -> str:
    names = metrics_of(arms)
    return next((name for name in QUALITY if name in names), names[0])


def _figure(entry: Mapping[str, Any] | None, gain: Mapping[str, Any] | None, metric: str) -> str:
    """A figure with its interval, coloured by what it is against the start."""
    if entry is None:
        return "<td>–</td>"
    tone = "" if gain is None else _tone(gain, metric)
    ends = f"{entry['low']:.3f} to {entry['high']:.3f}"
    return f'<td><span class="{tone}">{entry["mean"]:.3f}</span><small>{ends}</small></td>'


def _signed(entry: Mapping[str, Any] | None, metric: str) -> str:
    if entry is None:
        return "<td>–</td>"
    ends = f"{entry['low']:+.3f} to {entry['high']:+.3f}"
    p = f"p {entry['p']:.3f}" if entry["p"] >= 0.001 else "p &lt; 0.001"
    shown = f'<span class="{_tone(entry, metric)}">{entry["mean"]:+.3f}</span>'
    return f"<td>{shown}<small>{ends}</small><small>{p}</small></td>"


def _tone(gain: Mapping[str, Any], metric: str) -> str:
    """Whether a difference that is clear of zero is a gain or a loss; where neither is better, nothing."""
    better = METRICS[metric].better if metric in METRICS else 0
    sign = 1 if gain["low"] > 0 else -1 if gain["high"] < 0 else 0
    return {1: "up", -1: "down"}.get(sign * better, "")


def _lead(text: str) -> str:
    return f'<p class="lead">{text}</p>'


def _grid(head: Sequence[str], rows: str) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="card scroll"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'
