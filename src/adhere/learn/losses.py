"""Losses: a record of tensors in, (loss, metrics) out.

Every term is divided by totals of the *whole* optimiser batch, so the losses and metrics of its micro-batches add up to
those of the batch: gradient accumulation is exact. Padding is never read and gets no gradient, whatever stands there:
each function replaces it before any arithmetic, because 0 · inf in a backward pass is NaN even where the forward was
masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]
Over = Literal["token", "sequence", "sum"]

# exp of this is a ratio beyond any use; past it, inf · (an advantage of 0) would be NaN.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossInputs:
    """What a loss may read. Log-probs, values and masks are [B, R]; nothing on padding is read."""

    logprobs: Tensor
    """Under the policy now, with gradient."""
    old_logprobs: Tensor
    """Under the policy that sampled."""
    mask: Tensor
    """bool: True = a response token."""
    advantages: Tensor
    rewards: Tensor
    """[B], for losses that rank."""
    group: Tensor
    """[B] int64: which prompt each response answers; a micro-batch holds whole groups."""
    ref_logprobs: Tensor | None
    values: Tensor | None
    """The value head now, with gradient."""
    old_values: Tensor | None
    returns: Tensor | None
    kl_coef: float
    num_tokens: int
    """Response tokens of the whole batch."""
    num_responses: int
    """Responses of the whole batch."""
    num_groups: int
    """Prompts of the whole batch."""


def aggregate(per_token: Tensor, inputs: LossInputs, over: Over) -> Tensor:
    """A [B, R] term as this micro-batch's share of a scalar.

    `token`: mean over all tokens (DAPO, 2503.14476); `sequence`: mean over responses of their means (GRPO, 2402.03300,
    eq. 3); `sum`: mean over responses of their sums (a response as one action: RLOO).
    """
    per_response = _kept(per_token, inputs.mask).sum(-1)
    if over == "token":
        return per_response.sum() / max(1, inputs.num_tokens)
    if over == "sequence":
        return (per_response / inputs.mask.sum(-1).clamp(min=1)).sum() / inputs.num_responses
    return per_response.sum() / inputs.num_responses


def policy_gradient_loss(inputs: LossInputs, over: Over = "token") -> tuple[Tensor, Metrics]:
    """−A log π (Williams 1992): the score-function form, without a ratio. Its gradient is the policy gradient only
    while the policy is the one that sampled, so it serves for one pass over each rollout."""
    per_token = -_kept(inputs.advantages, inputs.mask) * _kept(inputs.logprobs, inputs.mask)
    return aggregate(per_token, inputs, over), {}


def clipped_loss(inputs: LossInputs, clip_low: float, clip_high: float, over: Over = "token") -> tuple[Tensor, Metrics]:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) per token (Schulman et al. 2017, eq. 7), ρ = π / π_old.

    The metrics are shares of all tokens where the clip binds, and so the gradient is 0: ρ too low where A < 0, too high
    where A > 0.
    """
    per_token, low, high = _clipped(_log_ratio(inputs), _kept(inputs.advantages, inputs.mask), clip_low, clip_high)
    tokens = max(1, inputs.num_tokens)
    return aggregate(per_token, inputs, over), {
        "clip_ratio/low_mean": low.sum() / tokens,
        "clip_ratio/high_mean": high.sum() / tokens,
    }


