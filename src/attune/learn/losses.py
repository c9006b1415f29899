"""Losses: a record of tensors in, (loss, metrics) out.

Every term is divided by totals of the *whole* optimiser batch, so the losses and metrics of its micro-batches add up to
those of the batch: gradient accumulation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


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
    """[B] int64: which prompt each response answers."""
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


def aggregate(per_token: Tensor, inputs: LossInputs, over: str, max_length: int = 1) -> Tensor:
    """A [B, R] term as this micro-batch's share of a scalar.

    `token`: mean over all tokens (DAPO, 2503.14476); `sequence`: mean over responses of their means (GRPO, 2402.03300,
    eq. 3); `constant`: sum over all tokens / (responses · max_length) (Dr. GRPO, 2503.20783); `sum`: mean over responses
    of their sums (REINFORCE).
    """
    kept = per_token.masked_fill(~inputs.mask, 0.0)
    if over == "token":
        return kept.sum() / max(1, inputs.num_tokens)
    if over == "sequence":
        return (kept.sum(-1) / inputs.mask.sum(-1).clamp(min=1)).sum() / inputs.num_responses
    if over == "constant":
        return kept.sum() / (inputs.num_responses * max_length)
    assert over == "sum", over
    return kept.sum() / inputs.num_responses


def policy_gradient(inputs: LossInputs) -> tuple[Tensor, Metrics]:
    """−A log π per token, [B, R] (Williams 1992). On-policy: for one pass over each sample."""
    return -inputs.advantages * inputs.logprobs, {}


def clipped_surrogate(inputs: LossInputs, clip_low: float, clip_high: float) -> tuple[Tensor, Metrics]:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) per token, [B, R] (Schulman et al. 2017, eq. 7), ρ = π / π_old."""
    ratio = ((inputs.logprobs - inputs.old_logprobs).masked_fill(~inputs.mask, 0.0)).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * inputs.advantages, clipped * inputs.advantages)
    low = ((ratio < 1 - clip_low) & (inputs.advantages < 0) & inputs.mask).float()
    high = ((ratio > 1 + clip_high) & (inputs.advantages > 0) & inputs.mask).float()
    tokens = max(1, inputs.num_tokens)
    return loss, {"clip_ratio/low_mean": low.sum() / tokens, "clip_ratio/high_mean": high.sum() / tokens}


def kl_estimate(inputs: LossInputs) -> Tensor:
    """k3 = exp(d) − d − 1 with d = log π_ref − log π, per token, [B, R]: unbiased, never negative (Schulman 2020; GRPO,
    2402.03300, eq. 4). Zero without a reference."""
    if inputs.ref_logprobs is None:
        return torch.zeros_like(inputs.logprobs)
    gap = (inputs.ref_logprobs - inputs.logprobs).masked_fill(~inputs.mask, 0.0)
    return gap.exp() - gap - 1


def value_loss(inputs: LossInputs, clip: float) -> tuple[Tensor, Metrics]:
    """½ max((V − R)², (V_clipped − R)²), mean over tokens; V stays within `clip` of what it was (as in Ziegler et al.
    2019)."""
    assert inputs.values is not None and inputs.old_values is not None and inputs.returns is not None
    near = inputs.old_values + (inputs.values - inputs.old_values).clamp(-clip, clip)
    error = torch.max((inputs.values - inputs.returns).square(), (near - inputs.returns).square())
    loss = 0.5 * aggregate(error, inputs, "token")
    return loss, {"value_loss": loss.detach()}


def dpo_loss(inputs: LossInputs, beta: float) -> tuple[Tensor, Metrics]:
    """−log σ(β [Δ chosen − Δ rejected]), Δ = log π − log π_ref summed over tokens (Rafailov et al. 2023, eq. 7), the best
    against the worst response of each group by reward. A group whose rewards are all equal has no pair and adds 0."""
    assert inputs.ref_logprobs is not None
    gains = (inputs.logprobs - inputs.ref_logprobs).masked_fill(~inputs.mask, 0.0).sum(-1)
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
    """Places of the best and of the worst response of each group with unequal rewards, two of [pairs] int64; among equals
    the first."""
    chosen, rejected = [], []
    for value in group.unique().tolist():
        places = (group == value).nonzero().flatten()
        best, worst = places[rewards[places].argmax()], places[rewards[places].argmin()]
        if rewards[best] > rewards[worst]:
            chosen.append(best)
            rejected.append(worst)
    none = torch.zeros(0, dtype=torch.long, device=group.device)
    return (torch.stack(chosen), torch.stack(rejected)) if chosen else (none, none)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−mean log σ(r_chosen − r_rejected) (Bradley and Terry 1952): two of [pairs] float32 → scalar."""
    return -nn.functional.logsigmoid(chosen - rejected).mean()
