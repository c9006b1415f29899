"""The loop: sample → replay → reward → advantage → update.

Every random draw and the order of the data are functions of (seed, step), so a step depends on nothing but the state
in the checkpoint. Evaluation and printing are given as functions; this module does neither.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from attune.data import Row
from attune.errors import RunFailed
from attune.files import atomic_dir, require_space
from attune.learn import checkpoint
from attune.learn.algorithms import Batch, next_kl_coef
from attune.learn.learner import Learner
from attune.learn.losses import LossInputs
from attune.learn.options import TrainConfig
from attune.learn.record import Record
from attune.learn.stopping import reason_to_stop
from attune.model.policy import Policy
from attune.reward.named import Reward
from attune.types import Prompts, Rollout, Scores

Metrics = dict[str, float]
OnStep = Callable[[int, Metrics], None]


@dataclass(frozen=True)
class Trained:
    """How a run ended."""

    steps: int
    """Steps done."""
    stopped: str | None
    """Why it stopped early, in plain words; None when it ran to its end."""
    interrupted: bool
    """Stopped by Ctrl-C, with a checkpoint."""


def train(
    config: TrainConfig,
    policy: Policy,
    rows: Sequence[Row],
    run: Path,
    *,
    resume: bool = False,
    on_step: OnStep = lambda step, metrics: None,
) -> Trained:
    """Train `policy` in place on the prompts of `rows`, writing the run to the folder `run`.

    Raises `RunFailed` when loss or gradient stop being numbers, or the disk is full.
    """
    accelerator = Accelerator(cpu=policy.device.type == "cpu", log_with=list(config.trackers) or None, project_dir=run)
    encoded = policy.encode([row.prompt for row in rows], [row.answers for row in rows])
    record = Record(run, config, accelerator)
    trainer = _Trainer(config, policy, encoded, accelerator, record)
    if resume:
        trainer.resume()
    trainer.start()
    stopped, interrupted = None, False
    try:
        for step in range(trainer.progress.step, config.steps):
            on_step(step + 1, trainer.step(step))
            stopped = reason_to_stop(record.history, config.stopping)
            if stopped or step + 1 == config.steps or (step + 1) % config.save_every == 0:
                trainer.save()
            if stopped:
                break
    except KeyboardInterrupt:
        interrupted = True
        trainer.save()
    if not interrupted:
        trainer.finish()
    record.close()
    return Trained(trainer.progress.step, stopped, interrupted)


class _Trainer:
    """The state of a run and the one step that changes it."""

    def __init__(
        self, config: TrainConfig, policy: Policy, prompts: Prompts, accelerator: Accelerator, record: Record
    ) -> None:
        self.config, self.policy, self.prompts = config, policy, prompts
        self.accelerator, self.record = accelerator, record
        algorithm = config.algorithm
        self.reward = Reward.resolve(config.reward, policy)
        wants_reference = algorithm.needs_reference or config.kl_coef > 0
        self.reference = (self.reward.reference or policy.reference()) if wants_reference else None
        self.learner = Learner(policy, algorithm.needs_value_head)
        self.parameters = self.learner.trained()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.wrapped = accelerator.prepare_model(self.learner)
        self.progress = checkpoint.Progress(kl_coef=config.kl_coef)

    def resume(self) -> None:
        folder = checkpoint.latest(self.record.run)
        assert folder is not None, "new_run_dir(resume=True) found a checkpoint"
        self.progress = checkpoint.restore(folder, self.parameters, self.optimizer)
        self.reward.copy_weights = self.record.load_heads(self.policy.device)
        self.record.rewind(self.progress.step)

    def start(self) -> None:
        """Measure the copy heads once, on the untrained policy, and keep them with the run."""
        if self.reward.copy_weights is None and self.reward.needs_heads:
            some = self.prompts.select(torch.tensor(self._order(0)[: 4 * self.config.prompts_per_step]))
            self.reward.copy_weights = self.reward.measure(some)
            self.record.save_heads(self.reward.copy_weights)

    def step(self, step: int) -> Metrics:
        """One step of training; its metrics, as docs/metrics.md defines them."""
        config, algorithm, clock = self.config, self.config.algorithm, _Clock()
        torch.manual_seed(self._seed(step))
        with clock("sample"):
            prompts = self.prompts.select(torch.tensor(self._batch(step), device=self.prompts.ids.device))
            rollout = self.policy.sample(
                prompts, config.num_samples, sampling=config.sampling, seed=self._seed(step)
            )
        with clock("score"):
            scores = self.reward(rollout, self.policy)
            reference = self._reference_logprobs(rollout, scores)
        with clock("update"):
            batch = self._batch_of(rollout, scores, reference)
            targets = algorithm.advantages(batch)
            metrics = self._update(step, rollout, batch, targets)
        return self._finish_step(step, rollout, scores, batch, metrics, clock)

    def _batch_of(self, rollout: Rollout, scores: Scores, reference: Tensor | None) -> Batch:
        assert rollout.logprobs is not None
        values = None
        if self.learner.value_head is not None:
            with torch.no_grad():
                values = self._forward_all(rollout)
        return Batch(
            rewards=scores.reward,
            group=rollout.prompt_index,
            mask=rollout.response_mask,
            logprobs=rollout.logprobs,
            ref_logprobs=reference,
            values=values,
            kl_coef=self.progress.kl_coef,
            baseline=self.progress.baseline,
        )
