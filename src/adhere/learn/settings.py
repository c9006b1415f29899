"""What a training run is told. Each part's options live beside the code that reads them; this composes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from adhere.data import Columns
from adhere.errors import UserError
from adhere.learn import trackers
from adhere.learn.algorithms import GRPO, PPO, Algorithm, Reinforce
from adhere.learn.stopping import Stopping
from adhere.model.settings import Lora, Sampling, check_training_dtype


@dataclass(frozen=True)
class TrainConfig:
    """Everything `adhere train` reads; the resolved tree is written to the run as config.yaml."""

    model: str
    """Model folder or hub id, causal or encoder–decoder."""
    prompts: str
    """Prompts: a JSON Lines, CSV or Parquet file, or a hub id."""
    output: str
    """Folder of the run; must not hold one yet, unless --resume."""
    reward: str | Mapping[str, Any] = "attention"
    """Name of a reward, your own `module:function`, or (in YAML) weights over signals."""
    algorithm: Algorithm = field(default_factory=GRPO)
    """How the reward becomes an update."""
    steps: int = 100
    """Training steps."""
    prompts_per_step: int = 16
    """Prompts drawn for each step."""
    num_samples: int = 8
    """Responses sampled to each prompt (the group)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How responses are drawn."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from zero."""
    schedule: str = "linear"
    """How the learning rate falls after warm-up: linear, cosine or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    kl_coef: float = 0.04
    """Weight of the KL divergence from the start, in the reward or in the loss as the algorithm says."""
    kl_target: float | None = None
    """Adapt kl_coef to keep KL near this many nats a response; nothing keeps it fixed."""
    max_tokens: int = 16_384
    """Tokens of one forward and backward, padding included; larger batches are accumulated."""
    seed: int = 0
    """Seed of data order and sampling."""
    save_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_samples: int = 4
    """Responses written to samples.jsonl at each step."""
    completions_every: int = 1
    """Steps between Parquet tables of all completions with their scores; 0 writes none."""
    stopping: Stopping = field(default_factory=Stopping)
    """When to stop early."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    save: Literal["merged", "adapter", "both"] = "both"
    """What a run with --lora leaves: the merged model in model/, adapter/ in PEFT's format, or both."""
    columns: Columns = field(default_factory=Columns)
    """How the fields of a row are named."""
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
        faults = [
            UserError(f"{name} is {value}", fix=f"set it to {least} or above")
            for name, value, least in (
                ("steps", self.steps, 1),
                ("prompts_per_step", self.prompts_per_step, 1),
                ("num_samples", self.num_samples, 1),
                ("max_tokens", self.max_tokens, 1),
                ("save_every", self.save_every, 1),
                ("keep_checkpoints", self.keep_checkpoints, 1),
                ("warmup_steps", self.warmup_steps, 0),
                ("kl_coef", self.kl_coef, 0),
                ("weight_decay", self.weight_decay, 0),
                ("log_samples", self.log_samples, 0),
                ("completions_every", self.completions_every, 0),
            )
            if not value >= least
        ]
        faults += [fault for tracker in self.trackers if (fault := trackers.fault(tracker)) is not None]
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            faults.append(UserError(f"learning_rate is {self.learning_rate}", fix="set it above 0"))
        if self.schedule not in SCHEDULES:
            faults.append(UserError(f"unknown schedule {self.schedule!r}", fix=f"use one of {', '.join(SCHEDULES)}"))
        if self.kl_target is not None and self.kl_target <= 0:
            faults.append(UserError(f"kl_target is {self.kl_target}", fix="set it above 0, or leave it out"))
        if self.kl_target is not None and self.kl_coef == 0:
            faults.append(UserError("kl_target adapts kl_coef, which is 0", fix="set kl_coef above 0 too"))
        if self.num_samples < 2 and not isinstance(self.algorithm, PPO | Reinforce):
            faults.append(
                UserError(
                    f"{self.algorithm.name} compares samples of one prompt, but num_samples is {self.num_samples}",
                    fix="set num_samples to 2 or above, or use ppo or reinforce",
                )
            )
        faults += [
            UserError(f"{name} is {value}", fix="set it to a finite number")
            for name, value in (("weight_decay", self.weight_decay), ("kl_coef", self.kl_coef))
            if value == math.inf
        ]
        if not self.max_grad_norm > 0:
            faults.append(UserError(f"max_grad_norm is {self.max_grad_norm}", fix="set it above 0"))
        if self.lora is None and self.save == "adapter":
            faults.append(UserError("save is adapter, but no adapter is trained", fix="add --lora"))
        try:
            check_training_dtype(self.dtype)
        except UserError as fault:
            faults.append(fault)
        if self.sampling.temperature == 0:
            faults.append(UserError("training samples greedily (temperature 0)", fix="set temperature above 0"))
        if faults:
            raise faults[0] if len(faults) == 1 else UserError("; ".join(str(fault) for fault in faults))

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
