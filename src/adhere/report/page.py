"""The page of a run: did training help, how did it go, what does the policy say now. Reads a run directory, never a
live object, so it can be written again later, and for a run that was broken off.

    config.yaml     the resolved settings                      metrics.jsonl   a row a step
    samples.jsonl   what was sampled in training, optional     results.json    an `Evaluation.to_json`, optional
    origin.json     commands and versions, optional            attention.json  a changed answer, inspected, optional
    audit-before.json  the audit before training, optional
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, NamedTuple

from adhere.files import atomic_write
from adhere.report import results, samples, training, verdict
from adhere.report.markup import clip, document, escape
from adhere.report.run import Run, read_run

CONFIG_LIMIT = 20_000
"""Characters of config.yaml shown."""


class Section(NamedTuple):
    """A part of the page that the contents name."""

    anchor: str
    title: str
    body: str
    """HTML; a section without any is left out."""


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `run_dir` to `out` (default: `run_dir/report.html`) and return where it is.

    The page is one file without external resources; its only script shows attention, where the run has kept some. At
    most 500 points of a curve, 51 samples and 2,000 characters of a text are shown. Lines of the logs that cannot be
    read are left out, and the page says how many.

    Raises `UserError` as `adhere.report.run.read_run` does.
    """
    page = _page(read_run(run_dir))
    out = out or run_dir / "report.html"
    atomic_write(out, page)
    return out


def _page(run: Run) -> str:
    title = f"Run {run.name}"
    nonce = secrets.token_urlsafe(12) if run.attention else ""
    tables = results.table(run.findings) + "".join(results.group_table(run, name) for name in run.groups)
    sections = [
        Section("results", "Results", tables and tables + results.downloads(run)),
        Section("samples", "Before and after", samples.evaluation_samples(run.samples)),
        Section("training", "Training", training.curves(run.steps)),
        Section("audit", "Audit of the reward", _audit(run.audit)),
        Section("sampled", "Sampled in training", samples.training_samples(run)),
        Section("time", "Where the time went", training.phases(run.steps)),
        Section("made", "How it was made", _made(run)),
    ]
    kept = [section for section in sections if section.body]
    parts = [
        f"<header><h1>{escape(title)}</h1>{verdict.chips(run)}</header>",
        verdict.verdict(run),
        verdict.cards(run.findings),
        verdict.changed(run, nonce),
        _contents(kept),
        *(f'<section id="{one.anchor}"><h2>{one.title}</h2>{one.body}</section>' for one in kept),
        _footer(run),
    ]
    return document(f"{title} · adhere", "\n".join(part for part in parts if part), nonce)


def _contents(sections: list[Section]) -> str:
    links = "".join(f'<li><a href="#{one.anchor}">{one.title}</a></li>' for one in sections)
    return f'<nav aria-label="Contents"><ul class="chips">{links}</ul></nav>' if links else ""


def _audit(audit: dict[str, Any] | None) -> str:
    if audit is None:
        return ""
    tone, word = ("bad", "It can be gamed.") if audit["gameable"] else ("good", "It withstood the audit.")
    return (
        f'<p class="lead">Before training, degenerate responses were put beside the model’s own samples, on '
        f"{clip(str(audit['prompts']), 20)} prompts.</p>"
        f'<div class="card verdict {tone}"><strong>{word}</strong><p>{clip(str(audit["verdict"]))}</p></div>'
    )


def _made(run: Run) -> str:
    """Commands, seeds and versions, and every setting."""
    commands = "".join(f"<pre>{clip(command)}</pre>" for command in run.commands)
    seeds = {"seed": run.config.get("seed"), "seed of the evaluation": run.evaluated.get("seed")}
    known = {**{name: seed for name, seed in seeds.items() if seed is not None}, **run.versions}
    chips = "".join(f"<li>{escape(name)} <b>{clip(str(value), 60)}</b></li>" for name, value in known.items())
    config = ""
    if run.config_text:
        config = f"<details><summary>config.yaml</summary><pre>{clip(run.config_text, CONFIG_LIMIT)}</pre></details>"
    return commands + (f'<ul class="chips made">{chips}</ul>' if chips else "") + config


def _footer(run: Run) -> str:
    lines = f" {run.unread} unreadable line{'s' * (run.unread > 1)} left out." if run.unread else ""
    return f"<footer>Written by adhere from the files of this run alone.{lines}</footer>"
