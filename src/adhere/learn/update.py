"""From a batch with its advantages to an optimiser step: losses and gradients, micro-batch by micro-batch of groups."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from adhere.learn.algorithms import loss_of
from adhere.learn.batch import Batch, Outputs, Totals
from adhere.learn.learner import Learner
from adhere.learn.settings import TrainConfig
from adhere.model.memory import freeing
from adhere.types import Rollout

Metrics = dict[str, float]


def update(
    accelerator: Accelerator,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    rollout: Rollout,
    batch: Batch,
) -> Metrics:
    """Change the policy once (or `epochs` times) towards the rewards of `batch`, which `rollout` got.

    Gives loss, entropy, gradient norm and the loss's own metrics, of the last pass."""

    def gradients(max_tokens: int) -> dict[str, Tensor]:
        optimizer.zero_grad()  # of a pass that memory did not suffice for
        metrics: dict[str, Tensor] = {}
        pieces = freeing(rollout.chunks(max_tokens))
        for chunk in learner.progress(pieces, "updating", len(rollout), size=lambda chunk: len(chunk.rollout)):
            now: Outputs = learner(chunk.rollout)
            loss, own = loss_of(config.algorithm, batch.part(chunk), now)
            accelerator.backward(loss)
            own["loss"] = loss.detach()
            own["entropy"] = now.entropy.sum() / batch.totals.tokens
            metrics = {name: metrics.get(name, 0.0) + value.detach() for name, value in own.items()}
        return metrics

    metrics: dict[str, Tensor] = {}
    for _ in range(config.algorithm.epochs):
        metrics = learner.budget.run(gradients, rollout.largest_group, rollout.tokens(shared=True))
        _sum_gradients(accelerator, learner)
        norm = accelerator.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        if norm is not None and torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        metrics = {name: accelerator.reduce(value, "sum") for name, value in metrics.items()}
        metrics["grad_norm"] = torch.as_tensor(norm)
    return {name: float(value) for name, value in metrics.items()}


def totals_of(accelerator: Accelerator, rollout: Rollout) -> Totals:
    """Sizes of the rollouts of all processes together."""
    counts = torch.tensor(
        [int(rollout.response_mask.sum()), len(rollout), len(rollout.prompts)], device=rollout.response_ids.device
    )
    return Totals(*(int(n) for n in accelerator.reduce(counts, "sum").tolist()))


@torch.no_grad()
def values_of(learner: Learner, rollout: Rollout) -> Tensor:
    """[B, R]: what the value head says of a rollout; 0 on padding."""

    def read(max_tokens: int) -> Tensor:
        values = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
        for chunk in freeing(rollout.chunks(max_tokens)):
            values[chunk.rows, chunk.columns] = learner(chunk.rollout).values
        return values

    return learner.budget.run(read, rollout.largest_group, rollout.tokens(shared=True))


def _sum_gradients(accelerator: Accelerator, learner: Learner) -> None:
    """Add up the gradients of all processes, once a step: the totals in every loss are already over all of them.

    DistributedDataParallel would do it at every backward, and wait forever where processes have different numbers of
    micro-batches."""
    if accelerator.num_processes == 1:
        return
    for parameter in learner.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "sum")
