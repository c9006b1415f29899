"""Losses: two records of tensors in (the batch, and what the policy says of it now), (loss, metrics) out.

Every term is divided by totals of the *whole* optimiser batch, so the losses and metrics of its micro-batches add up to
those of the batch: gradient accumulation is exact. Padding is never read and gets no gradient, whatever stands there:
each function replaces it before any arithmetic, because 0 · inf in a backward pass is NaN even where the forward was
masked.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adhere.learn.batch import Batch, Outputs

Scalar = Float[Tensor, ""]
Metrics = dict[str, Scalar]
Over = Literal["token", "sequence", "limit", "sum"]

# exp of this is a ratio beyond any use; past it, inf · (an advantage of 0) would be NaN.
LARGEST_LOG_RATIO = 20.0


def aggregate(per_token: Float[Tensor, "B R"], batch: Batch, over: Over) -> Scalar:
    """A [B, R] term as this micro-batch's share of a scalar.

    `token`: mean over all tokens (DAPO, 2503.14476, sec. 3.3); `sequence`: mean over responses of their means (GRPO,
    2402.03300, eq. 3); `limit`: mean over responses of their sums, divided by the length that a response may have (Dr.
    GRPO, 2503.20783, sec. 3.2); `sum`: mean over responses of their sums (a response as one action: RLOO).
    """
    per_response = _kept(per_token, batch.mask).sum(-1)
    if over == "token":
        return per_response.sum() / max(1, batch.totals.tokens)
    if over == "sequence":
        return (per_response / _lengths(batch)).sum() / batch.totals.responses
    if over == "limit":
        assert batch.max_new_tokens is not None
        return per_response.sum() / (batch.totals.responses * batch.max_new_tokens)
    return per_response.sum() / batch.totals.responses


def policy_gradient_loss(batch: Batch, now: Outputs, over: Over = "token") -> tuple[Scalar, Metrics]:
    """−A log π (Williams 1992): the score-function form, without a ratio. Its gradient is the policy gradient only
    while the policy is the one that sampled, so it serves for one pass over each rollout."""
    per_token = -_advantages(batch) * _kept(now.logprobs, batch.mask)
    return aggregate(per_token, batch, over), {}


def clipped_loss(
    batch: Batch, now: Outputs, epsilon: float, epsilon_high: float, over: Over = "token"
) -> tuple[Scalar, Metrics]:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) per token (Schulman et al. 2017, eq. 7; with an ε_high of its own:
    DAPO, 2503.14476, sec. 3.1), ρ = π / π_old.

    The metrics are shares of all tokens where the clip binds, and so the gradient is 0: ρ too low where A < 0, too high
    where A > 0.
    """
    per_token, low, high = _clipped(_log_ratio(batch, now), _advantages(batch), epsilon, epsilon_high)
    return aggregate(per_token, batch, over), _clip_ratios(low, high, max(1, batch.totals.tokens))


def sequence_clipped_loss(batch: Batch, now: Outputs, epsilon: float, epsilon_high: float) -> tuple[Scalar, Metrics]:
    """`clipped_loss` with the response as one action (RLOO, Ahmadian et al. 2024, sec. 3.1): ρ is the ratio of the
    whole response, Π_t π / π_old, and A its one advantage, read at its first token; mean over responses.

    While the policy is the one that sampled, the gradient is that of −A Σ_t log π. The metrics are shares of all
    responses where the clip binds. An empty response adds 0.
    """
    return _response_loss(_log_ratio(batch, now).sum(-1), batch, epsilon, epsilon_high)


def gspo_loss(batch: Batch, now: Outputs, epsilon: float, epsilon_high: float) -> tuple[Scalar, Metrics]:
    """`sequence_clipped_loss` with the ratio's geometric mean over the tokens, ρ = (Π_t π / π_old)^(1/|y|) (GSPO,
    2507.18071, eq. 5 and 7), so that one range of clipping fits responses of every length.

    While the policy is the one that sampled, the gradient is that of `clipped_loss` over `sequence`.
    """
    return _response_loss(_log_ratio(batch, now).sum(-1) / _lengths(batch), batch, epsilon, epsilon_high)


def cispo_loss(batch: Batch, now: Outputs, epsilon_high: float) -> tuple[Scalar, Metrics]:
    """−sg(min(ρ, 1 + ε_high)) A log π, mean over tokens (CISPO, MiniMax-M1, 2506.13585, sec. 3.1, which bounds from
    above alone too), sg = without gradient.

    The weight is bounded, and no token loses its gradient. The metric is the share of all tokens whose weight is
    bounded where A > 0. While the policy is the one that sampled, the gradient is that of `clipped_loss`.
    """
    ratio = _ratio(_log_ratio(batch, now)).detach()
    advantages = _advantages(batch)
    per_token = -ratio.clamp(max=1 + epsilon_high) * advantages * _kept(now.logprobs, batch.mask)
    bounded = ((ratio > 1 + epsilon_high) & (advantages > 0)).float().sum()
    return aggregate(per_token, batch, "token"), {"cispo_clip_ratio": bounded / max(1, batch.totals.tokens)}


