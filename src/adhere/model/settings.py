"""Options of a model at work: how responses are drawn, which adapters are trained. Imports no torch, so that the
command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from adhere.options import Above, AtLeast, AtMost, check


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer: the frozen base is the reference, so no second copy is held.

    >>> Lora(rank=8).alpha
    32
    """

    rank: Annotated[int, AtLeast(1)] = 16
    """Rank of the update."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    >>> Sampling(temperature=0.7, max_new_tokens=32).top_p
    1.0
    """

    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Softmax temperature; 0 decodes greedily."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Nucleus: smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: Annotated[int, AtLeast(0)] = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 64
    """Response length limit in tokens; a response cut here did not end by itself."""

    def __post_init__(self) -> None:
        check(self)
