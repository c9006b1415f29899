"""What a training run is told: the algorithms, each with its own options, and `TrainConfig`, which composes it all.

Imports no torch, so that the command line explains and checks options at once. What an algorithm computes is in
`adhere.learn.algorithms`. Of a class, a `ClassVar` is a fact, any other field an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from adhere.data import Columns
from adhere.errors import UserError
from adhere.learn import trackers
from adhere.learn.stopping import Stopping
from adhere.model.settings import ChatOptions, Lora, Sampling, check_training_dtype
from adhere.options import Above, AtLeast, AtMost, Count, CountOrZero, Seed, check

KLPlace = Literal["reward", "loss"]
Scale = Literal["group", "batch", "none"]
Loss = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]

MOST_DRAWN = 4_000_000_000
"""Tokens of a step: 50 GB of ids and log-probs."""
EPSILONS: dict[Loss, tuple[float, float]] = {
    "dapo": (0.2, 0.2),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),  # 2507.18071, sec. 5.1: a mean over tokens moves far less than one token does
    "cispo": (1.0, 4.0),  # no bound below (2506.13585, sec. 3.1); above, a weight of 5 at most (ScaleRL, 2510.13786)
}
"""Loss → its own epsilon and epsilon_high."""


@dataclass(frozen=True)
class _ChargesKL:
    """The options of every algorithm that charges for KL from the start."""

    kl_coef: Annotated[float, AtLeast(0)] = 0.04
    """Weight of the KL divergence from the start."""
    kl_target: Annotated[float, Above(0)] | None = None
    """Adapt kl_coef to keep KL near this many nats a response; nothing keeps it fixed."""
    kl_in: KLPlace = "reward"
    """Where KL from the start is charged: off the reward, or added to the loss."""

    def __post_init__(self) -> None:
        check(self, *self._faults())

    def _faults(self) -> list[UserError]:
        """What is wrong with options that are valid one by one but not together."""
        if self.kl_target is not None and self.kl_coef == 0:
            return [UserError("kl_target adapts kl_coef, which is 0", fix="set kl_coef above 0 too")]
        return []


@dataclass(frozen=True)
class _Clips(_ChargesKL):
    """The options of PPO's clipping (Schulman et al. 2017), for algorithms with one loss."""

    epsilon: Annotated[float, Above(0), AtMost(1)] = 0.2
    """How far below 1 the probability ratio may fall before it is clipped. Unset in grpo: the loss's own,
    0.2 or (gspo) 0.0003."""
    epsilon_high: Annotated[float, Above(0)] | None = None
    """How far above 1 the probability ratio may rise before it is clipped. Unset: epsilon, or if grpo has
    none either, the loss's own, 0.2, 0.0004 (gspo) or 4 (cispo)."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high


@dataclass(frozen=True)
class PPO(_Clips):
    """Proximal policy optimisation with a value head (Schulman et al. 2017; Ziegler et al. 2019)."""

    name: ClassVar[str] = "ppo"
    needs_value_head: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False

    epochs: Count = 2
    """Passes over each rollout."""
    gamma: Annotated[float, AtLeast(0), AtMost(1)] = 1.0
    """Discount a token."""
    gae_lambda: Annotated[float, AtLeast(0), AtMost(1)] = 0.95
    """Generalised advantage estimation: 0 trusts the value head, 1 the outcome."""
    value_coef: Annotated[float, AtLeast(0)] = 0.1
    """Weight of the value loss."""
    value_clip: Annotated[float, AtLeast(0)] = 0.2
    """How far a value may move from what it was at sampling."""


@dataclass(frozen=True)
class Reinforce(_ChargesKL):
    """REINFORCE with a running-mean baseline (Williams 1992). One pass over each rollout, as its gradient asks; the
    loss is a mean over tokens: the sum over each response, averaged over responses, over their mean length."""

    name: ClassVar[str] = "reinforce"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False
    epochs: ClassVar[int] = 1


@dataclass(frozen=True)
class RLOO(_Clips):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the other samples of the prompt are the baseline, the response is
    one action. The first pass has ratio 1, and so the plain score-function gradient; clipping acts from the second."""

    name: ClassVar[str] = "rloo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = True

    epochs: Count = 1
    """Passes over each rollout."""