def kl_penalty(
    logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    estimator: Literal["k1", "k3"] = "k3",
) -> Float[Tensor, "B R"]:
    """KL(π ‖ π_ref) estimated at each sampled token, nats, [B, R], 0 on padding (Schulman 2020, "Approximating KL
    divergence").

    With d = log π_ref − log π: `k1` = −d, unbiased, of either sign, for rewards; `k3` = exp(d) − d − 1, unbiased too,
    never negative, for losses (GRPO, 2402.03300, eq. 4). As a loss on the policy's own samples k1 does nothing, for the
    mean of its gradient is 0; that of k3 is the gradient of KL(π_ref ‖ π), the other way round, with the same optimum.
    """
    gap = _kept(ref_logprobs, mask) - _kept(logprobs, mask)
    return -gap if estimator == "k1" else gap.exp() - gap - 1


def value_loss(batch: Batch, now: Outputs, clip: float) -> tuple[Scalar, Metrics]:
    """½ max((V − R)², (V_clipped − R)²), mean over tokens; V_clipped stays within `clip` of what V was at sampling (as
    in Ziegler et al. 2019)."""
    assert now.values is not None and batch.values is not None and batch.returns is not None
    values, old = _kept(now.values, batch.mask), _kept(batch.values, batch.mask)
    returns = _kept(batch.returns, batch.mask)
    near = old + (values - old).clamp(-clip, clip)
    error = torch.max((values - returns).square(), (near - returns).square())
    loss = 0.5 * aggregate(error, batch, "token")
    return loss, {"value_loss": loss.detach()}


def dpo_loss(batch: Batch, now: Outputs, beta: float) -> tuple[Scalar, Metrics]:
    """−log σ(β [Δ chosen − Δ rejected]), Δ = log π − log π_ref summed over tokens (Rafailov et al. 2023, eq. 7), the
    best against the worst response of each group by reward; mean over groups.

    A group whose rewards are all equal has no pair and adds 0. The metrics are over all groups too, so that they add
    up: for means over pairs, divide `dpo/accuracy` (chosen ahead of rejected) and `dpo/margin` (β [Δ chosen −
    Δ rejected]) by `dpo/pairs`, the share of groups that have a pair.
    """
    assert batch.ref_logprobs is not None
    gains = (_kept(now.logprobs, batch.mask) - _kept(batch.ref_logprobs, batch.mask)).sum(-1)
    chosen, rejected = pairs(batch.rewards, batch.group)
    margins = beta * (gains[chosen] - gains[rejected])
    total = batch.totals.groups
    loss = -nn.functional.logsigmoid(margins).sum() / total
    with torch.no_grad():
        metrics = {
            "dpo/accuracy": (margins > 0).float().sum() / total,
            "dpo/margin": margins.sum() / total,
            "dpo/pairs": margins.new_tensor(float(len(margins))) / total,
        }
    return loss, metrics


def pairs(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
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


def _kept(values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """`values` with 0 on padding, where neither value nor gradient passes. [B, R] → [B, R]."""
    return values.masked_fill(~mask, 0.0)


def _advantages(batch: Batch) -> Float[Tensor, "B R"]:
    """The advantages, [B, R], 0 on padding."""
    assert batch.advantages is not None, "advantages come before losses"
    return _kept(batch.advantages, batch.mask)


def _lengths(batch: Batch) -> Int[Tensor, "B"]:
    """Tokens of each response, [B], 1 for an empty one: what its sum of nothing may be divided by."""
    return batch.mask.sum(-1).clamp(min=1)


def _log_ratio(batch: Batch, now: Outputs) -> Float[Tensor, "B R"]:
    """log π − log π_old, [B, R], 0 on padding."""
    return _kept(now.logprobs, batch.mask) - _kept(batch.logprobs, batch.mask)


def _ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """π / π_old, finite, of the shape given."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def _clipped(
    log_ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], epsilon: float, epsilon_high: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The clipped surrogate, and where (0 or 1) the clip binds from below and from above: three of the shape given."""
    ratio = _ratio(log_ratio)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return loss, low.float(), high.float()


def _response_loss(
    log_ratio: Float[Tensor, "B"], batch: Batch, epsilon: float, epsilon_high: float
) -> tuple[Scalar, Metrics]:
    """The clipped surrogate of one ratio and one advantage a response, mean over responses."""
    per_response, low, high = _clipped(log_ratio, _advantages(batch)[:, 0], epsilon, epsilon_high)
    total = batch.totals.responses
    return per_response.sum() / total, _clip_ratios(low, high, total)


def _clip_ratios(low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], total: int) -> Metrics:
    """Where the clip binds, as shares of all `total` tokens or responses."""
    return {"clip_ratio/low_mean": low.sum() / total, "clip_ratio/high_mean": high.sum() / total}
