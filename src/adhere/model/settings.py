"""Options of a model at work: how prompts reach it, how responses are drawn, what is trained. Imports no torch,
so that the command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from adhere.errors import UserError, unknown_name

ChatMode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer: the frozen base is the reference, so no second copy is held."""

    rank: int = 16
    """Rank of the update."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    temperature: float = 1.0
    """Softmax temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus: smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 64
    """Response length limit in tokens; a response cut here did not end by itself."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}", fix="set it to 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}", fix="set it in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}", fix="set it to 0 (off) or above")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}", fix="set it to 1 or above")


@dataclass(frozen=True)
class ChatOptions:
    """How prompts are put to the model, and what ends a response beside its own end tokens."""

    chat: ChatMode = "auto"
    """auto: a plain prompt becomes a user turn where the tokenizer has a chat template; on: the same, and it must have
    one; off: plain prompts are read as they stand."""
    system: str | None = None
    """System text for prompts that bring none of their own."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; they are no part of it."""

    def __post_init__(self) -> None:
        if self.chat not in get_args(ChatMode):
            raise unknown_name("chat", self.chat, get_args(ChatMode))
        if self.system is not None and self.chat == "off":
            raise UserError("a system text goes into the chat template, and chat is off", fix="leave one of them out")
        if self.system is not None and not self.system.strip():
            raise UserError("system is empty", fix="write some text, or leave it out")
        if "" in self.stop:
            raise UserError("a stop text is empty", fix="write the text that ends a response")


CHAT = ChatOptions()
"""A plain prompt is a user turn where there is a chat template."""
