"""How the bench of faithfulness is run, and against what. Imports no torch, so that the command line can explain and
check the options at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from adhere.errors import UserError, unknown_name
from adhere.options import MANY, Above, AtLeast, AtMost, Count, Seed, check
from adhere.reward.named import NAMED, SIGNALS, RewardConfig, config_of

SPLITS = ("unchanged", "swapped", "distractor", "unanswerable", "samples", "swapped-samples")
CONTROLS = ("coherence", "certainty", "overlap", "reliance", "majority", "random")
"""Signals that stand in every table, as they are: no gates, no normalising."""
DEFAULT = "attention"
"""The reward that stands in every table too."""


@dataclass(frozen=True)
class BenchConfig:
    """What is compared, and how responses are drawn for it.

    >>> BenchConfig(splits=("distractor", "samples")).num_samples
    8
    """

    splits: tuple[str, ...] = SPLITS
    """Which comparisons to make: unchanged, swapped, distractor, unanswerable, samples, swapped-samples."""
    num_samples: Annotated[int, AtLeast(2), AtMost(MANY)] = 8
    """Responses that the model draws to each question, and to it on the swapped passage."""
    temperature: Annotated[float, Above(0), AtMost(100)] = 0.8
    """Softmax temperature of the samples."""
    max_new_tokens: Count = 24
    """Length limit of a sample in tokens."""
    match: Literal["contained", "equal"] = "contained"
    """When a sample is right: contained = an accepted answer stands in it word for word, equal = it is one; both sides
    normalised as for exact match."""
    refusal: str = "The passage does not say."
    """The right response where the passage does not hold the answer."""
    batch_size: Count = 4
    """Questions read at a time; memory grows with batch_size × num_samples."""
    seed: Seed = 0
    """Seed of the draws, of what other rows lend, and of the resampling."""

    def __post_init__(self) -> None:
        faults = [unknown_name("split", name, SPLITS) for name in self.splits if name not in SPLITS]
        if not self.splits:
            faults.append(UserError("splits is empty", fix=f"name some of {', '.join(SPLITS)}"))
        if not self.refusal.strip():
            faults.append(UserError("refusal is empty", fix="write what the model should say"))
        check(self, *faults)


def reward_of(spec: str | Mapping[str, Any]) -> RewardConfig:
    """A reward as `config_of` reads it, or the name of a signal, which is then the reward by itself. A name of
    `CONTROLS` is the signal."""
    alone = isinstance(spec, str) and (spec in CONTROLS or (spec in SIGNALS and spec not in NAMED))
    return RewardConfig({str(spec): 1.0}, normalise="none") if alone else config_of(spec)


def with_controls(given: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
    """The rewards of a table: those given, the default, the controls."""
    return {**given, **{name: reward_of(name) for name in (DEFAULT, *CONTROLS) if name not in given}}
