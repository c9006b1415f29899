"""The view of an inspection as HTML: text shaded by attention; response tokens to point at, by mouse or keyboard.

A notebook is somebody else's page: every rule of the style and every query of the script is bound to the view's own id,
colours are see-through so that they do on light and dark, and nothing is fetched. Without scripts the mean stays shown.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources

from torch import Tensor

from adhere.markup import escape

PROMPT_DRAWN = 2_000
"""Prompt tokens drawn: half of them from either end where there are more."""
RESPONSE_DRAWN = 256
"""Response tokens drawn, the first ones; each has a row of `PROMPT_DRAWN` bytes in the view."""


def view(
    prompt: tuple[Sequence[str], Tensor],
    response: tuple[Sequence[str], Tensor],
    maps: Mapping[str, Tensor],
    logprobs: Tensor,
    figures: Mapping[str, float],
    nonce: str = "",
) -> str:
    """Tokens and which are special ([P] and [R] bool), attention maps [R, P], log-probs [R], figures → HTML.

    `nonce` marks the script for a page that runs none without it.
    """
    name = f"adhere-{secrets.token_hex(6)}"  # of this one view: the same object may be shown twice
    files = resources.files("adhere.inspection")
    style, script = (
        files.joinpath(file).read_text(encoding="utf-8").replace("VIEW", name) for file in ("view.css", "view.js")
    )
    (asked, special), (said, ended) = prompt, response
    count, rows = len(asked), min(len(said), RESPONSE_DRAWN)
    half = PROMPT_DRAWN // 2
    places = list(range(count)) if count <= PROMPT_DRAWN else [*range(half), *range(count - half, count)]
    first = next(iter(maps.values()))
    drawn = first[:, places]
    words = _words(asked, special, drawn.mean(0) if rows else drawn.sum(0), places)
    tokens = "".join(
        f'<button type="button" class="token{" special" if ended[row] else ""}" aria-pressed="false" '
        f'tabindex="{0 if row == 0 else -1}" data-logprob="{float(logprobs[row]):.2f}"'
        f">{_text(said[row])}</button>"
        for row in range(rows)
    )
    choices = "".join(
        f'<button type="button" class="map" aria-pressed="{str(number == 0).lower()}" '
        f'data-mass="{" ".join(f"{mass:.3f}" for mass in found[:rows].sum(-1).tolist())}" '
        f'data-cells="{cells(found[:rows, places])}">{escape(heads)}</button>'
        for number, (heads, found) in enumerate(maps.items())
    )
    chips = "".join(f"<span>{escape(label)} <b>{number_text(value)}</b></span>" for label, value in figures.items())
    notes = []
    if left := count - len(places):
        outside = float(first.sum(-1).mean() - drawn.sum(-1).mean())
        notes.append(f"{left:,} prompt tokens in the middle are not drawn; on average {outside:.0%} of a token's ")
        notes[-1] += "attention went there."
    if left := len(said) - rows:
        notes.append(f"The last {left:,} response tokens are not drawn.")
    mark = f' nonce="{escape(nonce)}"' if nonce else ""
    return (
        f'<div id="{name}" data-lm-suppress-shortcuts="true"><style>{style}</style>'
        f'<div class="figures">{chips}</div>'
        f'<div class="heads" role="group" aria-label="Attention of"{" hidden" * (len(maps) < 2)}>{choices}</div>'
        '<div class="name">Prompt</div>'
        f'<div class="text prompt" role="group" aria-label="Prompt" tabindex="0" dir="auto">{words}</div>'
        '<div class="name">Response <span>point at a token, or use the arrow keys, to see where it looked</span></div>'
        f'<div class="text response" role="group" aria-label="Response" dir="auto">{tokens}</div>'
        f'<div class="said" role="status" aria-live="polite"></div><div class="note">{" ".join(notes)}</div>'
        f"<script{mark}>{script}</script></div>"
    )


def cells(attention: Tensor) -> str:
    """Attention [r, p] in [0, 1] as base64 of a byte each, row by row: its fourth root, so that of a ten-thousandth
    there is still a sign (± 8 %), and of a half two figures (± 1 %)."""
    bytes_ = (attention.float().clamp(0, 1) ** 0.25 * 255).round().byte().contiguous().cpu().numpy().tobytes()
    return base64.b64encode(bytes_).decode("ascii")


def number_text(value: float) -> str:
    """Three figures, with a true minus.

    >>> number_text(-0.12345)
    '−0.123'
    """
    return f"{value:.3g}".replace("-", "−")


def _words(tokens: Sequence[str], special: Tensor, mean: Tensor, places: Sequence[int]) -> str:
    """The prompt tokens at `places`, shaded by `mean` ([places]) relative to the most attended of the user's own."""
    own = mean[~special[places]]
    top = float(own.max()) if len(own) else 0.0
    parts, before = [], -1
    for place, value in zip(places, mean.tolist(), strict=True):
        if place != before + 1:
            parts.append(f'<span class="gap"> … {place - before - 1:,} tokens … </span>')
        before = place
        shade = min(1.0, value / top) if top > 0 else 0.0
        kind = " special" if special[place] else ""
        parts.append(f'<span class="token{kind}" style="--shade:{shade:.3g}">{_text(tokens[place])}</span>')
    return "".join(parts)


def _text(token: str) -> str:
    """A token's text; what would leave nothing to shade is given a sign."""
    return escape(token).replace("\n", "↵\n").replace("\t", "⇥\t") or "▯"
