"""The view of an inspection as HTML: text shaded by attention, to be pointed at from either side; strips, maps, heads.

A notebook is somebody else's page: every rule of the style and every query of the script is bound to the view's own id,
colours are see-through so that they do on light and dark, and nothing is fetched. Without scripts the mean stays shown.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any

from adhere.inspection.packing import packed, packed_places
from adhere.inspection.panel import Panel, Word
from adhere.markup import escape

FINE_CELLS = 200_000
"""Cells of a view that two digits each are spent on; of more, one."""
SCRIPTS = ("cells.js", "canvas.js", "view.js")


def view(panels: Sequence[Panel], nonce: str = "") -> str:
    """One response, or several side by side on one colour scale. `nonce` marks the script for a page that runs none
    without it."""
    name = f"adhere-{secrets.token_hex(6)}"  # of this one view: the same object may be shown twice
    style = _file("view.css").replace("VIEW", name)
    script = "".join(map(_file, SCRIPTS)).replace("VIEW", name)
    mark = f' nonce="{escape(nonce)}"' if nonce else ""
    maps = list(dict.fromkeys(heads for panel in panels for heads in panel.maps))
    choices = "".join(_choice(heads, number == 0) for number, heads in enumerate(maps))
    cells = sum(found.numel() for panel in panels for found in panel.maps.values())
    digits = 2 if cells <= FINE_CELLS else 1
    drawn = "".join(_panel(panel, digits) for panel in panels)
    return (
        f'<div id="{name}" class="inspection" data-lm-suppress-shortcuts="true"><style>{style}</style>'
        f'<div class="bar scripted"><span class="maps" role="group" aria-label="Attention of">{choices}</span>'
        '<button type="button" class="sinks" aria-pressed="false" title="Special and template tokens, and a first '
        'token that takes most of the attention whatever is said">Attention sinks</button>'
        '<span class="legend" title="The colour scale, the same wherever it is used in this view">'
        "<i></i><span></span></span></div>"
        f'<div class="panels">{drawn}</div>'
        f'<script{mark}>(() => {{\n"use strict";\n{script}}})();</script></div>'
    )


def number_text(value: float) -> str:
    """Three figures, with a true minus.

    >>> number_text(-0.12345)
    '−0.123'
    """
    return f"{value:.3g}".replace("-", "−")


def _file(name: str) -> str:
    return resources.files("adhere.inspection").joinpath(name).read_text(encoding="utf-8")


def _choice(heads: str, pressed: bool) -> str:
    state = str(pressed).lower()
    return (
        f'<button type="button" class="map" aria-pressed="{state}" data-map="{escape(heads)}">{escape(heads)}</button>'
    )


def _panel(panel: Panel, digits: int) -> str:
    chips = "".join(f"<span>{escape(name)} <b>{number_text(value)}</b></span>" for name, value in panel.figures.items())
    label = f'<h3 class="label">{escape(panel.label)}</h3>' if panel.label else ""
    lanes = "".join(
        f'<div class="lane"><span>{escape(name)}<small></small></span><canvas data-track="{escape(name)}" '
        'aria-hidden="true"></canvas></div>'
        for name in panel.tracks
    )
    heads = "" if panel.heads is None else _heads(*panel.heads.scores.shape)
    return (
        f'<div class="panel" data-panel="{escape(_data(panel, digits))}">{label}<div class="figures">{chips}</div>'
        '<div class="name">Prompt <span class="scripted">point at a word to see which words of the response read it'
        "</span></div>"
        f'<div class="text prompt" role="group" aria-label="Prompt" dir="auto">{_prompt(panel)}</div>'
        '<div class="name">Response <span class="scripted">point at a word, or use the arrow keys, to see where it '
        "looked</span></div>"
        f'<div class="text response" role="group" aria-label="Response" dir="auto">'
        f"{''.join(_word(word) for word in panel.response)}</div>"
        '<div class="said scripted" role="status" aria-live="polite"></div>'
        f'<div class="strip scripted">{lanes}</div><div class="note">{escape(" ".join(panel.notes))}</div>'
        '<details class="cells scripted"><summary>Token by token</summary><p class="hint">A row is a response token, a '
        'column a prompt token. Point at a cell, or focus the map and use the arrow keys.</p><div class="grid">'
        '<canvas tabindex="0" role="img" aria-label="Attention, response tokens by prompt tokens"></canvas>'
        f'<i class="row"></i><i class="column"></i></div></details>{heads}</div>'
    )


def _heads(layers: int, heads: int) -> str:
    return (
        f'<details class="heads scripted"><summary>Head by head ({layers} layers × {heads})</summary><p class="hint">'
        "A row is a layer; the frame of a head is as strong as its copy score. Choose one to see it above.</p>"
        f'<div class="thumbs" role="group" aria-label="Heads, a row a layer"></div></details>'
    )


def _prompt(panel: Panel) -> str:
    """The words of the prompt, shaded by the mean relative to the most attended of the user's own; passages marked."""
    mean = panel.mean
    top = max((value for value, word in zip(mean, panel.prompt, strict=True) if not word.special), default=0.0)
    opens = {first: share for first, last, share in panel.passages if last > first}
    closes = {last: share for first, last, share in panel.passages if last > first}
    left, where = panel.gap
    parts = []
    for place, (word, value) in enumerate(zip(panel.prompt, mean, strict=True)):
        if place in closes:
            parts.append(_closed(closes[place]))
        if left and place == where:
            parts.append(f'<span class="gap"> … {left:,} tokens … </span>')
        if place in opens:
            parts.append(f'<span class="passage" style="--share:{opens[place]:.2f}">')
        parts.append(_word(word, min(1.0, value / top) ** 0.5 if top > 0 and not word.special else 0.0))
    return "".join(parts) + (_closed(closes[len(panel.prompt)]) if len(panel.prompt) in closes else "")


def _closed(share: float) -> str:
    return f'</span><small class="share" title="share of the attention to the context">{share:.0%}</small>'


def _word(word: Word, shade: float = 0.0) -> str:
    kind = " special" if word.special else ""
    style = f' style="--shade:{shade:.2f}"' if shade >= 0.005 else ""
    bare = word.text.lstrip(" ") or word.text  # the blank before a word is no part of it to be shaded
    before = word.text[: len(word.text) - len(bare)]
    return f'{before}<span class="word{kind}"{style}>{_text(bare)}</span>'


def _text(token: str) -> str:
    """A token's text; what would leave nothing to shade is given a sign."""
    return escape(token).replace("\n", "↵\n").replace("\t", "⇥\t") or "▯"


def _data(panel: Panel, digits: int) -> str:
    """The numbers behind a panel, as JSON."""
    told: dict[str, Any] = {
        "prompt": [word.tokens for word in panel.prompt],
        "response": [word.tokens for word in panel.response],
        "digits": digits,
        "maps": {name: packed(found, digits) for name, found in panel.maps.items()},
        "mass": {name: [round(value, 3) for value in values] for name, values in panel.mass.items()},
        "tracks": {name: [round(value, 3) for value in values] for name, values in panel.tracks.items()},
    }
    if panel.heads is not None:
        heads = panel.heads
        told["heads"] = {
            "shape": list(heads.scores.shape),
            "scores": [round(score, 3) for score in heads.scores.flatten().tolist()],
            "kept": [layer * heads.scores.shape[1] + head for layer, head in heads.kept.tolist()],
            "count": heads.places.shape[-1],
            "places": packed_places(heads.places),
            "values": packed(heads.values, digits),
        }
    return json.dumps(told, separators=(",", ":"))
