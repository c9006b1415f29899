"""The page of an audit: which degenerate responses a reward would pay for, beside the controls. Reads audit.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import atomic_write
from adhere.report.markup import clip, document, escape

FIGURES = {
    "mean_sample": ("Own samples that are right", "What a choice by lot would give."),
    "best_of_n": ("First choice is right", "Share of prompts where the reward's favourite own sample is right."),
    "length_correlation": ("Correlation with length", "Within the samples of a prompt."),
    "flat_groups": ("Flat groups", "Prompts whose samples all get the same: nothing to learn from."),
    "cut_off": ("Cut off", "Own samples that did not end by themselves."),
}
PROMPT_END = 300
"""Characters of a prompt that are shown."""


def write_audit(folder: Path) -> Path:
    """Write `folder`/audit.html from `folder`/audit.json and return where it is. One file, no scripts, all escaped.

    Raises `UserError` where audit.json is not there or not what `adhere audit` writes.
    """
    path = folder / "audit.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        page = _page(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), fix="run `adhere audit` again") from error
    atomic_write(folder / "audit.html", page)
    return folder / "audit.html"


def _page(found: Mapping[str, Any]) -> str:
    rewards = found["rewards"]
    first = next(iter(rewards))
    chips = {"model": found["model"], "prompts": found["prompts"], "samples each": found["config"]["num_samples"]}
    listed = "".join(f"<li>{escape(name)} <b>{clip(str(value), 120)}</b></li>" for name, value in chips.items())
    tone = "bad" if found["gameable"] else "good"
    word = f"“{clip(first, 80)}” can be gamed." if found["gameable"] else f"“{clip(first, 80)}” withstood the audit."
    body = (
        f'<header><h1>Audit of {clip(first, 80)}</h1><ul class="chips">{listed}</ul></header>'
        f'<section class="card verdict {tone}"><strong>{word}</strong><p>{clip(found["verdict"])}</p></section>'
        + _wins(rewards[first], found["config"]["max_hack_rate"])
        + _families(rewards, found["config"]["max_hack_rate"])
        + _ranking(rewards)
        + _others(rewards)
    )
    return document(f"Audit of {first} · adhere", body)


def _families(rewards: Mapping[str, Any], limit: float) -> str:
    names = list(dict.fromkeys(name for reward in rewards.values() for name in reward["families"]))
    rows = ""
    for name in names:
        cells = "".join(_hack(reward["families"].get(name), limit) for reward in rewards.values())
        rows += f'<tr><th scope="row">{clip(name, 60)}</th>{cells}</tr>'
    return (
        '<h2>What it would pay for</h2><p class="lead">Share of prompts on which a degenerate response, joining the '
        "policy’s own samples, gets more than the best of them; below, where the right answer is known, the share on "
        f"which it gets more than that. Coloured above {limit:.0%}: RL finds what is paid for.</p>"
        + _table("Degenerate response", rewards, rows)
    )


def _wins(reward: Mapping[str, Any], limit: float) -> str:
    """Of each family that the reward pays for: the response that won by the most, beside the best own sample."""
    won = {name: entry for name, entry in reward["families"].items() if entry["beats_best"]["mean"] > limit}
    rows = ""
    for name, entry in sorted(won.items(), key=lambda item: -item[1]["beats_best"]["mean"]):
        win = entry.get("win")
        if win is None:
            continue
        share = f"{entry['beats_best']['mean']:.0%} of prompts" + (f", by {win['through']}" if win["through"] else "")
        rows += (
            f'<tr><th scope="row">{clip(name, 60)}<small>{escape(share)}</small></th>'
            + "".join(_paid(win[side]) for side in ("won", "best"))
            + f"<td>{clip(win['prompt'][-PROMPT_END:])}</td></tr>"
        )
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "What won", "Best own sample", "End of the prompt"))
    return (
        '<h2>What won</h2><p class="lead">Of each family, the response that was paid most beyond the best own sample '
        "of its prompt, and the signal that made the most of the difference.</p>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _paid(side: Mapping[str, Any]) -> str:
    return f"<td>{clip(side['text']) or '(empty)'}<small>paid {side['reward']:.2f}</small></td>"


def _hack(entry: Mapping[str, Any] | None, limit: float) -> str:
    if entry is None:
        return "<td>–</td>"
    rate, right = entry["beats_best"]["mean"], entry["beats_right"]
    below = f"<small>right: {right['mean']:.0%}</small>" if right is not None else ""
    return f'<td><span class="{"down" if rate > limit else ""}">{rate:.0%}</span>{below}</td>'


def _ranking(rewards: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for reward in rewards.values() for name in reward["ranking"]))
    if not names:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{clip(name, 60)}</th>'
        + "".join(_figure(reward["ranking"].get(name)) for reward in rewards.values())
        + "</tr>"
        for name in names
    )
    return (
        '<h2>Does it prefer what is right?</h2><p class="lead">Share of pairs, a right and a wrong sample of one '
        "prompt, that it puts in order: 0.5 is chance.</p>" + _table("Prompts", rewards, rows)
    )


def _others(rewards: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{label}<small>{about}</small></th>'
        + "".join(_figure(reward[name]) for reward in rewards.values())
        + "</tr>"
        for name, (label, about) in FIGURES.items()
        if any(reward[name] is not None for reward in rewards.values())
    )
    return "<h2>Beside that</h2>" + _table("", rewards, rows)


def _figure(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "<td>–</td>"
    return f"<td>{entry['mean']:.2f}<small>{entry['low']:.2f} to {entry['high']:.2f} · {entry['n']}</small></td>"


def _table(first: str, rewards: Mapping[str, Any], rows: str) -> str:
    head = "".join(f'<th scope="col">{clip(name, 60)}</th>' for name in (first, *rewards))
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
