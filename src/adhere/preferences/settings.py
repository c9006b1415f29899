"""How preference pairs are made, chosen for a person to answer, and fitted. Imports no torch, so that the command line
can explain and check the options at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from adhere.options import MANY, Above, AtLeast, AtMost, Below, Count, Seed, check


@dataclass(frozen=True)
class PairConfig:
    """How preference pairs are made."""

    chosen: Literal["auto", "answer", "sample"] = "auto"
    """The preferred response: answer (the row's first answer or its reference), sample (the likeliest of the policy's
    own that ended), or auto, an answer where there is one."""
    pairs_per_prompt: Count = 2
    """Pairs of each prompt, each with another corruption."""
    num_samples: Count = 4
    """Samples of which the likeliest is taken."""
    max_new_tokens: Count = 64
    """Longest sample in tokens."""
    batch_size: Count = 32
    """Prompts at a time."""
    seed: Seed = 0
    """Seed of samples and corruptions."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SuggestConfig:
    """How pairs to ask about are found."""

    suggest: Count = 20
    """Write the N pairs whose answer would teach most, at most one a prompt, instead of fitting."""
    num_samples: Annotated[int, AtLeast(2), AtMost(MANY)] = 8
    """Responses sampled to each prompt, of which two are chosen."""
    max_new_tokens: Count = 64
    """Response length limit in tokens."""
    batch_size: Count = 32
    """Prompts at a time."""
    seed: Seed = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PreferenceConfig:
    """How a reward model is fitted."""

    model: str
    """Backbone: a model folder or hub id, causal or encoder–decoder."""
    output: str
    """Folder of the reward model; must not hold one yet."""
    steps: Count = 200
    """Training steps."""
    batch_size: Count = 16
    """Pairs a step."""
    learning_rate: Annotated[float, Above(0), AtMost(1)] = 1e-4
    """Peak learning rate of AdamW."""
    held_out: Annotated[float, AtLeast(0), Below(1)] = 0.1
    """Share of the prompts whose pairs are kept to measure the accuracy; 0 = none."""
    seed: Seed = 0
    """Seed of the head, the split and the order."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""

    def __post_init__(self) -> None:
        check(self)
