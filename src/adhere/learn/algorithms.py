"""What the algorithms compute: the advantages of a batch once a step, then a loss for every micro-batch.

Each is two functions of its options (`adhere.learn.settings`) and the records of a step. Where the KL divergence from
the reference enters (in the reward, before advantages, or in the loss) is the algorithm's `kl_in`; how strongly,
`kl_coef`, comes with the batch, because a controller may adapt it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adhere.learn import advantages, losses
from adhere.learn.batch import Batch, Outputs
from adhere.learn.losses import Metrics, Over
from adhere.learn.settings import DPO, GRPO, PPO, RLOO, Algorithm, KLPlace, Loss, Reinforce


def with_advantages(options: Algorithm, batch: Batch) -> Batch:
    """The batch with what the losses of this step aim at."""
    return FORMULAS[type(options)].advantages(options, batch)


def loss_of(options: Algorithm, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """The loss of a batch or a part of it, and its metrics: those of the parts add up to the batch's."""
    return FORMULAS[type(options)].loss(options, batch, now)


def ppo_advantages(options: PPO, batch: Batch) -> Batch:
    """KL token by token in the reward, GAE over the tokens, whitened over the batch."""
    assert batch.values is not None
    kl_coef = batch.kl_coef if options.kl_in == "reward" else 0.0
    rewards = advantages.token_rewards(batch.rewards, batch.logprobs, batch.ref_logprobs, batch.mask, kl_coef)
    gained, returns = advantages.gae(rewards, batch.values, batch.mask, options.gamma, options.gae_lambda)
    return replace(batch, advantages=advantages.whiten(gained, batch.mask), returns=returns)


def ppo_loss(options: PPO, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """The clipped surrogate per token, the value loss, KL per token."""
    policy, metrics = losses.clipped_loss(batch, now, *options.clip)
    value, more = losses.value_loss(batch, now, options.value_clip)
    loss = policy + options.value_coef * value + _kl_loss(batch, now, options.kl_in, "token")
    return loss, metrics | more


def reinforce_advantages(options: Reinforce, batch: Batch) -> Batch:
    """Reward less the running mean, the same at each token."""
    return _spread(batch, advantages.baseline(_rewards_after_kl(batch, options.kl_in), batch.baseline))


def reinforce_loss(options: Reinforce, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """−A log π, mean over tokens."""
    policy, metrics = losses.policy_gradient_loss(batch, now)
    return policy + _kl_loss(batch, now, options.kl_in, "token"), metrics


def rloo_advantages(options: RLOO, batch: Batch) -> Batch:
    """Reward less the mean of the other samples of the prompt, the same at each token."""
    return _spread(batch, advantages.leave_one_out(_rewards_after_kl(batch, options.kl_in), batch.group))


def rloo_loss(options: RLOO, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """The clipped surrogate with the response as one action, KL summed over it."""
    policy, metrics = losses.sequence_clipped_loss(batch, now, *options.clip)
    return policy + _kl_loss(batch, now, options.kl_in, "sum"), metrics


def grpo_advantages(options: GRPO, batch: Batch) -> Batch:
    """Reward less the mean of its group, over a deviation, the same at each token."""
    rewards = _rewards_after_kl(batch, options.kl_in)
    return _spread(batch, advantages.group_relative(rewards, batch.group, options.scale_rewards))


def grpo_loss(options: GRPO, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """The policy's term as `loss` names it, KL brought together likewise."""
    over, (low, high) = LOSS_OVER[options.loss], options.clip
    if options.loss == "gspo":
        policy, metrics = losses.gspo_loss(batch, now, low, high)
    elif options.loss == "cispo":
        policy, metrics = losses.cispo_loss(batch, now, high)
    else:
        policy, metrics = losses.clipped_loss(batch, now, low, high, over)
    return policy + _kl_loss(batch, now, options.kl_in, over), metrics


LOSS_OVER: dict[Loss, Over] = {
    "dapo": "token",
    "grpo": "sequence",
    "dr_grpo": "limit",
    "gspo": "sequence",
    "cispo": "token",
}
"""What each loss is a mean over."""


def dpo_advantages(options: DPO, batch: Batch) -> Batch:
    """None: it compares whole responses."""
    return batch


def dpo_loss(options: DPO, batch: Batch, now: Outputs) -> tuple[Tensor, Metrics]:
    """The best against the worst response of each group."""
    return losses.dpo_loss(batch, now, options.beta)


@dataclass(frozen=True)
class Formulas:
    """What one algorithm computes; `options` are its own."""

    advantages: Callable[[Any, Batch], Batch]
    loss: Callable[[Any, Batch, Outputs], tuple[Tensor, Metrics]]


FORMULAS: dict[type[Algorithm], Formulas] = {
    PPO: Formulas(ppo_advantages, ppo_loss),
    Reinforce: Formulas(reinforce_advantages, reinforce_loss),
    RLOO: Formulas(rloo_advantages, rloo_loss),
    GRPO: Formulas(grpo_advantages, grpo_loss),
    DPO: Formulas(dpo_advantages, dpo_loss),
}


def next_kl_coef(coef: float, kl: float, target: float, responses: int, horizon: int = 10_000) -> float:
    """Adaptive KL (Ziegler et al. 2019, sec. 2.2): β ← β (1 + clip(KL / target − 1, −0.2, 0.2) · responses / horizon).

    kl and target in nats a response; `responses` were sampled since the last call. A step of more responses than
    `horizon` counts as `horizon`, or the coefficient could turn negative.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return coef * (1 + error * min(1.0, responses / horizon))


def next_baseline(baseline: float | None, reward: float, decay: float = 0.9) -> float:
    """Exponential running mean of the reward; starts at the first."""
    return reward if baseline is None else decay * baseline + (1 - decay) * reward


def sampled_kl(batch: Batch) -> Tensor:
    """[B]: log π − log π_ref summed over the tokens of each response, at sampling; 0 without a reference."""
    if batch.ref_logprobs is None:
        return torch.zeros_like(batch.rewards)
    return losses.kl_penalty(batch.logprobs, batch.ref_logprobs, batch.mask, "k1").sum(-1)


def _rewards_after_kl(batch: Batch, kl_in: KLPlace) -> Tensor:
    """[B]: r − β KL where the KL belongs in the reward (Ziegler et al. 2019, eq. 2), r where it does not."""
    return batch.rewards - batch.kl_coef * sampled_kl(batch) if kl_in == "reward" and batch.kl_coef else batch.rewards


def _spread(batch: Batch, per_response: Tensor) -> Batch:
    """The batch with one advantage a response, [B], at each of its tokens."""
    return replace(batch, advantages=per_response[:, None] * batch.mask)


def _kl_loss(batch: Batch, now: Outputs, kl_in: KLPlace, over: Over) -> Tensor | float:
    """β k3, brought together as the policy's own term is; 0 where the KL is in the reward, or there is no reference."""
    if kl_in == "reward" or batch.ref_logprobs is None or not batch.kl_coef:
        return 0.0
    return batch.kl_coef * losses.aggregate(
        losses.kl_penalty(now.logprobs, batch.ref_logprobs, batch.mask), batch, over
    )
