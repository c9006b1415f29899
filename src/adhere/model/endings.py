"""What ends a response: tokens, and texts that may be spread over several tokens or be part of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adhere.model.chat import end_tokens, frame, special_texts
from adhere.model.settings import ChatOptions

_TOKENS_OF_A_CHARACTER = 4
"""Byte-level vocabularies may spend a token on each byte."""


@dataclass(frozen=True)
class Endings:
    """What ends a response of one model, and what a given response is closed with."""

    tokenizer: PreTrainedTokenizerBase
    tokens: frozenset[int]
    """Each ends a response: the tokenizer's, those of the generation configuration, what the chat template writes after
    a turn, and stop texts that are special tokens."""
    turn: int
    """Closes a given reply in a chat."""
    texts: tuple[str, ...]
    """Each ends a response and is no part of its text."""
    plain: int | str
    """Closes a given response to plain text: the first stop text, or else the end-of-sequence token."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel, options: ChatOptions) -> Endings:
        """Of a model and what its user asked for."""
        end = int(tokenizer.eos_token_id)
        turn = frame(tokenizer).end
        known = getattr(network.generation_config, "eos_token_id", None)
        configured = known if isinstance(known, list) else [] if known is None else [known]
        special, vocabulary = special_texts(tokenizer), tokenizer.get_vocab() if options.stop else {}
        stops = [vocabulary[stop] if stop in special else stop for stop in options.stop]
        tokens = {*end_tokens(tokenizer), *configured, *(stop for stop in stops if isinstance(stop, int))}
        return cls(
            tokenizer,
            frozenset(tokens),
            end if turn is None else turn,
            tuple(stop for stop in stops if isinstance(stop, str)),
            stops[0] if stops else end,
        )

    def closing(self, chat: bool) -> tuple[str, list[int]]:
        """The text and the ids after a given response that ended by itself, to a chat or to plain text."""
        end = self.turn if chat else self.plain
        return (end, []) if isinstance(end, str) else ("", [end])

    def closing_ids(self, chat: bool) -> list[int]:
        """The tokens that close a response that ended by itself, to a chat or to plain text."""
        text, ids = self.closing(chat)
        return ids or list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def reached(self, ids: Tensor) -> Tensor:
        """[n] bool: whether responses `ids` [n, t] have just come to a stop text."""
        window = _TOKENS_OF_A_CHARACTER * max(map(len, self.texts), default=0) + 1
        tails = self.tokenizer.batch_decode(ids[:, -window:]) if self.texts else [""] * len(ids)
        return torch.tensor([self.cut(tail) != tail for tail in tails], dtype=torch.bool, device=ids.device)

    def cut(self, text: str) -> str:
        """`text` up to the first stop text in it."""
        return text[: min((place for stop in self.texts if (place := text.find(stop)) >= 0), default=len(text))]
