"""The page of a run: did training help, how did it go, what does the policy say now. Reads a run directory, never a
live object, so it can be written again later, and for a run that was broken off.

    config.yaml     the resolved settings                      metrics.jsonl   a row a step
    samples.jsonl   what was sampled in training, optional     results.json    an `Evaluation.to_json`, optional
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adhere.files import atomic_write
from adhere.measure.metrics import exact_match
from adhere.measure.stats import Estimate
from adhere.report.curves import SMOOTHED_FROM, Point, curve, interval, number, smooth
from adhere.report.markup import clip, document, escape
from adhere.report.run import Finding, Run, is_number, read_run

EVALUATION_SAMPLES = 30
"""Samples of the evaluation shown; with ten from either end of training that makes 50."""
CONFIG_LIMIT = 20_000
"""Characters of config.yaml shown."""

# The first of these with a difference to the baseline decides the headline: what is right before what is related.
HEADLINE = ("exact_match", "f1", "rouge_l", "faithfulness", "relevance", "relevance_words")
CARDS = ("faithfulness", "relevance", "relevance_words", "consistency", "repetition", "length", "kl")
# A fall of the mean length to less than this share of the start is pointed out: it is how a reward is usually gamed.
SHORT = 0.7

CURVES = {
    "reward": "Reward",
    "kl": "KL from start, nats",
    "length": "Response length, tokens",
    "completions/mean_length": "Response length, tokens",
    "entropy": "Entropy, nats",
}
UNSCALED = ("length", "kl", "follow_up")
"""Counted in tokens or nats: on the scale of the shares they would dwarf them."""
SIGNALS, SECONDS = "signals/", "seconds/"
# Settings named at the top of the page, wherever config.yaml keeps them.
SETTINGS = ("model", "algorithm", "reward", "steps", "num_samples", "seed")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `run_dir` to `out` (default: `run_dir/report.html`) and return where it is.

    The page is one file without scripts or external resources. At most 500 points of a curve, 50 samples and 2,000
    characters of a text are shown. Lines of the logs that cannot be read are left out, and the page says how many.

    Raises `UserError` as `adhere.report.run.read_run` does.
    """
    page = _page(read_run(run_dir))
    out = out or run_dir / "report.html"
    atomic_write(out, page)
    return out


def _page(run: Run) -> str:
    title = f"Run {run.name}"
    sections = [
        f"<header><h1>{escape(title)}</h1>{_chips(run)}</header>",
        _verdict(run),
        _cards(run.findings),
        _table(run.findings),
        *(_group_table(run, name) for name in run.groups),
        _curves(run.steps),
        _phases(run.steps),
        _evaluation_samples(run.samples),
        _training_samples(run),
        _settings(run.config_text),
        _footer(run),
    ]
    return document(f"{title} · adhere", "\n".join(section for section in sections if section))


# The headline


def _chips(run: Run) -> str:
    shown = [(name, value) for name in SETTINGS if (value := _find(run.config, name)) is not None]
    if run.steps:
        shown.append(("steps done", f"{len(run.steps):,}"))
    items = "".join(f"<li>{escape(name.replace('_', ' '))} <b>{clip(value, 120)}</b></li>" for name, value in shown)
    return f'<ul class="chips">{items}</ul>' if items else ""


def _find(config: Mapping[str, Any], name: str) -> str | None:
    """The setting `name`, at the top or in a group, or the `name` of the group `name`; the first that is found."""
    for group in (config, *(value for value in config.values() if isinstance(value, dict))):
        value = group.get(name)
        if isinstance(value, dict):
            value = value.get("name", value.get("path"))
        if isinstance(value, str | int | float):
            return str(value)
    return None


