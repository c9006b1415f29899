"""From rewards to advantages: pure functions of tensors.

`group` [B] int64 says which prompt each response answers; equal values form a group, in any sizes. Padding is never
read: it may hold anything, NaN and −inf included.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adhere.errors import unknown_name

# Below this standard deviation a group's rewards are equal but for rounding.
TINY = 1e-6
# Added to a deviation before dividing by it, as TRL does: rewards that hardly differ give small advantages.
SOFTEN = 1e-4
SCALES = ("group", "batch", "none")


def group_mean(values: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Mean of each response's group and the size of that group: [B], [B] → two of [B]."""
    count = int(group.max()) + 1 if len(group) else 0
    sizes = values.new_zeros(count).index_add(0, group, torch.ones_like(values))
    sums = values.new_zeros(count).index_add(0, group, values)
    return (sums / sizes.clamp(min=1))[group], sizes[group]


def differing(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Bool[Tensor, "G"]:
    """Whether the rewards of each group differ, by group number, [B], [B] → [max(group) + 1]: where they do not, every
    response has the advantage 0 (DAPO, 2503.14476, sec. 3.2, keeps the others alone).

    >>> differing(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [True, False]
    """
    least, most = _ends(rewards, group)
    return most - least > TINY


def baseline(rewards: Float[Tensor, "B"], value: float | None = None) -> Float[Tensor, "B"]:
    """REINFORCE with a baseline (Williams 1992): r − b. [B] → [B].

    b is `value`, such as a running mean of earlier rewards; without one, the mean of this batch.
    """
    return rewards - (rewards.mean() if value is None else value)


def group_relative(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"], scale: str = "group") -> Float[Tensor, "B"]:
    """GRPO (Shao et al. 2024, sec. 4.1.2): (r − mean of the group) / deviation. [B] → [B].

    `scale`: `group` divides by the group's standard deviation (with Bessel's correction, as TRL does), `batch` by the
    batch's (Lite PPO, 2508.08221), `none` by nothing (Dr. GRPO, 2503.20783). Equal rewards, and a response alone in its
    group, give 0. Raises `UserError` for another scale.

    >>> group_relative(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), "none").tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    centred, sizes = _centred(rewards, group)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (rewards.std() + SOFTEN) if len(rewards) > 1 else centred
    variance, _ = group_mean(centred.square(), group)
    deviation = (variance * sizes / (sizes - 1).clamp(min=1)).sqrt()
    return torch.where(deviation > TINY, centred / (deviation + SOFTEN), 0.0)


def leave_one_out(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """RLOO (Ahmadian et al. 2024, eq. 6): r − mean of the *other* responses of the group. [B] → [B].

    Equal to K/(K−1) · (r − mean of the group). A response alone in its group gets 0.

    >>> leave_one_out(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 0, 0])).tolist()
    [1.5, -1.5, 0.0]
    """
    centred, sizes = _centred(rewards, group)
    return torch.where(sizes > 1, centred * sizes / (sizes - 1).clamp(min=1), 0.0)


def gae(
    rewards: Float[Tensor, "B R"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], gamma: float, lam: float
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the tokens of each response.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, with V = A = 0 after the last token.
    rewards, values [B, R] float32, mask [B, R] bool (right-padded) → advantages and returns (A + V), [B, R], 0 on
    padding.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    # On padding everything is 0, so what stands "after" the last token is 0 without asking where the response ends.
    after_value = after = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after_value - values[:, t]
        after = delta + gamma * lam * after
        advantages[:, t] = after
        after_value = values[:, t]
    return advantages, advantages + values


def whiten(values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Mean 0 and variance 1 over the counted places; 0 on padding. [B, R] → [B, R].

    Equal values give 0. Deviations well below `SOFTEN` are not blown up to 1.
    """
    count = mask.sum().clamp(min=1)
    kept = values.masked_fill(~mask, 0.0)
    centred = (kept - kept.sum() / count).masked_fill(~mask, 0.0)
    return centred / (centred.square().sum() / count + SOFTEN**2).sqrt()


def token_rewards(
    scores: Float[Tensor, "B"],
    logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"] | None,
    mask: Bool[Tensor, "B R"],
    kl_coef: float,
) -> Float[Tensor, "B R"]:
    """KL in the reward (Ziegler et al. 2019, eq. 2): −β (log π − log π_ref) at each token, the score at the last one.

    scores [B], logprobs, ref_logprobs [B, R], mask [B, R] bool → [B, R], 0 on padding. Without a reference there is the
    score alone; an empty response has no token to hold its score.
    """
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None and kl_coef:
        rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    lengths = mask.sum(-1)
    some = lengths > 0
    rewards[some, lengths[some] - 1] += scores[some]
    return rewards


def _centred(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """r − mean of the group, and the group's size: two of [B]."""
    mean, sizes = group_mean(rewards, group)
    least, most = _ends(rewards, group)
    # The mean of equal rewards may be off by a rounding error, which a division by the deviation would make large.
    return torch.where((most > least)[group], rewards - mean, 0.0), sizes


def _ends(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[Float[Tensor, "G"], Float[Tensor, "G"]]:
    """The least and the largest reward of each group, by group number: two of [max(group) + 1]."""
    none = rewards.new_zeros(int(group.max()) + 1 if len(group) else 0)
    least = none.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return least, none.scatter_reduce(0, group, rewards, "amax", include_self=False)
