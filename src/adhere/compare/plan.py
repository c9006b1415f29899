"""What is compared: the arms, the data they share, and the list of jobs, checked before any of them starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adhere.compare.settings import Arm, CompareConfig, Files, folder_name
from adhere.config import load_config, to_dict
from adhere.data import PLAIN
from adhere.errors import UserError
from adhere.learn.settings import TrainConfig
from adhere.measure.settings import EvalConfig
from adhere.preferences.settings import PreferenceConfig
from adhere.resume import finished
from adhere.reward.named import config_of

NONE, SYNTHETIC, HUMAN, HYBRID = "none", "synthetic", "human", "hybrid"
MADE = (NONE, SYNTHETIC, HUMAN, HYBRID)
"""Rewards of an arm that are no reward yet: nothing is trained, or the arm makes its reward first."""


@dataclass(frozen=True)
class Job:
    """One run: a model, an arm, a seed."""

    model: str
    name: str
    arm: Arm
    seed: int
    training: TrainConfig
    """Its reward is the arm's; prompts and output are folders of the comparison."""
    evaluation: EvalConfig
    reward_model: PreferenceConfig
    """How a reward model is fitted, where the arm needs one."""
    data: Path
    """Folder of the shared prompts, evaluation rows and pairs of this model."""
    output: Path
    """Folder of the run."""
    audited: int
    """Evaluation prompts of the audit; 0 = none for this run."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its result depends on, wherever the comparison lies: a finished run must agree with it."""
        apart: dict[str, dict[str, Any]] = {
            "train": {**to_dict(self.training), "output": None, "prompts": None},
            "reward_model": {**to_dict(self.reward_model), "output": None},
            "evaluation": to_dict(self.evaluation),
        }
        arm = {"reward": self.arm.reward, "labels": self.arm.labels}
        return {"model": self.model, "arm": self.name, **arm, "seed": self.seed, "audited": self.audited, **apart}

    @property
    def result(self) -> Path:
        return self.output / "result.json"

    def finished(self) -> bool:
        """Whether this very run has left its result. Raises `UserError` for the result of another."""
        fix = "choose another --output, or remove this folder to have it run again"
        return finished(self.result, self.settings, where=self.output, fix=fix)


def arm_of(name: str, written: Mapping[str, Any]) -> Arm:
    """An arm as written: `reward`, `labels`, and options of `adhere train` beside them. Raises `UserError`."""
    if not isinstance(written, Mapping) or "reward" not in written:
        raise UserError("has no `reward`", where=f"arm {name}", fix=f"write a reward, or one of {', '.join(MADE)}")
    own = {key: value for key, value in written.items() if key in ("reward", "labels")}
    try:
        arm = load_config(Arm, None, own)
    except UserError as error:
        raise UserError(str(error), where=f"arm {name}") from error
    arm = replace(arm, train={key: value for key, value in written.items() if key not in own})
    labelled = arm.reward in (HUMAN, HYBRID)
    if labelled != (arm.labels > 0):
        what = f"`{arm.reward}` learns from labelled pairs" if labelled else "only human and hybrid use labels"
        fix = "write labels: 100" if labelled else "leave `labels` out"
        raise UserError(what, where=f"arm {name}", fix=fix)
    if arm.reward not in MADE:
        try:
            config_of(arm.reward)
        except UserError as error:
            raise UserError(str(error), where=f"arm {name}") from error
    return arm


def jobs_of(config: CompareConfig, output: Path) -> list[Job]:
    """Every run, the arms of a model side by side. Raises `UserError` for every fault of every arm together."""
    jobs, faults = [], []
    for model in config.models:
        for name, written in config.arms.items():
            try:
                arm = arm_of(name, written)
                for seed in config.seeds:
                    folder = output / folder_name(model) / folder_name(name) / f"seed-{seed}"
                    jobs.append(_job(config, model, name, arm, seed, folder, output / folder_name(model) / "data"))
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return jobs


def _job(config: CompareConfig, model: str, name: str, arm: Arm, seed: int, folder: Path, data: Path) -> Job:
    options: dict[str, Any] = {
        **config.train,
        **arm.train,
        "model": model,
        "prompts": str(data / "prompts.jsonl"),
        "columns": to_dict(config.data.columns if isinstance(config.data, Files) else PLAIN),
        "output": str(folder),
        "seed": seed,
    }
    try:
        training = load_config(TrainConfig, None, options)
    except UserError as error:
        raise UserError(str(error), where=f"arm {name}") from error
    if training.reward != TrainConfig.reward:
        raise UserError("the reward of an arm is its own `reward`", where="train", fix="leave it out of `train`")
    audited = config.audited if seed == config.seeds[0] and arm.reward != NONE else 0
    made = {"model": model, "output": str(folder.with_name(f"{folder.name}-reward")), "seed": seed}
    fitting = load_config(PreferenceConfig, None, {**config.reward_model, **made})
    return Job(model, name, arm, seed, training, config.evaluation, fitting, data, folder, audited)


def processes(config: CompareConfig, on_cpu: bool) -> int:
    """Runs at a time."""
    if config.jobs is not None:
        return config.jobs
    return (os.cpu_count() or 1) if on_cpu else 1
