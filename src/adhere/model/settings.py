"""Options of a model at work: how responses are drawn, which adapters are trained. Imports no torch, so that the
command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass

from adhere.errors import UserError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer: the frozen base is the reference, so no second copy is held.

    >>> Lora(rank=8).alpha
    32
    """

    rank: int = 16
    """Rank of the update."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    >>> Sampling(temperature=0.7, max_new_tokens=32).top_p
    1.0
    """

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