def _verdict(run: Run) -> str:
    headline = _headline(run.findings)
    if headline is None or headline.difference is None:
        return f'<section class="card verdict">{_unmeasured(run)}</section>'
    word = {"up": "Training helped.", "down": "Training did harm."}.get(headline.kind, "No clear change.")
    tone = {"up": "good", "down": "bad"}.get(headline.kind, "")
    others = [found for name, found in run.findings.items() if name != headline.name]
    notes = [f"{_sentence(found)}." for found in others if found.kind == "down"]
    notes += _shortened(run.findings)
    for field, groups in run.groups.items():
        notes += [
            f"On {escape(field)} “{clip(name, 80)}”: {_sentence(found)}."
            for name, findings in groups.items()
            if (found := findings.get(headline.name)) is not None and found.kind == "down"
        ]
    if tone == "good" and notes:
        word = "Training helped, at a price."
    listed = f"<ul>{''.join(f'<li>{note}</li>' for note in notes[:8])}</ul>" if notes else ""
    return (
        f'<section class="card verdict {tone}"><strong>{word}</strong><p>{_sentence(headline)}.</p>{listed}</section>'
    )


def _unmeasured(run: Run) -> str:
    if run.findings:
        return (
            "<strong>Nothing to compare with.</strong><p>The evaluation had no baseline, so it cannot tell what "
            "training changed.</p>"
        )
    reward = _series(run.steps, "reward")
    said = f"The reward went from {number(reward[0][1])} to {number(reward[-1][1])}. " if reward else ""
    return (
        f"<strong>Not evaluated.</strong><p>{said}The reward is what was trained on, and can rise while answers "
        "get worse: only an evaluation against the start tells.</p>"
    )


def _headline(findings: Mapping[str, Finding]) -> Finding | None:
    return next((findings[n] for n in HEADLINE if n in findings and findings[n].difference is not None), None)


def _sentence(finding: Finding) -> str:
    before, after, difference = finding.before, finding.after, finding.difference
    assert before is not None and after is not None and difference is not None
    verb = {1: "rose", -1: "fell"}.get(finding.moved, "went")
    p = "" if finding.p is None else f", p {_p(finding.p)}"
    return (
        f"{escape(finding.metric.label)} {verb} from {_value(before.mean)} to {_value(after.mean)}: "
        f"{_signed(difference.mean)} on the same {difference.n:,} prompts "
        f"(95 % interval {_signed(difference.low)} to {_signed(difference.high)}{p})"
    )


def _shortened(findings: Mapping[str, Finding]) -> list[str]:
    length = findings.get("length")
    if length is None or length.before is None or length.after is None or length.moved >= 0:
        return []
    if length.after.mean >= SHORT * length.before.mean:
        return []
    return [f"{_sentence(length)}. Shorter answers are often how a reward is gamed: read some below."]


def _cards(findings: Mapping[str, Finding]) -> str:
    headline = _headline(findings)
    names = [headline.name] if headline else [name for name in HEADLINE[:1] if name in findings]
    names += [name for name in CARDS if name in findings and name not in names]
    cards = "".join(_card(findings[name]) for name in names[:5])
    return f'<section class="grid small">{cards}</section>' if cards else ""


def _card(finding: Finding) -> str:
    if finding.after is None:
        return ""
    change = ""
    if finding.before is not None and finding.difference is not None:
        by = f'<span class="{finding.kind}">{_signed(finding.difference.mean)}</span>'
        change = f'<div class="soft">from {_value(finding.before.mean)} ({by})</div>'
    label = escape(finding.metric.label)
    return f'<div class="card"><h3>{label}</h3><div class="big">{_value(finding.after.mean)}</div>{change}</div>'


# Tables


def _table(findings: Mapping[str, Finding]) -> str:
    if not findings:
        return ""
    shares = [f.difference for f in findings.values() if f.difference and f.name not in UNSCALED]
    scale = max((max(abs(d.low), abs(d.high)) for d in shares), default=0.0)
    rows = "".join(_row(f, _named(f), scale if f.name not in UNSCALED else None) for f in findings.values())
    return (
        '<h2>Results</h2><p class="lead">Means over prompts; below each, its 95 % bootstrap interval. Differences are '
        "taken prompt by prompt and coloured where the interval excludes 0 and p &lt; 0.05. p: paired permutation "
        "test; below it Holm’s adjustment for the number of rows, for of twenty that mean nothing one has p &lt; 0.05."
        "</p>" + _framed("Metric", rows)
    )


