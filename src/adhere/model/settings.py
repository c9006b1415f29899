"""Options of a model at work: how responses are drawn, which adapters are trained. Imports no torch, so that the
command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adhere.errors import UserError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer: the frozen base is the reference, so no second copy is held."""

    rank: int = 16
    """Rank of the update."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""


# Fields of a generation configuration that truncate otherwise → what they are set to where they do nothing.
_OTHER_TRUNCATIONS = {"min_p": 0.0, "typical_p": 1.0, "top_h": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


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

    @classmethod
    def of(cls, generation: object, **given: Any) -> Sampling:
        """What a model's generation configuration sets of temperature, top-p and top-k; what is `given` goes first.

        The values count whether or not the configuration says `do_sample`, as in vLLM. Its length limit does not:
        it is a limit, not a habit. Raises `UserError` for another truncation (min-p, typical, …) unless temperature,
        top_p or top_k are given.
        """
        others = {name: getattr(generation, name, None) for name in _OTHER_TRUNCATIONS}
        others = {name: value for name, value in others.items() if value not in (None, _OTHER_TRUNCATIONS[name])}
        habits = ("temperature", "top_p", "top_k")
        if others and not any(name in given for name in habits):
            named = ", ".join(f"{name} ({value})" for name, value in others.items())
            raise UserError(
                f"the model's generation_config samples with {named}, which is not supported",
                fix="set --temperature, --top-p or --top-k instead",
            )
        own = {name: getattr(generation, name, None) for name in habits}
        return cls(**{**{name: value for name, value in own.items() if value is not None}, **given})

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}", fix="set it to 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}", fix="set it in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}", fix="set it to 0 (off) or above")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}", fix="set it to 1 or above")