def sequence_clipped_loss(inputs: LossInputs, clip_low: float, clip_high: float) -> tuple[Tensor, Metrics]:
    """`clipped_loss` with the response as one action (RLOO, Ahmadian et al. 2024, sec. 3.1): ρ is the ratio of the
    whole response, Π_t π / π_old, and A its one advantage, read at its first token; mean over responses.

    While the policy is the one that sampled, the gradient is that of −A Σ_t log π. The metrics are shares of all
    responses where the clip binds. An empty response adds 0.
    """
    advantages = _kept(inputs.advantages, inputs.mask)[:, 0]
    per_response, low, high = _clipped(_log_ratio(inputs).sum(-1), advantages, clip_low, clip_high)
    return per_response.sum() / inputs.num_responses, {
        "clip_ratio/low_mean": low.sum() / inputs.num_responses,
        "clip_ratio/high_mean": high.sum() / inputs.num_responses,
    }


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Literal["k1", "k3"] = "k3") -> Tensor:
    """KL(π ‖ π_ref) estimated at each sampled token, nats, [B, R], 0 on padding (Schulman 2020, "Approximating KL
    divergence").

    With d = log π_ref − log π: `k1` = −d, unbiased, of either sign, for rewards; `k3` = exp(d) − d − 1, unbiased too,
    never negative, for losses (GRPO, 2402.03300, eq. 4). As a loss on the policy's own samples k1 does nothing, for the
    mean of its gradient is 0; that of k3 is the gradient of KL(π_ref ‖ π), the other way round, with the same optimum.
    """
    gap = _kept(ref_logprobs, mask) - _kept(logprobs, mask)
    return -gap if estimator == "k1" else gap.exp() - gap - 1


def value_loss(inputs: LossInputs, clip: float) -> tuple[Tensor, Metrics]:
    """½ max((V − R)², (V_clipped − R)²), mean over tokens; V_clipped stays within `clip` of what V was at sampling (as
    in Ziegler et al. 2019)."""
    assert inputs.values is not None and inputs.old_values is not None and inputs.returns is not None
    values, old = _kept(inputs.values, inputs.mask), _kept(inputs.old_values, inputs.mask)
    returns = _kept(inputs.returns, inputs.mask)
    near = old + (values - old).clamp(-clip, clip)
    error = torch.max((values - returns).square(), (near - returns).square())
    loss = 0.5 * aggregate(error, inputs, "token")
    return loss, {"value_loss": loss.detach()}


def dpo_loss(inputs: LossInputs, beta: float) -> tuple[Tensor, Metrics]:
    """−log σ(β [Δ chosen − Δ rejected]), Δ = log π − log π_ref summed over tokens (Rafailov et al. 2023, eq. 7), the
    best against the worst response of each group by reward; mean over groups.

    A group whose rewards are all equal has no pair and adds 0. The metrics are over all groups too, so that they add
    up: for means over pairs, divide `dpo/accuracy` (chosen ahead of rejected) and `dpo/margin` (β [Δ chosen −
    Δ rejected]) by `dpo/pairs`, the share of groups that have a pair.
    """
    assert inputs.ref_logprobs is not None
    gains = (_kept(inputs.logprobs, inputs.mask) - _kept(inputs.ref_logprobs, inputs.mask)).sum(-1)
    chosen, rejected = pairs(inputs.rewards, inputs.group)
    margins = beta * (gains[chosen] - gains[rejected])
    total = inputs.num_groups
    loss = -nn.functional.logsigmoid(margins).sum() / total
    with torch.no_grad():
        metrics = {
            "dpo/accuracy": (margins > 0).float().sum() / total,
            "dpo/margin": margins.sum() / total,
            "dpo/pairs": margins.new_tensor(float(len(margins))) / total,
        }
    return loss, metrics


def pairs(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the best and of the worst response of each group with unequal rewards, two of [pairs] int64; among
    equals the first."""
    chosen, rejected = [], []
    for value in group.unique().tolist():
        places = (group == value).nonzero().flatten()
        best, worst = places[rewards[places].argmax()], places[rewards[places].argmin()]
        if rewards[best] > rewards[worst]:
            chosen.append(best)
            rejected.append(worst)
    none = torch.zeros(0, dtype=torch.long, device=group.device)
    return (torch.stack(chosen), torch.stack(rejected)) if chosen else (none, none)


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with 0 on padding, where neither value nor gradient passes. [B, R] → [B, R]."""
    return values.masked_fill(~mask, 0.0)


def _log_ratio(inputs: LossInputs) -> Tensor:
    """log π − log π_old, [B, R], 0 on padding."""
    return _kept(inputs.logprobs, inputs.mask) - _kept(inputs.old_logprobs, inputs.mask)


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate, and where (0 or 1) the clip binds from below and from above: three of the shape given."""
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, low.float(), high.float()
