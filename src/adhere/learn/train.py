"""The loop: sample → read → reward → advantages → update.

Every random draw and the order of the data are functions of (seed, step), so a step depends on nothing but the state
in the checkpoint. Evaluation and printing belong to the caller.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor, nn

from adhere.data import Row
from adhere.errors import RunFailed, UserError
from adhere.files import atomic_dir, require_space
from adhere.learn import checkpoint
from adhere.learn.advantages import differing
from adhere.learn.algorithms import next_baseline, next_kl_coef, with_advantages
from adhere.learn.batch import Batch
from adhere.learn.drawn import Drawn, counted, draw_groups
from adhere.learn.launch import accelerator
from adhere.learn.learner import Learner
from adhere.learn.run_log import RunLog
from adhere.learn.settings import TrainConfig
from adhere.learn.stopping import asked_to_stop, reason_to_stop
from adhere.learn.update import totals_of, update, values_of
from adhere.model import adapters
from adhere.model.policy import Policy
from adhere.model.precision import quantised, require_finite
from adhere.progress import phase
from adhere.reward.heads import FILE_NAME, CopyHeads, load_heads
from adhere.reward.named import Reads, config_of
from adhere.reward.reward import Reward
from adhere.text import normalise_answer
from adhere.types import Rollout, Scores

Metrics = dict[str, float]
OnStep = Callable[[Metrics], None]


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
    reward: Reward | None = None,
    resume: bool = False,
    on_start: Callable[[], None] = lambda: None,
    on_step: OnStep = lambda metrics: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Trained:
    """Train `policy` in place on the prompts of `rows`, writing the run to the folder `run`.

    `reward`: what `config` names, where the caller has made it already; its reader must be frozen. `on_start` is called
    when all is checked and nothing is written yet, `on_step` with the metrics of each step, `warn` where a run that is
    resumed does not go on from its last checkpoint: that is damaged, or there is none yet.
    Raises `RunFailed` when the loss or a weight stops being a number, the disk is full or the folder is removed; the
    last checkpoint stays.
    """
    trainer = Trainer(config, policy, rows, run, reward=reward, resume=resume, on_start=on_start, warn=warn)
    stopped, done = None, False
    try:
        with asked_to_stop() as pressed:
            first = trainer.state.step
            for _ in policy.progress(range(first, config.steps), "training", config.steps, done=first):
                if stopped or pressed:
                    break
                on_step(trainer.step())
                stopped = reason_to_stop(trainer.log.history, config.stopping)
                if trainer.state.step % config.save_every == 0:
                    trainer.save()
            trainer.save()
        if not pressed:
            trainer.save_model()
        done = True
    finally:  # a tracker that is not closed may lose its last rows
        trainer.log.close(failed=not done)
    return Trained(trainer.state.step, stopped, bool(pressed))


class Trainer:
    """The state of a run, and the step that changes it."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        rows: Sequence[Row],
        run: Path,
        *,
        reward: Reward | None = None,
        resume: bool = False,
        on_start: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.config, self.policy, self.run = config, policy, run
        self.accelerator = accelerator(policy.device, config.dtype)
        policy.prepare_training(config.dtype)
        if config.leaves_model and quantised(policy.model):
            raise UserError("an adapter cannot be merged into quantised weights", fix="use --save adapter")
        with phase(policy.progress, "encoding prompts"):
            self.prompts = policy.encode(
                [row.prompt for row in rows], [row.answers for row in rows], [row.where for row in rows]
            )
        self._check_lengths(rows)
        spec = reward.config if reward is not None else config_of(config.reward)
        heads, own = (reward.heads, reward.functions) if reward is not None else (self._heads(resume), None)
        holds = config.algorithm.needs_reference or config.algorithm.kl_coef > 0
        scores = spec.scorer == "reference" and spec.reads != Reads.TEXT
        brought = reward.reference if reward is not None and reward.reference is not policy else None
        # Taken now: what the policy is at the start.
        self.reference = (brought or policy.reference()) if holds or scores else None
        self.reward = Reward(spec, policy, heads, self.reference, own)
        self.learner = Learner(policy, config.algorithm.needs_value_head, config.max_tokens)
        self.parameters = self.learner.trained()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        _same_everywhere(self.accelerator, self.parameters)
        self.state = checkpoint.TrainState(kl_coef=config.algorithm.kl_coef, options=config.resumes_with)
        begun = self._begun(warn) if resume else None
        if begun is not None:
            self.state = checkpoint.restore(begun, self.parameters, self.optimizer, config.resumes_with)
            if config.algorithm.kl_target is None:  # fixed: a run that stopped early may go on with another
                self.state.kl_coef = config.algorithm.kl_coef
        on_start()
        self._saved = self.state.step if begun else None
        if resume and self.accelerator.is_main_process:
            checkpoint.set_aside(run, self.state.step)
        self.log = RunLog(run, config, self.accelerator, self.state.step if resume else None)
        self.log.save_heads(self.reward.heads)

    def step(self) -> Metrics:
        """Take the next step; its metrics, as docs/metrics.md defines them."""
        config, clock, step = self.config, _Clock(), self.state.step
        drawn = self._drawn(step, clock)
        learned = drawn.learned() if config.dynamic_sampling else drawn
        with clock("update"):
            batch = self._batch(learned.rollout, learned.scores.reward, learned.reference)
            batch = with_advantages(config.algorithm, batch)
            metrics = update(self.accelerator, self.learner, self._optimizer_at(step), config, learned.rollout, batch)
        metrics |= self._metrics(drawn.rollout, drawn.scores, drawn.reference, clock)
        if config.dynamic_sampling:
            metrics |= counted(self.accelerator, drawn, learned)
        self._advance(metrics, len(drawn.rollout))
        self.log.metrics(metrics)
        self.log.responses(step + 1, drawn.rollout, drawn.scores, learned.among(drawn.rollout, batch.advantages))
        return metrics

    def save(self) -> None:
        """Write a checkpoint of the step just done, unless there is one, and drop the oldest."""
        folder = self.run / "checkpoints" / f"step-{self.state.step}"
        if self.accelerator.is_main_process and self._saved != self.state.step:
            self.log.require_folder()
            require_space(self.run, 3 * sum(p.numel() * p.element_size() for p in self.parameters.values()))
            with phase(self.policy.progress, "saving a checkpoint"):
                checkpoint.save(folder, self.parameters, self.optimizer, self.state)
            checkpoint.prune(self.run, self.config.keep_checkpoints)
        self._saved = self.state.step
        self.accelerator.wait_for_everyone()

    def save_model(self) -> None:
        """Write the trained model to `model/`, for AutoModel, and its adapter to `adapter/`, for PEFT, as asked."""
        if self.accelerator.is_main_process:
            if self.config.leaves_model:
                require_space(self.run, 4 * sum(p.numel() for p in self.policy.network.parameters()))
                with phase(self.policy.progress, "saving the model"), atomic_dir(self.run / "model") as building:
                    self.policy.save(building)
            if self.config.leaves_adapter and isinstance(self.policy.model, PeftModel):
                with atomic_dir(self.run / "adapter") as building:
                    adapters.save(self.policy.model, building)
        self.accelerator.wait_for_everyone()

    def _begun(self, warn: Callable[[str], None]) -> Path | None:
        """The checkpoint that a resumed run goes on from; None where it was stopped before its first one."""
        found, damaged = checkpoint.newest_sound(self.run)
        if found is None:
            warn(f"{self.run} holds no checkpoint yet: the run starts over")
        elif damaged:
            warn(f"damaged: {', '.join(damaged)}; going on from {found.name}, and what came after it is done again")
        return found

    def _heads(self, resume: bool) -> CopyHeads | None:
        """The copy heads that the run began with, or that the user gave; None: those of the model."""
        if resume and (self.run / FILE_NAME).is_file():
            return load_heads(self.run)
        return load_heads(self.config.heads) if self.config.heads is not None else None

    def _places(self, step: int) -> Tensor:
        """Indices of all processes' prompts at `step`: each epoch is a fresh permutation, walked without gaps."""
        config = self.config
        total = len(self.prompts)
        first = step * config.prompts_per_step
        wanted = [divmod(place, total) for place in range(first, first + config.prompts_per_step)]
        orders = {epoch: random.Random(f"{config.seed}/{epoch}").sample(range(total), total) for epoch, _ in wanted}
        return torch.tensor([orders[epoch][place] for epoch, place in wanted], device=self.prompts.ids.device)

    def _drawn(self, step: int, clock: _Clock) -> Drawn:
        """What this process draws at `step`: responses to its prompts, with dynamic sampling to further ones too."""
        places, tries = self._places(step), self.config.dynamic_sampling

        def draw(places: Tensor, tried: int) -> Drawn:
            seed = _seed(self.config.seed, step, self.accelerator.process_index, tried)
            torch.manual_seed(seed)
            with clock("sample"):
                prompts = self.prompts.select(places)
                rollout, reading = self.reward.sample(
                    self.policy, prompts, self.config.num_samples, self.config.sampling, seed
                )
            with clock("score"):
                evidence = self.reward.evidence(rollout, self.reward.reference or self.policy, reading)
                scores = self.reward.score_evidence(evidence, training=True)
                return Drawn(rollout, replace(scores, reading=None), self._reference_logprobs(rollout, scores))

        spare = self._spare(step, places) if tries else places[:0]
        return draw_groups(self.accelerator, draw, self.prompts, places, spare, tries)

    def _spare(self, step: int, places: Tensor) -> Tensor:
        """The prompts that are not in `places`, in an order that depends on the step alone, as all that is drawn."""
        total = len(self.prompts)
        order = torch.tensor(random.Random(f"{self.config.seed}/spare/{step}").sample(range(total), total))
        return order.to(places)[~torch.isin(order.to(places), places)]

    def _check_lengths(self, rows: Sequence[Row]) -> None:
        if self.config.prompts_per_step % self.accelerator.num_processes:
            raise UserError(
                f"prompts_per_step is {self.config.prompts_per_step}, for {self.accelerator.num_processes} processes",
                fix="set prompts_per_step to a multiple",
            )
        self.policy.check_room(self.prompts, self.config.sampling.max_new_tokens, [row.where for row in rows])

    def _reference_logprobs(self, rollout: Rollout, scores: Scores) -> Tensor | None:
        """[B, R]: from the scorer's own reading when the reference scored, else from one forward more."""
        if self.reference is None:
            return None
        if self.reward.reference is not None and scores.reading is not None:
            return scores.reading.logprobs
        return self.reference.read(rollout, attention=False, spread=()).logprobs

    def _optimizer_at(self, step: int) -> torch.optim.Optimizer:
        """The optimiser at the learning rate of `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        return self.optimizer

    def _batch(self, rollout: Rollout, rewards: Tensor, reference: Tensor | None) -> Batch:
        """What this step learns from, but for the advantages."""
        assert rollout.logprobs is not None, "training needs sampled responses"
        valued = self.config.algorithm.needs_value_head
        return Batch(
            rewards,
            rollout.prompt_index,
            rollout.response_mask,
            rollout.logprobs,
            totals_of(self.accelerator, rollout),
            reference,
            values_of(self.learner, rollout) if valued else None,
            self.state.kl_coef,
            self.state.baseline,
            self.config.sampling.max_new_tokens,
        )

    def _metrics(self, rollout: Rollout, scores: Scores, reference: Tensor | None, clock: _Clock) -> Metrics:
        lengths, rewards = rollout.lengths.float(), scores.reward
        raw = torch.zeros_like(rewards)
        for name, weight in self.reward.config.weights.items():
            raw = raw + weight * scores.signals[name].to(raw)
        everyone = self.accelerator.gather(raw)
        own = {
            "reward": float(raw.mean()),
            "reward/normalised": float(rewards.mean()),
            "reward_std": float(everyone.std()) if len(everyone) > 1 else 0.0,
            "frac_reward_zero_std": float((~differing(rewards, rollout.prompt_index)).float().mean()),
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float((~rollout.ended).float().mean()),
            "completions/agreement": _agreement(rollout),
            "completions/one_text": _one_text(rollout),
            **{f"signals/{name}": float(values.mean()) for name, values in scores.signals.items()},
        }
        if reference is not None and rollout.logprobs is not None:
            own["kl"] = float(((rollout.logprobs - reference) * rollout.response_mask).sum(-1).mean())
        tokens = float(rollout.lengths.sum()) * self.accelerator.num_processes
        names = sorted(own)
        shared = self.accelerator.reduce(torch.tensor([own[name] for name in names]).to(self.policy.device), "mean")
        return {
            "step": self.state.step + 1,
            **dict(zip(names, shared.tolist(), strict=True)),
            "learning_rate": self.config.rate(self.state.step),
            "kl_coef": self.state.kl_coef,
            "tokens_per_second": tokens / clock.total(),
            **{f"seconds/{name}": taken for name, taken in clock.seconds.items()},
        }

    def _advance(self, metrics: Metrics, responses: int) -> None:
        """What the next step carries on from this one. Raises `RunFailed` where there is nothing to carry on from."""
        state, kl_target = self.state, self.config.algorithm.kl_target
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            raise RunFailed(
                f"step {state.step + 1}: loss is {metrics['loss']}, gradient norm {metrics['grad_norm']}",
                fix="lower learning_rate, or use --dtype float32; the last checkpoint is sound: --resume",
            )
        require_finite(self.parameters.items(), f"step {state.step + 1}: ")
        state.step += 1
        state.baseline = next_baseline(state.baseline, metrics["reward/normalised"])
        if kl_target is not None:
            state.kl_coef = next_kl_coef(state.kl_coef, metrics["kl"], kl_target, responses)


class _Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())


def _agreement(rollout: Rollout) -> float:
    """Mean over groups of the share of samples that say, word for word, what most of their group say."""
    return fmean(max(count.values()) / count.total() for count in _said(rollout, str))


def _one_text(rollout: Rollout) -> float:
    """The largest share of all responses that are one text, of the texts that answer more than one prompt."""
    groups = _said(rollout, normalise_answer)
    spread = Counter(text for count in groups for text in count)
    most = max((sum(count[text] for count in groups) for text, among in spread.items() if among > 1), default=0)
    return most / len(rollout.responses)


def _said(rollout: Rollout, spelled: Callable[[str], str]) -> list[Counter[str]]:
    """How often each group says each text, as `spelled`."""
    said: dict[int, Counter[str]] = {}
    for group, response in zip(rollout.prompt_index.tolist(), rollout.responses, strict=True):
        said.setdefault(group, Counter())[spelled(response)] += 1
    return list(said.values())


def _same_everywhere(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every process the first one's weights: a fresh adapter is drawn at random."""
    if accelerator.num_processes > 1:
        for parameter in parameters.values():
            broadcast(parameter.data)


def _seed(seed: int, step: int, rank: int, tried: int) -> int:
    """Of what a process draws at a step: `tried` counts the rounds of dynamic sampling."""
    return random.Random(f"{seed}/{step}/{rank}" + (f"/{tried}" if tried else "")).getrandbits(63)
