"""From a scored rollout to an optimiser step: targets once, then losses and gradients of micro-batches of groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adhere.learn.algorithms import DPO, Batch, Targets
from adhere.learn.learner import Learner, Outputs
from adhere.learn.losses import LossInputs
from adhere.learn.settings import TrainConfig
from adhere.types import Rollout, masked_mean

Metrics = dict[str, float]


@dataclass(frozen=True)
class Update:
    """What an update is made of."""

    rollout: Rollout
    rewards: Tensor
    """[B]."""
    ref_logprobs: Tensor | None
    """[B, R]."""
    kl_coef: float
    baseline: float | None


def update(
    accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer, config: TrainConfig, given: Update
) -> tuple[Metrics, Tensor | None]:
    """Change the policy once (or `epochs` times) towards the rewards.

    Gives loss, entropy, gradient norm and the loss's own metrics, of the last pass; and the advantage of each response,
    [B], the mean over its tokens: the same at each, but in PPO. None where the algorithm has none."""
    rollout, algorithm = given.rollout, config.algorithm
    assert rollout.logprobs is not None, "training needs sampled responses"
    values = _values(learner, rollout) if algorithm.needs_value_head else None
    batch = Batch(
        given.rewards, rollout.prompt_index, rollout.response_mask, rollout.logprobs, given.ref_logprobs, values,
        given.kl_coef, given.baseline,
    )  # fmt: skip
    targets = algorithm.targets(batch)
    totals = _totals(accelerator, rollout)

    def gradients(max_tokens: int) -> dict[str, Tensor]:
        optimizer.zero_grad()  # of a pass that memory did not suffice for
        metrics: dict[str, Tensor] = {}
        for part, rows, columns, _ in rollout.chunks(max_tokens):
            out: Outputs = learner(part)
            inputs = _inputs(batch, targets, out, rows, columns, totals)
            loss, own = algorithm.loss(inputs)
            accelerator.backward(loss)
            own["loss"] = loss.detach()
            own["entropy"] = out.entropy.sum() / totals.num_tokens
            metrics = {name: metrics.get(name, 0.0) + value.detach() for name, value in own.items()}
        return metrics

    metrics: dict[str, Tensor] = {}
    for _ in range(algorithm.epochs):
        metrics = learner.budget.run(gradients, rollout.largest_group)
        _sum_gradients(accelerator, learner)
        norm = accelerator.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        if norm is not None and torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        metrics = {name: accelerator.reduce(value, "sum") for name, value in metrics.items()}
        metrics["grad_norm"] = torch.as_tensor(norm)
    advantages = None if isinstance(algorithm, DPO) else masked_mean(targets.advantages, rollout.response_mask)
    return {name: float(value) for name, value in metrics.items()}, advantages


def _sum_gradients(accelerator: Accelerator, learner: nn.Module) -> None:
    """Add up the gradients of all processes, once a step: the totals in every loss are already over all of them.

    DistributedDataParallel would do it at every backward, and wait forever where processes have different numbers of
    micro-batches."""
    if accelerator.num_processes == 1:
        return
    for parameter in learner.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "sum")


@dataclass(frozen=True)
class _Totals:
    num_tokens: int
    num_responses: int
    num_groups: int


def _totals(accelerator: Accelerator, rollout: Rollout) -> _Totals:
    counts = torch.tensor(
        [int(rollout.response_mask.sum()), len(rollout), len(rollout.prompts)], device=rollout.response_ids.device
    )
    return _Totals(*(int(n) for n in accelerator.reduce(counts, "sum").tolist()))


@torch.no_grad()
def _values(learner: Learner, rollout: Rollout) -> Tensor:
    """[B, R]: what the value head says before the update."""

    def read(max_tokens: int) -> Tensor:
        values = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
        for part, rows, columns, _ in rollout.chunks(max_tokens):
            values[rows, columns] = learner(part).values
        return values

    return learner.budget.run(read, rollout.largest_group)


def _inputs(batch: Batch, targets: Targets, out: Outputs, rows: slice, columns: slice, totals: _Totals) -> LossInputs:
    def part(tensor: Tensor) -> Tensor:
        return tensor[rows, columns]

    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else part(tensor)

    return LossInputs(
        logprobs=out.logprobs,
        old_logprobs=part(batch.logprobs),
        mask=part(batch.mask),
        advantages=part(targets.advantages),
        rewards=batch.rewards[rows],
        group=batch.group[rows],
        ref_logprobs=maybe(batch.ref_logprobs),
        values=out.values,
        old_values=maybe(batch.values),
        returns=maybe(targets.returns),
        kl_coef=batch.kl_coef,
        num_tokens=totals.num_tokens,
        num_responses=totals.num_responses,
        num_groups=totals.num_groups,
    )
