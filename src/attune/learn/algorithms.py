"""The algorithms: each a choice of advantage and loss, with the options that are its own.

An algorithm turns a `Batch` into `Targets` once a step, then `LossInputs` into a loss for every micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attune.errors import UserError
from attune.learn import advantages, losses
from attune.learn.losses import LossInputs, Metrics, aggregate


@dataclass(frozen=True)
class Batch:
    """A scored rollout, as the advantage sees it."""

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
    """Running mean reward."""

    def kl(self) -> Tensor:
        """[B]: log π − log π_ref summed over the tokens of each response; 0 without a reference."""
        if self.ref_logprobs is None:
            return torch.zeros_like(self.rewards)
        return ((self.logprobs - self.ref_logprobs) * self.mask).sum(-1)

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


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with a value head (Schulman et al. 2017; Ziegler et al. 2019): KL in the reward."""

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

    def __post_init__(self) -> None:
        _check_passes(self.epochs)
        _check_shares(gamma=self.gamma, gae_lambda=self.gae_lambda)

    def targets(self, batch: Batch) -> Targets:
        assert batch.values is not None
        rewards = advantages.token_rewards(
            batch.rewards, batch.logprobs, batch.ref_logprobs, batch.mask, batch.kl_coef
        )
        gained, returns = advantages.gae(rewards, batch.values, batch.mask, self.gamma, self.gae_lambda)
        return Targets(advantages.whiten(gained, batch.mask), returns)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.clipped_surrogate(inputs, self.clip_low, self.clip_high)
        value, more = losses.value_loss(inputs, self.value_clip)
        return aggregate(policy, inputs, "token") + self.value_coef * value, metrics | more


@dataclass(frozen=True)
class Reinforce:
    """REINFORCE with a running-mean baseline (Williams 1992): KL in the reward."""

    name: ClassVar[str] = "reinforce"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    epochs: ClassVar[int] = 1

    def targets(self, batch: Batch) -> Targets:
        rewards = batch.rewards - batch.kl_coef * batch.kl()
        baseline = float(rewards.mean()) if batch.baseline is None else batch.baseline
        return Targets(batch.spread(rewards - baseline))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.policy_gradient(inputs)
        return aggregate(policy, inputs, "token"), metrics


@dataclass(frozen=True)
class RLOO:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the other samples of the prompt are the baseline; KL in the
    reward."""

    name: ClassVar[str] = "rloo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """How far below 1 the probability ratio may fall before it is clipped."""
    clip_high: float = 0.2
    """How far above 1 the probability ratio may rise before it is clipped."""

    def __post_init__(self) -> None:
        _check_passes(self.epochs)

    def targets(self, batch: Batch) -> Targets:
        rewards = batch.rewards - batch.kl_coef * batch.kl()
        return Targets(batch.spread(advantages.leave_one_out(rewards, batch.group)))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.clipped_surrogate(inputs, self.clip_low, self.clip_high)
        return aggregate(policy, inputs, "token"), metrics


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation (Shao et al. 2024): KL in the loss."""

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

    def __post_init__(self) -> None:
        _check_passes(self.epochs)

    def targets(self, batch: Batch) -> Targets:
        return Targets(batch.spread(advantages.group_relative(batch.rewards, batch.group, self.scale)))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        policy, metrics = losses.clipped_surrogate(inputs, self.clip_low, self.clip_high)
        per_token = policy + inputs.kl_coef * losses.kl_estimate(inputs)
        return aggregate(per_token, inputs, self.loss_over), metrics


@dataclass(frozen=True)
class DPO:
    """Iterative direct preference optimisation (Rafailov et al. 2023): best against worst of each round's samples."""

    name: ClassVar[str] = "dpo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    epochs: int = 1
    """Passes over each rollout."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""

    def __post_init__(self) -> None:
        _check_passes(self.epochs)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}", fix="set it above 0")

    def targets(self, batch: Batch) -> Targets:
        return Targets(torch.zeros_like(batch.logprobs))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        return losses.dpo_loss(inputs, self.beta)


Algorithm = PPO | Reinforce | RLOO | GRPO | DPO


def next_kl_coef(coef: float, kl: float, target: float, responses: int, horizon: int = 10_000) -> float:
    """Adaptive KL (Ziegler et al. 2019, sec. 2.2): grow the coefficient while KL is above target, at most by 20 % of
    responses / horizon."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return coef * (1 + error * responses / horizon)


def next_baseline(baseline: float | None, reward: float, decay: float = 0.9) -> float:
    """Exponential running mean of the reward; starts at the first."""
    return reward if baseline is None else decay * baseline + (1 - decay) * reward


def _check_passes(epochs: int) -> None:
    if epochs < 1:
        raise UserError(f"epochs is {epochs}", fix="set it to 1 or above")


def _check_shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}", fix="set it from 0 to 1")
