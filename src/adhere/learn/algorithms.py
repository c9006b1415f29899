"""The algorithms: each a choice of advantage and loss, with the options that are its own.

An algorithm turns a `Batch` into `Targets` once a step, then `LossInputs` into a loss for every micro-batch. Where the
KL divergence from the reference enters (in the reward, before advantages, or in the loss) is the algorithm's `kl_in`;
how strongly, `kl_coef`, comes with the batch, because a controller may adapt it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adhere.errors import UserError
from adhere.learn import advantages, losses
from adhere.learn.losses import LossInputs, Metrics, Over


@dataclass(frozen=True)
class Batch:
    """A scored rollout, as the advantage sees it. Padding is never read."""

    rewards: Tensor
    """[B] float32."""
    group: Tensor
    """[B] int64."""
    mask: Tensor
    """[B, R] bool."""
    logprobs: Tensor
    """[B, R] under the policy that sampled."""
    ref_logprobs: Tensor | None
    """[B, R]."""
    values: Tensor | None
    """[B, R]."""
    kl_coef: float
    baseline: float | None
    """Running mean reward; None for the mean of this batch."""

    def kl(self) -> Tensor:
        """[B]: log π − log π_ref summed over the tokens of each response; 0 without a reference."""
        if self.ref_logprobs is None:
            return torch.zeros_like(self.rewards)
        return losses.kl_penalty(self.logprobs, self.ref_logprobs, self.mask, "k1").sum(-1)

    def rewards_after_kl(self, kl_in: KLPlace) -> Tensor:
        """[B]: r − β KL where the KL belongs in the reward (Ziegler et al. 2019, eq. 2), r where it does not."""
        return self.rewards - self.kl_coef * self.kl() if kl_in == "reward" and self.kl_coef else self.rewards

    def spread(self, per_response: Tensor) -> Tensor:
        """[B] → [B, R], 0 on padding."""
        return per_response[:, None] * self.mask


@dataclass(frozen=True)
class Targets:
    """What the losses of a step aim at."""

    advantages: Tensor
    """[B, R]."""
    returns: Tensor | None = None
    """[B, R], for the value head."""


KLPlace = Literal["reward", "loss"]


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with a value head (Schulman et al. 2017; Ziegler et al. 2019)."""

    name: ClassVar[str] = "ppo"
    needs_value_head: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    epochs: int = 2
    """Passes over each rollout."""
    clip_low: float = 0.2
    """How far below 1 the probability ratio may fall before it is clipped."""
    clip_high: float = 0.2
    """How far above 1 the probability ratio may rise before it is clipped."""
    gamma: float = 1.0
    """Discount a token."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation: 0 trusts the value head, 1 the outcome."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float = 0.2
    """How far a value may move from what it was at sampling."""
    kl_in: KLPlace = "reward"
    """Where KL from the start is charged: off the reward, or added to the loss."""

    def __post_init__(self) -> None:
        _check(
            *_ratio_faults(self.epochs, self.clip_low, self.clip_high),
            *_range_faults("gamma", self.gamma, most=1),
            *_range_faults("gae_lambda", self.gae_lambda, most=1),
            *_range_faults("value_coef", self.value_coef),
            *_range_faults("value_clip", self.value_clip),
            *_choice_faults("kl_in", self.kl_in, KL_PLACES),
        )

    def targets(self, batch: Batch) -> Targets:
        assert batch.values is not None
        kl_coef = batch.kl_coef if self.kl_in == "reward" else 0.0
        rewards = advantages.token_rewards(batch.rewards, batch.logprobs, batch.ref_logprobs, batch.mask, kl_coef)
        gained, returns = advantages.gae(rewards, batch.values, batch.mask, self.gamma, self.gae_lambda)
        return Targets(advantages.whiten(gained, batch.mask), returns)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.clipped_loss(inputs, self.clip_low, self.clip_high)
        value, more = losses.value_loss(inputs, self.value_clip)
        return policy + self.value_coef * value + _kl_loss(inputs, self.kl_in, "token"), metrics | more


@dataclass(frozen=True)
class Reinforce:
    """REINFORCE with a running-mean baseline (Williams 1992). One pass over each rollout, as its gradient asks; the
    loss is a mean over tokens: the sum over each response, averaged over responses, over their mean length."""

    name: ClassVar[str] = "reinforce"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    epochs: ClassVar[int] = 1

    kl_in: KLPlace = "reward"
    """Where KL from the start is charged: off the reward, or added to the loss."""

    def __post_init__(self) -> None:
        _check(*_choice_faults("kl_in", self.kl_in, KL_PLACES))

    def targets(self, batch: Batch) -> Targets:
        return Targets(batch.spread(advantages.baseline(batch.rewards_after_kl(self.kl_in), batch.baseline)))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.policy_gradient_loss(inputs)
        return policy + _kl_loss(inputs, self.kl_in, "token"), metrics


@dataclass(frozen=True)
class RLOO:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the other samples of the prompt are the baseline, the response is
    one action. The first pass has ratio 1, and so the plain score-function gradient; clipping acts from the second."""

    name: ClassVar[str] = "rloo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """How far below 1 the probability ratio may fall before it is clipped."""
    clip_high: float = 0.2
    """How far above 1 the probability ratio may rise before it is clipped."""
    kl_in: KLPlace = "reward"
    """Where KL from the start is charged: off the reward, or added to the loss."""

    def __post_init__(self) -> None:
        _check(
            *_ratio_faults(self.epochs, self.clip_low, self.clip_high),
            *_choice_faults("kl_in", self.kl_in, KL_PLACES),
        )

    def targets(self, batch: Batch) -> Targets:
        return Targets(batch.spread(advantages.leave_one_out(batch.rewards_after_kl(self.kl_in), batch.group)))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.sequence_clipped_loss(inputs, self.clip_low, self.clip_high)
        return policy + _kl_loss(inputs, self.kl_in, "sum"), metrics


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation (Shao et al. 2024)."""

    name: ClassVar[str] = "grpo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """How far below 1 the probability ratio may fall before it is clipped."""
    clip_high: float = 0.2
    """How far above 1 the probability ratio may rise before it is clipped; 0.28 is DAPO's clip-higher."""
    scale: Literal["group", "batch", "none"] = "group"
    """Rewards are divided by the deviation of the group, of the batch, or (Dr. GRPO) not."""
    loss_over: Literal["token", "sequence"] = "token"
    """Mean over all tokens (DAPO), or over responses of their means (the original)."""
    kl_in: KLPlace = "loss"
    """Where KL from the start is charged: off the reward, or added to the loss."""

    def __post_init__(self) -> None:
        _check(
            *_ratio_faults(self.epochs, self.clip_low, self.clip_high),
            *_choice_faults("scale", self.scale, advantages.SCALES),
            *_choice_faults("loss_over", self.loss_over, ("token", "sequence")),
            *_choice_faults("kl_in", self.kl_in, KL_PLACES),
        )

    def targets(self, batch: Batch) -> Targets:
        rewards = batch.rewards_after_kl(self.kl_in)
        return Targets(batch.spread(advantages.group_relative(rewards, batch.group, self.scale)))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.clipped_loss(inputs, self.clip_low, self.clip_high, self.loss_over)
        return policy + _kl_loss(inputs, self.kl_in, self.loss_over), metrics