def _group_table(run: Run, field: str) -> str:
    headline = _headline(run.findings) or next(iter(run.findings.values()), None)
    shown = {n: f[headline.name] for n, f in run.groups[field].items() if headline and headline.name in f}
    if headline is None or len(run.groups[field]) < 2 or not shown:  # one group is the table above again
        return ""
    bounds = [max(abs(f.difference.low), abs(f.difference.high)) for f in shown.values() if f.difference]
    scale = max(bounds, default=0.0)
    rows = "".join(_row(finding, f'<th scope="row">{clip(name, 80)}</th>', scale) for name, finding in shown.items())
    label = f"{escape(headline.metric.label)} by {escape(field)}"
    return f"<h2>{label}</h2>" + _framed(field.capitalize(), rows)


def _framed(first: str, rows: str) -> str:
    heads = (first, "Before", "After", "Difference", "", "p", "Prompts")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _named(finding: Finding) -> str:
    metric = finding.metric
    wish = {1: " Higher is better.", -1: " Lower is better."}.get(metric.better, "")
    about = f"<small>{escape(metric.about)}.{wish}</small>" if metric.about else ""
    return f'<th scope="row">{escape(metric.label)}{about}</th>'


def _row(finding: Finding, head: str, scale: float | None) -> str:
    change = finding.difference
    counted = change or finding.after or finding.before
    drawn = interval(change.low, change.mean, change.high, scale, finding.kind) if change and scale else ""
    p = _p(finding.p, alone=True) if finding.p is not None else "–"
    if finding.p_holm is not None:
        p += f"<small>Holm: {_p(finding.p_holm, alone=True)}</small>"
    return (
        f"<tr>{head}{_cell(finding.before, _value)}{_cell(finding.after, _value)}{_cell(change, _signed, finding.kind)}"
        f'<td class="plot">{drawn}</td><td>{p}</td><td>{counted.n if counted else 0:,}</td></tr>'
    )


def _cell(figure: Estimate | None, shown: Callable[[float], str], kind: str = "") -> str:
    if figure is None:
        return "<td>–</td>"
    ends = f"{shown(figure.low)} to {shown(figure.high)}"
    return f'<td><span class="{kind}">{shown(figure.mean)}</span><small>{ends}</small></td>'


# Curves


def _curves(steps: Sequence[Mapping[str, Any]]) -> str:
    names = {key: label for key, label in CURVES.items() if any(key in row for row in steps)}
    if "length" in names:
        names.pop("completions/mean_length", None)
    signals = sorted({key for row in steps for key in row if key.startswith(SIGNALS)})
    names |= {key: f"Signal: {key.removeprefix(SIGNALS).replace('_', ' ')}" for key in signals}
    drawn = [(label, points) for key, label in names.items() if (points := _series(steps, key))]
    if not drawn:
        return ""
    cards = "".join(
        f'<figure class="card" style="margin:0"><div class="head"><h3>{clip(label, 60)}</h3>'
        f"<small>{_ends(points)}</small></div>{curve(points, label)}</figure>"
        for label, points in drawn
    )
    return (
        '<h2>Training</h2><p class="lead">One point a step, with a moving average in front. The reward is what was '
        f'trained on: its rise alone shows nothing.</p><div class="grid">{cards}</div>'
    )


