"""The first screen of a run's page: what came of it, five figures, and one prompt whose answer changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adhere.inspection.html import view
from adhere.inspection.inspection import COPY
from adhere.report.curves import number
from adhere.report.markup import clip, escape
from adhere.report.run import Finding, Run
from adhere.report.samples import card, drawn_sample
from adhere.report.shown import p_text, signed, value_text
from adhere.report.training import series

# The first of these with a difference to the baseline decides the headline: what is right before what is related.
HEADLINE = ("exact_match", "f1", "rouge_l", "faithfulness", "relevance", "relevance_words")
FIGURES = 5
CARDS = ("faithfulness", "relevance", "relevance_words", "consistency", "repetition", "length", "kl")
# A fall of the mean length to less than this share of the start is pointed out: it is how a reward is usually gamed.
SHORT = 0.7
# Settings named at the top of the page, wherever config.yaml keeps them.
SETTINGS = ("model", "algorithm", "reward", "steps", "num_samples", "seed")


def chips(run: Run) -> str:
    """What was run, in a few words."""
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


def verdict(run: Run) -> str:
    """Whether training helped, and what it cost."""
    first = headline(run.findings)
    if first is None or first.difference is None:
        return f'<section class="card verdict">{_unmeasured(run)}</section>'
    word = {"up": "Training helped.", "down": "Training did harm."}.get(first.kind, "No clear change.")
    tone = {"up": "good", "down": "bad"}.get(first.kind, "")
    others = [found for name, found in run.findings.items() if name != first.name]
    notes = [f"{_sentence(found)}." for found in others if found.kind == "down"]
    notes += _shortened(run.findings) + _warned(run.audit)
    for field, groups in run.groups.items():
        notes += [
            f"On {escape(field)} “{clip(name, 80)}”: {_sentence(found)}."
            for name, findings in groups.items()
            if (found := findings.get(first.name)) is not None and found.kind == "down"
        ]
    if tone == "good" and notes:
        word = "Training helped, at a price."
    listed = f"<ul>{''.join(f'<li>{note}</li>' for note in notes[:8])}</ul>" if notes else ""
    return f'<section class="card verdict {tone}"><strong>{word}</strong><p>{_sentence(first)}.</p>{listed}</section>'


def _unmeasured(run: Run) -> str:
    if run.findings:
        return (
            "<strong>Nothing to compare with.</strong><p>The evaluation had no baseline, so it cannot tell what "
            "training changed.</p>"
        )
    reward = series(run.steps, "reward")
    said = f"The reward went from {number(reward[0][1])} to {number(reward[-1][1])}. " if reward else ""
    return (
        f"<strong>Not evaluated.</strong><p>{said}The reward is what was trained on, and can rise while answers "
        "get worse: only an evaluation against the start tells.</p>"
    )


def headline(findings: Mapping[str, Finding]) -> Finding | None:
    """The metric that decides the verdict."""
    return next((findings[n] for n in HEADLINE if n in findings and findings[n].difference is not None), None)


def _sentence(finding: Finding) -> str:
    before, after, difference = finding.before, finding.after, finding.difference
    assert before is not None and after is not None and difference is not None
    verb = {1: "rose", -1: "fell"}.get(finding.moved, "went")
    p = "" if finding.p is None else f", p {p_text(finding.p)}"
    return (
        f"{escape(finding.metric.label)} {verb} from {value_text(before.mean)} to {value_text(after.mean)}: "
        f"{signed(difference.mean)} on the same {difference.n:,} prompts "
        f"(95 % interval {signed(difference.low)} to {signed(difference.high)}{p})"
    )


def _shortened(findings: Mapping[str, Finding]) -> list[str]:
    length = findings.get("length")
    if length is None or length.before is None or length.after is None or length.moved >= 0:
        return []
    if length.after.mean >= SHORT * length.before.mean:
        return []
    return [f"{_sentence(length)}. Shorter answers are often how a reward is gamed: read some below."]


def _warned(audit: Mapping[str, Any] | None) -> list[str]:
    if audit is None or not audit["gameable"]:
        return []
    return [f"The audit before training warned: {clip(str(audit['verdict']), 400)}"]


def changed(run: Run, nonce: str) -> str:
    """One prompt whose answer changed, by lot: with the attention of both models where the run kept it."""
    if run.attention:
        panels = [inspection.panel(when.capitalize()) for when, inspection in run.attention.items()]
        heads = (
            "the copy heads, measured on the model before,"
            if any(COPY in each.maps for each in panels)
            else "all heads"
        )
        what = f"The bluer a word of the prompt, the more {heads} read it; point at a word to see more."
        shown = f'<section class="card sample">{view(panels, nonce)}</section>'
    else:
        sample = drawn_sample(run.samples)
        if sample is None:
            return ""
        what, shown = "Greedy answers to the same prompt.", card(sample)
    return f'<h2>One answer that changed</h2><p class="lead">Drawn by lot among those that changed. {what}</p>{shown}'


def cards(findings: Mapping[str, Finding]) -> str:
    """Five figures, with what they were before."""
    first = headline(findings)
    names = [first.name] if first else [name for name in HEADLINE[:1] if name in findings]
    names += [name for name in CARDS if name in findings and name not in names]
    shown = "".join(_card(findings[name]) for name in names[:FIGURES])
    return f'<section class="grid small">{shown}</section>' if shown else ""


def _card(finding: Finding) -> str:
    if finding.after is None:
        return ""
    change = ""
    if finding.before is not None and finding.difference is not None:
        by = f'<span class="{finding.kind}">{signed(finding.difference.mean)}</span>'
        change = f'<div class="soft">from {value_text(finding.before.mean)} ({by})</div>'
    label = escape(finding.metric.label)
    return f'<div class="card"><h3>{label}</h3><div class="big">{value_text(finding.after.mean)}</div>{change}</div>'
