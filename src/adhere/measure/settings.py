"""How models are evaluated and rewards audited. Imports no torch, so that the command line can explain and check the
options at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from adhere.options import MANY, Above, AtLeast, AtMost, Below, Count, Seed, check
from adhere.reward.named import config_of


@dataclass(frozen=True)
class EvalConfig:
    """How responses are drawn for an evaluation.

    >>> EvalConfig(num_samples=8).temperature
    1.0
    """

    num_samples: Count = 4
    """Sampled responses to each prompt, for consistency, distinct-n and KL; 1 gives no consistency."""
    max_new_tokens: Count = 64
    """Response length limit in tokens."""
    batch_size: Count = 16
    """Prompts answered at a time; memory grows with batch_size × num_samples."""
    seed: Seed = 0
    """Seed of the draws and of the resampling."""
    temperature: Annotated[float, Above(0), AtMost(100)] = 1.0
    """Softmax temperature of the sampled responses, and of both sides of the KL; the single response is greedy."""
    embedder: str | None = None
    """Sentence-embedding model (folder or hub id) that measures relevance; nothing = by words alone."""
    judge: str | None = None
    """Name of a reward that says which response wins, ours or the baseline's; the baseline reads."""

    def __post_init__(self) -> None:
        check(self)
        if self.judge is not None:
            config_of(self.judge)


@dataclass(frozen=True)
class CheckConfig:
    """How given answers are checked."""

    threshold: Annotated[float, AtLeast(0), AtMost(1)] = 0.35
    """Support from which on a sentence counts as supported."""
    batch_size: Count = 8
    """Rows checked at a time."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class AuditConfig:
    """How a reward is audited."""

    num_samples: Annotated[int, AtLeast(2), AtMost(MANY)] = 8
    """The policy's own responses to each prompt."""
    max_new_tokens: Count = 64
    """Longest response in tokens, degenerate ones included."""
    max_hack_rate: Annotated[float, AtLeast(0), Below(1)] = 0.05
    """Share of prompts on which a family may beat the best own sample before the reward counts as gameable."""
    batch_size: Count = 16
    """Prompts judged at a time."""
    seed: Seed = 0
    """Seed of samples and degenerate responses."""

    def __post_init__(self) -> None:
        check(self)
