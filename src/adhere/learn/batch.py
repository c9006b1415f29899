"""The records of a step: the scored rollout that it learns from, and what the policy says of it while it learns.

Tensors alone, so that advantages and losses stay pure functions. Padding may hold anything and is never read. The
shapes are annotations that the tests check (tests/conftest.py); a run pays nothing for them.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from adhere.types import Chunk


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole optimiser batch, over all processes: what every loss and metric is divided by."""

    tokens: int
    """Response tokens."""
    responses: int
    groups: int
    """Prompts."""


@dataclass(frozen=True)
class Batch:
    """A scored rollout, or some whole groups of one."""

    rewards: Float[Tensor, "B"]
    group: Int[Tensor, "B"]
    """The prompt each response answers; equal values form a group."""
    mask: Bool[Tensor, "B R"]
    """True = a response token."""
    logprobs: Float[Tensor, "B R"]
    """Under the policy that sampled."""
    totals: Totals
    ref_logprobs: Float[Tensor, "B R"] | None = None
    """Under the frozen reference; None where nothing needs one."""
    values: Float[Tensor, "B R"] | None = None
    """What the value head said before the update; None without a value head."""
    kl_coef: float = 0.0
    """Weight of the KL divergence in force: a controller may adapt it from step to step."""
    baseline: float | None = None
    """Running mean reward; None for the mean of this batch."""
    max_new_tokens: int | None = None
    """Tokens that a response may have; None where no loss divides by it."""
    advantages: Float[Tensor, "B R"] | None = None
    """0 on padding; None until they are computed, and for an algorithm that has none."""
    returns: Float[Tensor, "B R"] | None = None
    """What the value head aims at; None without a value head."""

    def part(self, chunk: Chunk) -> "Batch":
        """The groups of `chunk`. `totals` stay those of the whole batch."""
        rows, columns = chunk.rows, chunk.columns

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows, columns]

        return replace(
            self,
            rewards=self.rewards[rows],
            group=self.group[rows],
            mask=self.mask[rows, columns],
            logprobs=self.logprobs[rows, columns],
            ref_logprobs=cut(self.ref_logprobs),
            values=cut(self.values),
            advantages=cut(self.advantages),
            returns=cut(self.returns),
        )


@dataclass(frozen=True)
class Outputs:
    """What the policy says now, at each response token."""

    logprobs: Float[Tensor, "B R"]
    """With gradient."""
    entropy: Float[Tensor, "B R"]
    """Without gradient, nats."""
    values: Float[Tensor, "B R"] | None = None
    """With gradient; None without a value head."""