def _ends(points: Sequence[Point]) -> str:
    """Where a curve starts and ends: of its moving average where there is one, for single steps are noise."""
    shown = smooth(points) if len(points) >= SMOOTHED_FROM else points
    return f"{_value(shown[0][1])} → {_value(shown[-1][1])}"


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has both as finite numbers, by step; the later of two rows for one step wins, as
    a run that was resumed logs some steps again."""
    found: dict[float, float] = {}
    for place, row in enumerate(steps, 1):
        step = row.get("step", place)
        if is_number(step) and is_number(row.get(key)):
            found[float(step)] = float(row[key])
    return sorted(found.items())


def _phases(steps: Sequence[Mapping[str, Any]]) -> str:
    """Mean seconds of each phase of a step."""
    keys = sorted({key for row in steps for key in row if key.startswith(SECONDS)})
    means = {key.removeprefix(SECONDS): _mean([y for _, y in _series(steps, key)]) for key in keys}
    speed = _series(steps, "tokens_per_second")
    parts = [
        f"<li>{clip(name, 40)} <b>{number(mean)} s</b></li>"
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]
    if speed:
        parts.append(f"<li>tokens per second <b>{number(_mean([y for _, y in speed]))}</b></li>")
    listed = f'<ul class="chips">{"".join(parts)}</ul>'
    return f'<h2>Where the time went</h2><p class="lead">Mean of a step.</p>{listed}' if parts else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# Samples


def _evaluation_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    shown = min(len(samples), EVALUATION_SAMPLES)
    # By lot, with a fixed seed: neither the best nor every tenth row, which may be all of one kind.
    picked = [samples[place] for place in sorted(random.Random(0).sample(range(len(samples)), shown))]
    cards = "".join(_sample(sample) for sample in picked)
    how = f"{shown} of {len(samples):,}, drawn by lot" if shown < len(samples) else f"All {shown}"
    return f'<h2>Before and after</h2><p class="lead">{how}. Greedy responses to the same prompts.</p>{cards}'


def _sample(sample: Mapping[str, Any]) -> str:
    answers = [answer for answer in _items(sample.get("answers")) if isinstance(answer, str)]
    tags = "".join(f' <span class="tag">{clip(str(sample[k]), 60)}</span>' for k in ("split", "kind") if k in sample)
    known = ", ".join(clip(answer, 200) for answer in answers[:5])
    expected = f'<p class="soft">Accepted: {known}</p>' if known else ""
    sides = "".join(
        _side(label, _string(sample[key]), answers)
        for key, label in (("before", "Before"), ("after", "After"))
        if sample.get(key) is not None
    )
    prompt = clip(_string(sample.get("prompt", "")))
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


def _training_samples(run: Run) -> str:
    blocks = []
    for title, rows in (("First", run.first), ("Last", run.last)):
        if rows:
            cards = "".join(_drawn(row) for row in rows)
            blocks.append(f"<details><summary>{title} {len(rows)} samples of training</summary>{cards}</details>")
    return "<h2>Sampled in training</h2>" + "".join(blocks) if blocks else ""


def _drawn(row: Mapping[str, Any]) -> str:
    signals = row.get("signals")
    scores = [("reward", row.get("reward")), *(signals.items() if isinstance(signals, dict) else ())]
    tags = " ".join(f'<span class="tag">{clip(k, 40)} {number(v)}</span>' for k, v in scores[:12] if is_number(v))
    return (
        f'<article class="card sample"><div class="head"><h3>Step {clip(str(row.get("step", "?")), 20)}</h3></div>'
        f'<p class="text soft" dir="auto">{clip(_string(row.get("prompt", "")))}</p>'
        f'<div class="sides">{_side("Response", _string(row.get("response", "")), [])}</div><p>{tags}</p></article>'
    )


def _settings(text: str) -> str:
    if not text:
        return ""
    return f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{clip(text, CONFIG_LIMIT)}</pre></details>"


def _footer(run: Run) -> str:
    lines = f" {run.unread} unreadable line{'s' * (run.unread > 1)} left out." if run.unread else ""
    return f"<footer>Written by adhere from the files of this run alone.{lines}</footer>"


# Numbers and texts


def _value(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if abs(value) < 1 else number(value)


def _signed(value: float) -> str:
    return f"+{_value(value)}" if value > 0 else _value(value)


def _p(p: float, alone: bool = False) -> str:
    text = f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"
    return text if alone or p < 0.001 else f"= {text}"


def _string(value: Any) -> str:
    """A text, or the messages of a chat one below the other."""
    if isinstance(value, list):
        return "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in value
        )
    return str(value)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
