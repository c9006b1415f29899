"""Options of a model at work: how prompts reach it, how responses are drawn, what is trained. Imports no torch,
so that the command line can explain and check them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from adhere.errors import UserError
from adhere.options import Above, AtLeast, AtMost, Below, Count, CountOrZero, check

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


ChatMode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the frozen base is the reference, so no second copy is held. Options as PEFT names them.

    >>> Lora(rank=8).alpha
    32
    """

    rank: Annotated[int, AtLeast(1), AtMost(65_536)] = 16
    """Rank of the update, PEFT's `r`."""
    alpha: Count = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0
    """Dropout before each adapter, in the update alone: sampling and scoring go without, so ratios start beside 1."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, by the last part of their names (q_proj v_proj); all-linear is all but the head."""
    use_rslora: bool = False
    """Multiply by alpha / √rank instead (rank-stabilised LoRA)."""

    def __post_init__(self) -> None:
        faults = []
        if not self.target_modules:
            fix = "name modules, or leave it out for all linear layers"
            faults.append(UserError("lora target_modules is empty", fix=fix))
        check(self, *faults)


# Fields of a generation configuration that truncate otherwise → what they are set to where they do nothing.
_OTHER_TRUNCATIONS = {"min_p": 0.0, "typical_p": 1.0, "top_h": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    >>> Sampling(temperature=0.7, max_new_tokens=32).top_p
    1.0
    """

    temperature: Annotated[float, AtLeast(0), AtMost(100)] = 1.0
    """Softmax temperature; 0 decodes greedily."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Nucleus: smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: CountOrZero = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: Count = 64
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
        check(self)


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
        faults = []
        if self.system is not None and self.chat == "off":
            what = "a system text goes into the chat template, and chat is off"
            faults.append(UserError(what, fix="leave one of them out"))
        if self.system is not None and not self.system.strip():
            faults.append(UserError("system is empty", fix="write some text, or leave it out"))
        if "" in self.stop:
            faults.append(UserError("a stop text is empty", fix="write the text that ends a response"))
        check(self, *faults)


CHAT = ChatOptions()
"""A plain prompt is a user turn where there is a chat template."""
