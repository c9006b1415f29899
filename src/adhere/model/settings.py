"""Options of a model at work: how responses are drawn, which adapters are trained. Imports no torch, so that the
command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass

from adhere.errors import UserError

TRAINING_DTYPES = ("auto", "float32", "bfloat16")
"""What a forward can compute in while weights are trained; the trained weights are always float32."""


def check_training_dtype(dtype: str) -> None:
    """Raise `UserError` for a dtype that cannot be trained in."""
    if dtype == "float16":
        raise UserError(
            "float16 cannot be trained in: its gradients underflow, its activations overflow",
            fix="use --dtype bfloat16, or auto for float32",
        )
    if dtype not in TRAINING_DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", fix=f"use one of {', '.join(TRAINING_DTYPES)}")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the frozen base is the reference, so no second copy is held. Options as PEFT names them."""

    rank: int = 16
    """Rank of the update, PEFT's `r`."""
    alpha: int = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before each adapter, in the update alone: sampling and scoring go without, so ratios start beside 1."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, by the last part of their names (q_proj v_proj); all-linear is all but the head."""
    use_rslora: bool = False
    """Multiply by alpha / √rank instead (rank-stabilised LoRA)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora rank is {self.rank}", fix="set it to 1 or above")
        if self.alpha < 1:
            raise UserError(f"lora alpha is {self.alpha}", fix="set it to 1 or above")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora dropout is {self.dropout}", fix="set it in [0, 1)")
        if not self.target_modules:
            raise UserError("lora target_modules is empty", fix="name modules, or leave it out for all linear layers")


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
