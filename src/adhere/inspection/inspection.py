"""What the model looked at while it answered: tokens, attention, figures, and how they show themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adhere.inspection.html import view
from adhere.inspection.packing import packed, unpacked
from adhere.inspection.panel import Heads, Panel, Passage, drawn, sinks
from adhere.inspection.tokens import token_texts
from adhere.markup import visible
from adhere.types import Reading

ALL, COPY = "all heads", "copy heads"
DIGITS = 2
"""Of a packed cell in JSON."""
TEXT_TOKENS, TEXT_CHARACTERS = 20, 600
"""Response tokens, and characters of a text, that a terminal is shown."""


@dataclass(frozen=True, repr=False, eq=False)
class Inspection:
    """One prompt (P tokens, without padding), one response (R tokens), and the attention between them, on the CPU.

    A notebook shows it as text to point at, `print` as a table, `html()` gives the same view for a page.
    """

    prompt_tokens: tuple[str, ...]
    """The prompt cut at its tokens: joined, they are what the model read."""
    response_tokens: tuple[str, ...]
    """The response cut at its tokens, the one that ends it included."""
    prompt_special: Tensor
    """[P] bool: True = a special or template token, system text or an earlier turn: not what the response is about."""
    response_special: Tensor
    """[R] bool: True = a special token."""
    maps: Mapping[str, Tensor]
    """Attention of each response token to the prompt, [R, P] float32: over `all heads`, and over the `copy heads`
    where those are known. A row sums to 1 or less: the rest went to the response itself."""
    logprobs: Tensor
    """[R] float32, log-prob of each response token, nats."""
    figures: Mapping[str, float]
    """What is said of the response as a whole."""
    tracks: Mapping[str, Tensor] = field(default_factory=dict)
    """More of each response token, [R] float32: `grounding` and `drop` where the copy heads are known."""
    passages: tuple[Passage, ...] = ()
    """The sentences of the context that the response was read from, in the order of the prompt."""
    heads: Heads | None = None
    """Where single heads looked."""

    @classmethod
    def of(cls, reading: Reading, tokenizer: Any, figures: Mapping[str, float] | None = None) -> Inspection:
        """From a reading of one response, with attention; `figures` come after those of `Inspection.figures_of`."""
        assert len(reading.rollout) == 1 and reading.attention is not None
        asked, said = reading.prompt_mask[0], reading.response_mask[0]
        ids, answer = reading.prompt_ids[0, asked].tolist(), reading.response_ids[0, said].tolist()
        known = set(tokenizer.all_special_ids)
        template = ~reading.rollout.prompts.current[reading.rollout.prompt_index][0, asked].cpu()
        special = template | torch.tensor([token in known for token in ids])
        captured = {ALL: reading.attention, COPY: reading.copy_attention}
        maps = {name: found[0][said][:, asked].cpu() for name, found in captured.items() if found is not None}
        logprobs = reading.logprobs[0, said].cpu()
        return cls(
            token_texts(tokenizer, ids),
            token_texts(tokenizer, answer),
            special,
            torch.tensor([token in known for token in answer], dtype=torch.bool),
            maps,
            logprobs,
            {**cls.figures_of(maps[ALL], special, logprobs), **(figures or {})},
        )

    @staticmethod
    def figures_of(attention: Tensor, special: Tensor, logprobs: Tensor) -> dict[str, float]:
        """Means over the response tokens, from [R, P], [P] bool and [R].

        `log-prob` in nats; `on the prompt`, the attention that went there rather than to the response; `coverage`, the
        part of it on the user's own words; `focus`, how sharp it is among them: 1 = one token, 0 = evenly spread.
        The last two are the signals of these names with `salience: all`.
        """
        own = attention[:, ~special]
        mass = own.sum(-1, keepdim=True)
        share = own / torch.where(mass > 0, mass, 1.0)
        size = max(2, own.shape[1])  # over a single token there is nothing to focus: entropy 0 is told as focus 0
        spread = torch.where(mass[:, 0] > 0, -torch.xlogy(share, share).sum(-1) / torch.tensor(size).log(), 1.0)
        focus = 1.0 - spread.clamp(0.0, 1.0) if own.shape[1] > 1 else torch.zeros_like(spread)
        rows = {"log-prob": logprobs, "on the prompt": attention.sum(-1), "coverage": mass[:, 0], "focus": focus}
        return {name: float(row.mean()) if len(row) else 0.0 for name, row in rows.items()}

    @property
    def attention(self) -> Tensor:
        """[R, P] float32, over all heads."""
        return self.maps[ALL]

    @property
    def prompt(self) -> str:
        """What the model read, special tokens written out."""
        return "".join(self.prompt_tokens)

    @property
    def response(self) -> str:
        """What was answered, special tokens written out."""
        return "".join(self.response_tokens)

    def most_attended(self, token: int, count: int = 3, heads: str = ALL) -> list[tuple[int, float]]:
        """The places of the user's own words that response token `token` looked at most, with its attention to each."""
        row = self.maps[heads][token].masked_fill(self.prompt_special, 0.0)
        found = row.topk(min(count, len(row)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(place, value) for place, value in pairs if value > 0]

    def html(self, nonce: str = "") -> str:
        """The view as a piece of HTML that brings its own style and script, without network or global effect.

        `nonce` lets the script run on a page that allows none but those with it.
        """
        return view([self.panel()], nonce)

    def panel(self, label: str = "") -> Panel:
        """What a view draws of it: the copy heads first, where they are known."""
        special = sinks(self.attention, self.prompt_special)
        maps = {name: self.maps[name] for name in (COPY, ALL) if name in self.maps}
        tracks = {"log-prob": self.logprobs, **self.tracks}
        asked, said = (self.prompt_tokens, special), (self.response_tokens, self.response_special)
        return drawn(label, asked, said, maps, tracks, self.heads, self.passages, self.figures)

    def to_json(self) -> dict[str, Any]:
        """All but single heads, to be kept beside a run; attention is packed, right to 0.12 % of itself."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "prompt_special": self.prompt_special.tolist(),
            "response_special": self.response_special.tolist(),
            "maps": {name: packed(found, DIGITS) for name, found in self.maps.items()},
            "logprobs": self.logprobs.tolist(),
            "figures": dict(self.figures),
            "tracks": {name: values.tolist() for name, values in self.tracks.items()},
            "passages": [asdict(passage) for passage in self.passages],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Inspection:
        """What `to_json` made. Raises `ValueError`, `TypeError` or `LookupError` for anything else."""
        asked, said = tuple(map(str, told["prompt_tokens"])), tuple(map(str, told["response_tokens"]))
        rows = {"logprobs": told["logprobs"], **told["tracks"]}
        tracks = {str(name): torch.tensor(values, dtype=torch.float) for name, values in rows.items()}
        special, ends = (torch.tensor(told[f"{side}_special"], dtype=torch.bool) for side in ("prompt", "response"))
        if len(special) != len(asked) or any(len(each) != len(said) for each in (ends, *tracks.values())):
            raise ValueError("figures of another number of tokens")
        shape = (len(said), len(asked))
        maps = {str(name): unpacked(text, DIGITS, shape) for name, text in told["maps"].items()}
        passages = tuple(Passage(**passage) for passage in told["passages"])
        figures = {str(name): float(value) for name, value in told["figures"].items()}
        if ALL not in maps or any(not 0 <= one.start < one.stop <= len(asked) for one in passages):
            raise ValueError("no attention over all heads, or passages outside the prompt")
        return cls(asked, said, special, ends, maps, tracks.pop("logprobs"), figures, tracks, passages)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        """A table for a terminal: where each response token looked."""
        lines = [
            " · ".join(f"{name} {value:.3g}" for name, value in self.figures.items()),
            f"prompt    {_short(self.prompt)}",
            f"response  {_short(self.response)}",
        ]
        shown = range(min(TEXT_TOKENS, len(self.response_tokens)))
        names = [_word(self.response_tokens[token]) for token in shown]
        wide = max(map(len, names), default=0)
        for heads in (name for name in (COPY, ALL) if name in self.maps):
            lines.append(f"looked at, {heads}:")
            for token, name in enumerate(names):
                looked = [
                    f"{_word(self.prompt_tokens[place])} {value:.2f}"
                    for place, value in self.most_attended(token, heads=heads)
                ]
                lines.append(f"  {name:<{wide}}  {float(self.logprobs[token]):6.2f}  {' · '.join(looked)}")
        if left := len(self.response_tokens) - len(names):
            lines.append(f"… and {left:,} more response tokens")
        return "\n".join(lines)


def _word(text: str) -> str:
    """A token on one line, 24 characters at most."""
    word = visible(text).strip() or repr(text)
    word = word.replace("\n", "\\n").replace("\t", "\\t")
    return word if len(word) <= 24 else word[:23] + "…"


def _short(text: str) -> str:
    """The two ends of a text that is too long for a terminal, on one line."""
    line = " ".join(visible(text).split())
    half = TEXT_CHARACTERS // 2
    return line if len(line) <= TEXT_CHARACTERS else f"{line[:half]} … {line[-half:]}"
