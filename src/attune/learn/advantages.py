"""From rewards to advantages: pure functions of tensors.

`group` [B] int64 says which prompt each response answers; equal values form a group, in any sizes. Padding is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this standard deviation a group's rewards are equal but for rounding.
TINY = 1e-6


def group_mean(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each response's group and the size of that group: [B], [B] → two of [B]."""
    count = int(group.max()) + 1
    sizes = torch.zeros(count, device=values.device).index_add(0, group, torch.ones_like(values))
    sums = torch.zeros(count, device=values.device).index_add(0, group, values)
    return (sums / sizes.clamp(min=1))[group], sizes[group]


def group_relative(rewards: Tensor, group: Tensor, scale: str = "group") -> Tensor:
    """GRPO (Shao et al. 2024, sec. 4.1.2): (r − mean of the group) / deviation. [B] → [B].

    `scale`: `group` divides by the group's standard deviation (with Bessel's correction, as TRL does), `batch` by the
    batch's (Lite PPO, 2508.08221), `none` by nothing (Dr. GRPO, 2503.20783). Equal rewards give 0.
    """
    mean, sizes = group_mean(rewards, group)
    centred = rewards - mean
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (rewards.std() + 1e-4) if len(rewards) > 1 else centred
    variance, _ = group_mean(centred.square(), group)
    deviation = (variance * sizes / (sizes - 1).clamp(min=1)).sqrt()
    return torch.where(deviation > TINY, centred / (deviation + 1e-4), 0.0)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, eq. 6): r − mean of the *other* responses of the group. [B] → [B].

    Equal to K/(K−1) · (r − mean of the group). A response alone in its group gets 0.
    """
    mean, sizes = group_mean(rewards, group)
    return torch.where(sizes > 1, (rewards - mean) * sizes / (sizes - 1).clamp(min=1), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the tokens of each response.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, with V = A = 0 after the last token.
    rewards, values [B, R] float32, mask [B, R] bool (right-padded) → advantages and returns (A + V), [B, R], 0 on
    padding.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    after_value = after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after_value - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
        after_value = values[:, t]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the counted places; 0 on padding. [B, R] → [B, R]."""
    count = mask.sum().clamp(min=1)
    centred = (values - (values * mask).sum() / count) * mask
    return centred / (centred.square().sum() / count + 1e-8).sqrt()


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, kl_coef: float) -> Tensor:
    """KL in the reward (Ziegler et al. 2019, eq. 2): −β (log π − log π_ref) at each token, the score at the last one.

    scores [B], logprobs, ref_logprobs [B, R], mask [B, R] bool → [B, R].
    """
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None and kl_coef:
        rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    lengths = mask.sum(-1)
    some = lengths > 0
    rewards[some, lengths[some] - 1] += scores[some]
    return rewards