@dataclass(frozen=True)
class GRPO(_ChargesKL):
    """Group relative policy optimisation (Shao et al. 2024) and the losses that have grown out of it."""

    name: ClassVar[str] = "grpo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = True

    kl_in: KLPlace = "loss"
    epochs: Count = 1
    """Passes over each rollout."""
    loss: Loss = "dapo"
    """What is minimised (docs/train.md has a table of them): dapo, grpo, dr_grpo, gspo or cispo."""
    epsilon: Annotated[float, Above(0), AtMost(1)] | None = None
    """How far below 1 the probability ratio may fall before it is clipped. Unset in grpo: the loss's own,
    0.2 or (gspo) 0.0003."""
    epsilon_high: Annotated[float, Above(0)] | None = None
    """How far above 1 the probability ratio may rise before it is clipped. Unset: epsilon, or if grpo has
    none either, the loss's own, 0.2, 0.0004 (gspo) or 4 (cispo)."""
    scale_rewards: Scale = "group"
    """Rewards are divided by the deviation of the group, of the batch, or (Dr. GRPO) not."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        low, high = EPSILONS[self.loss] if self.epsilon is None else (self.epsilon, self.epsilon)
        return low, high if self.epsilon_high is None else self.epsilon_high

    def _faults(self) -> list[UserError]:
        faults = super()._faults()
        if self.loss == "cispo" and self.epsilon is not None:
            faults.append(UserError("cispo has no lower bound, so it takes no epsilon", fix="set epsilon_high"))
        return faults


@dataclass(frozen=True)
class DPO:
    """Iterative direct preference optimisation (Rafailov et al. 2023): best against worst of each round's samples.
    `beta` holds the policy to the reference, so KL is charged nowhere else."""

    name: ClassVar[str] = "dpo"
    needs_value_head: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    compares_samples: ClassVar[bool] = True
    kl_coef: ClassVar[float] = 0.0
    kl_target: ClassVar[float | None] = None

    epochs: Count = 1
    """Passes over each rollout."""
    beta: Annotated[float, Above(0)] = 0.1
    """Strength of the pull towards the reference."""

    def __post_init__(self) -> None:
        check(self)


Algorithm = PPO | Reinforce | RLOO | GRPO | DPO


@dataclass(frozen=True)
class TrainConfig:
    """Everything `adhere train` reads; the resolved tree is written to the run as config.yaml.

    >>> config = TrainConfig("toy", "prompts.jsonl", "runs/first", steps=10, warmup_steps=2)
    >>> config.algorithm.name, config.rate(0) < config.rate(1)
    ('grpo', True)
    """

    model: str
    """Model folder or hub id, causal or encoder–decoder."""
    prompts: str
    """Prompts: a JSON Lines, CSV or Parquet file, or a hub id."""
    output: str
    """Folder of the run; must not hold one yet, unless --resume."""
    reward: str | Mapping[str, Any] = "attention"
    """Name of a reward, your own `module:function`, or (in YAML) weights over signals."""
    heads: str | None = None
    """Copy heads that `adhere heads` or a run has saved (default: those of the model, measured where need be)."""
    algorithm: Algorithm = field(default_factory=GRPO)
    """How the reward becomes an update."""
    steps: Count = 100
    """Training steps."""
    prompts_per_step: Count = 16
    """Prompts drawn for each step."""
    num_samples: Count = 8
    """Responses sampled to each prompt (the group)."""
    dynamic_sampling: CountOrZero = 0
    """Drop prompts whose responses all earn the same and draw others in their place, up to this many times a step; 0
    keeps them."""
    sampling: Sampling = field(default_factory=Sampling)
    """How responses are drawn."""
    learning_rate: Annotated[float, Above(0), AtMost(1)] = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: CountOrZero = 5
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up: linear, cosine or constant."""
    weight_decay: Annotated[float, AtLeast(0), AtMost(10)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Above(0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_tokens: Annotated[int, AtLeast(1), AtMost(1_000_000_000)] = 16_384
    """Tokens of one forward and backward, padding included; larger batches are accumulated."""
    seed: Seed = 0
    """Seed of data order and sampling."""
    save_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep."""
    log_samples: CountOrZero = 4
    """Responses written to samples.jsonl at each step."""
    completions_every: CountOrZero = 1
    """Steps between Parquet tables of all completions with their scores; 0 writes none."""
    stopping: Stopping = field(default_factory=Stopping)
    """When to stop early."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    save: Literal["merged", "adapter", "both"] = "both"
    """What a run with --lora leaves: the merged model in model/, adapter/ in PEFT's format, or both."""
    limit: Count | None = None
    """Read the first N prompts only; nothing reads all."""
    columns: Columns = field(default_factory=Columns)
    """How the fields of a row are named."""
    prompting: ChatOptions = field(default_factory=ChatOptions)
    """How prompts are put to the model."""
    dtype: str = "auto"
    """What forwards compute in: float32 (auto too) or bfloat16; the trained weights are float32 in either case."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    attention: str = "auto"
    """auto, or eager for families that bypass transformers' attention interface."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio."""
    push_to_hub: str | None = None
    """Repository of the hub, NAME or OWNER/NAME, that the finished model goes to; private where it has to be made."""
    hub_public: bool = False
    """Make that repository public, where it has to be made."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you know whose code it is."""

    def __post_init__(self) -> None:
        faults = [*filter(None, map(trackers.fault, self.trackers))]
        if self.num_samples < 2 and self.algorithm.compares_samples:
            faults.append(
                UserError(
                    f"{self.algorithm.name} compares samples of one prompt, but num_samples is {self.num_samples}",
                    fix="set num_samples to 2 or above, or use ppo or reinforce",
                )
            )
        if self.dynamic_sampling and not self.algorithm.compares_samples:
            faults.append(
                UserError(
                    f"dynamic_sampling drops prompts whose responses all earn the same, but {self.algorithm.name} "
                    "learns from them",
                    fix="leave it out, or use grpo, rloo or dpo",
                )
            )
        if self.lora is None and self.save == "adapter":
            faults.append(UserError("save is adapter, but no adapter is trained", fix="add --lora"))
        try:
            check_training_dtype(self.dtype)
        except UserError as fault:
            faults.append(fault)
        drawn = self.prompts_per_step * self.num_samples * self.sampling.max_new_tokens
        if drawn > MOST_DRAWN:
            faults.append(
                UserError(
                    f"prompts_per_step × num_samples × max_new_tokens is {drawn:,} tokens a step",
                    fix=f"lower one of them, to {MOST_DRAWN:,} tokens at most",
                )
            )
        if self.sampling.temperature == 0:
            faults.append(UserError("training samples greedily (temperature 0)", fix="set temperature above 0"))
        check(self, *faults)

    @property
    def leaves_model(self) -> bool:
        """Whether a finished run leaves `model/`."""
        return self.lora is None or self.save != "adapter"

    @property
    def leaves_adapter(self) -> bool:
        """Whether a finished run leaves `adapter/`."""
        return self.lora is not None and self.save != "merged"

    @property
    def resumes_with(self) -> dict[str, Any]:
        """What a run keeps when it is resumed: other values would make other weights of the same checkpoint."""
        lora = {} if self.lora is None else {f"lora_{name}": value for name, value in asdict(self.lora).items()}
        return {"dtype": "bfloat16" if self.dtype == "bfloat16" else "float32", "lora": self.lora is not None, **lora}

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0: warm-up, then the schedule down to zero at the end."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * SCHEDULES[self.schedule](share)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}
"""Share of training done after warm-up → share of the peak learning rate."""