@dataclass(frozen=True)
class DPO:
    """Iterative direct preference optimisation (Rafailov et al. 2023): best against worst of each round's samples.
    `beta` holds the policy to the reference, so `kl_coef` has no part in it."""

    name: ClassVar[str] = "dpo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    epochs: int = 1
    """Passes over each rollout."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""

    def __post_init__(self) -> None:
        _check(*_epoch_faults(self.epochs), *_range_faults("beta", self.beta, above=True))

    def targets(self, batch: Batch) -> Targets:
        return Targets(torch.zeros_like(batch.logprobs))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return losses.dpo_loss(inputs, self.beta)


Algorithm = PPO | Reinforce | RLOO | GRPO | DPO

ALGORITHMS: dict[str, type[Algorithm]] = {cls.name: cls for cls in (PPO, Reinforce, RLOO, GRPO, DPO)}
"""Name → algorithm."""

KL_PLACES = ("reward", "loss")


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


def _kl_loss(inputs: LossInputs, kl_in: KLPlace, over: Over) -> Tensor | float:
    """β k3, brought together as the policy's own term is; 0 where the KL is in the reward, or there is no reference."""
    if kl_in == "reward" or inputs.ref_logprobs is None or not inputs.kl_coef:
        return 0.0
    per_token = losses.kl_penalty(inputs.logprobs, inputs.ref_logprobs, inputs.mask, "k3")
    return inputs.kl_coef * losses.aggregate(per_token, inputs, over)


def _check(*faults: UserError) -> None:
    """Raise all faults of an algorithm's options together."""
    if faults:
        raise faults[0] if len(faults) == 1 else UserError("; ".join(str(fault) for fault in faults))


def _epoch_faults(epochs: int) -> list[UserError]:
    return [UserError(f"epochs is {epochs}", fix="set it to 1 or above")] if epochs < 1 else []


def _ratio_faults(epochs: int, clip_low: float, clip_high: float) -> list[UserError]:
    return [
        *_epoch_faults(epochs),
        *_range_faults("clip_low", clip_low, most=1, above=True),
        *_range_faults("clip_high", clip_high, above=True),
    ]


def _range_faults(name: str, value: float, most: float = float("inf"), above: bool = False) -> list[UserError]:
    """The fault of a value outside [0, most], or outside (0, most] with `above`; NaN is outside."""
    if (value > 0 if above else value >= 0) and value <= most:
        return []
    least = "above 0" if above else "to 0 or above"
    limit = f", at most {most:g}" if most < float("inf") else ""
    return [UserError(f"{name} is {value}", fix=f"set it {least}{limit}")]


def _choice_faults(name: str, value: str, choices: tuple[str, ...]) -> list[UserError]:
    return [UserError(f"{name} is {value!r}", fix=f"use one of {', '.join(choices)}")] if value not in choices else []
