"""One response as the view draws it: tokens joined to words, long texts cut, attention where it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adhere.inspection.tokens import words_of

PROMPT_DRAWN = 2_000
"""Prompt tokens drawn: half of them from either end where there are more."""
RESPONSE_DRAWN = 300
"""Response tokens drawn, the first ones."""
SINK = 0.3
"""Mean attention from which on the first token is a sink (Gu et al. 2024, arXiv 2410.10781, ε)."""


@dataclass(frozen=True)
class Passage:
    """A sentence of the context, and how much of the attention to the context it got."""

    start: int
    """Its first prompt token."""
    stop: int
    """The token after its last."""
    share: float
    """In [0, 1], of what all sentences got."""
    text: str


@dataclass(frozen=True)
class Heads:
    """Where single heads looked."""

    scores: Tensor
    """[L, H] float32 in [0, 1]: the copy score of every head."""
    kept: Tensor
    """[n, 2] int64: layer and head of those whose attention is here."""
    places: Tensor
    """[n, R, k] int64: of each response token, the k prompt tokens that it looked at most; words of the user alone."""
    values: Tensor
    """[n, R, k] float32: the attention to them."""


@dataclass(frozen=True)
class Word:
    """A word of the prompt or the response."""

    text: str
    tokens: int
    special: bool
    """No word of the user, or an attention sink: it takes no part in shades and lists unless that is asked for."""


@dataclass(frozen=True)
class Panel:
    """What is drawn: r response tokens and p prompt tokens of it."""

    label: str
    prompt: tuple[Word, ...]
    response: tuple[Word, ...]
    maps: Mapping[str, Tensor]
    """[r, p], the one that is shown first at first."""
    mass: Mapping[str, list[float]]
    """By map, the attention of each response token to the whole prompt."""
    tracks: Mapping[str, list[float]]
    """Figures of each response token."""
    heads: Heads | None
    """With places among the tokens that are drawn."""
    passages: tuple[tuple[int, int, float], ...]
    """First word, the word after the last, and share."""
    gap: tuple[int, int]
    """How many tokens are left out, and the word before which; 0 where none are."""
    notes: tuple[str, ...]
    """What is not drawn."""
    figures: Mapping[str, float]

    @property
    def mean(self) -> list[float]:
        """Attention to each word of the prompt, the mean over response tokens, by the first map."""
        first = next(iter(self.maps.values()))
        columns = first.mean(0) if len(first) else first.sum(0)
        return [float(part.sum()) for part in columns.split([word.tokens for word in self.prompt])]


def drawn(
    label: str,
    prompt: tuple[Sequence[str], Tensor],
    response: tuple[Sequence[str], Tensor],
    maps: Mapping[str, Tensor],
    tracks: Mapping[str, Tensor],
    heads: Heads | None,
    passages: Sequence[Passage],
    figures: Mapping[str, float],
) -> Panel:
    """Tokens and which are special ([P] and [R] bool), attention maps [R, P], figures of each response token [R]."""
    (asked, special), (said, ended) = prompt, response
    count, rows = len(asked), min(len(said), RESPONSE_DRAWN)
    half = PROMPT_DRAWN // 2
    ends = [range(count)] if count <= PROMPT_DRAWN else [range(half), range(count - half, count)]
    places = torch.tensor([place for part in ends for place in part], dtype=torch.long)
    first = next(iter(maps.values()))
    words = [_words([asked[place] for place in part], special[list(part)].tolist()) for part in ends]
    whole = [word for part in words for word in part]
    starts = [0]
    for word in whole:
        starts.append(starts[-1] + word.tokens)
    begins = places[torch.tensor(starts[:-1], dtype=torch.long)]
    notes = []
    if left := count - len(places):
        outside = float(first.sum(-1).mean() - first[:, places].sum(-1).mean())
        notes.append(
            f"{left:,} prompt tokens in the middle are not drawn; on average {outside:.0%} of a token's attention went "
            "there."
        )
    if unsaid := len(said) - rows:
        notes.append(f"The last {unsaid:,} response tokens are not drawn.")
    return Panel(
        label,
        tuple(whole),
        _words(said[:rows], ended[:rows].tolist()),
        {name: found[:rows][:, places] for name, found in maps.items()},
        {name: found[:rows].sum(-1).tolist() for name, found in maps.items()},
        {name: values[:rows].tolist() for name, values in tracks.items()},
        None if heads is None else _redrawn(heads, places, rows, count),
        tuple(_within(passage, begins) for passage in passages),
        (left, len(words[0])),
        tuple(notes),
        figures,
    )


def sinks(attention: Tensor, special: Tensor) -> Tensor:
    """[P] bool: special tokens, and the first one where all heads, on average, put `SINK` of their attention on it.

    `attention` [R, P] over all heads, `special` [P] bool.
    """
    found = special.clone()
    if len(attention) and len(found) > 1:
        found[0] |= attention[:, 0].mean() > SINK
    return found


def _words(texts: Sequence[str], special: Sequence[bool]) -> tuple[Word, ...]:
    words, start = [], 0
    for size in words_of(texts, special):
        words.append(Word("".join(texts[start : start + size]), size, bool(special[start])))
        start += size
    return tuple(words)


def _within(passage: Passage, begins: Tensor) -> tuple[int, int, float]:
    """The words whose first token is of the passage; `begins` [words] ascends."""
    first, last = torch.searchsorted(begins, torch.tensor([passage.start, passage.stop])).tolist()
    return first, last, passage.share


def _redrawn(heads: Heads, places: Tensor, rows: int, count: int) -> Heads:
    """Heads with their places counted among the `places` that are drawn; what fell outside gets no attention."""
    where = torch.full((count,), -1)
    where[places] = torch.arange(len(places))
    moved = where[heads.places[:, :rows]]
    values = heads.values[:, :rows].masked_fill(moved < 0, 0.0)
    return Heads(heads.scores, heads.kept, moved.clamp(min=0), values)
