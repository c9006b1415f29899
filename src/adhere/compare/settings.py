"""What is compared: models, arms, data. Imports no torch, so that the command line can check a plan at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adhere.data import Columns
from adhere.errors import UserError, unknown_name
from adhere.measure.settings import EvalConfig
from adhere.options import Count, CountOrZero, check


@dataclass(frozen=True)
class Toy:
    """The embedded task: its stories, and pairs judged by their answers in the place of a person."""

    name = "toy"
    prompts: Count = 2000
    """Training prompts, without answers."""
    evaluation: Count = 100
    """Fresh prompts of each split."""
    pairs: CountOrZero = 1200
    """Preference pairs, a right and a wrong sample of the model itself."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Files:
    """Your own data."""

    name = "files"
    prompts: str
    """Training prompts."""
    evaluation: str
    """Fresh prompts; `answers`, `reference` and the like measure more."""
    pairs: str | None = None
    """Human preferences, `prompt`, `chosen` and `rejected`; for the arms human and hybrid."""
    columns: Columns = field(default_factory=Columns)
    """How the fields of a row are named."""


@dataclass(frozen=True)
class Arm:
    """One way to improve the model."""

    reward: str | Mapping[str, Any]
    """A reward as `adhere train` takes it; or none, synthetic (a reward model of made pairs), human (one of labelled
    pairs), hybrid (signals weighted by labelled pairs)."""
    labels: CountOrZero = 0
    """Labelled pairs that human and hybrid may see."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of `adhere train` that differ in this arm."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CompareConfig:
    """Everything `adhere compare` reads."""

    models: tuple[str, ...] = ("toy-causal", "toy-encdec")
    """Embedded models (toy-causal, toy-encdec), folders or hub ids; every arm starts from each."""
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of an arm → its reward, its labels, and options of `adhere train` that are its own."""
    data: Toy | Files = field(default_factory=Toy)
    """Prompts to train on, prompts to evaluate on, labelled pairs."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of `adhere train` for all arms."""
    reward_model: Mapping[str, Any] = field(default_factory=dict)
    """Options of `adhere preferences fit` for the reward models of synthetic and human."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """How responses are drawn for the evaluation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is trained once with each."""
    against: str = "attention"
    """The arm that all others are compared with."""
    audited: CountOrZero = 32
    """Evaluation prompts on which each arm's reward is audited; 0 = no audit."""
    jobs: Count | None = None
    """Runs at a time, one thread each; nothing = one a core on a CPU, else one."""

    def __post_init__(self) -> None:
        faults = []
        if not self.arms:
            faults.append(UserError("`arms` is empty", fix="arms: {attention: {reward: attention}}"))
        elif self.against not in self.arms:
            faults.append(unknown_name("arm in `against`", self.against, self.arms))
        for name, given in (("models", self.models), ("seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                faults.append(UserError(f"`{name}` is empty or names one twice", fix="name each once"))
        if self.audited == 1:
            faults.append(UserError("`audited` is 1", fix="an audit needs 2 prompts or more, or 0 for none"))
        folders = [folder_name(name) for name in (*self.arms, *self.models)]
        if len(set(folders)) < len(folders):
            faults.append(UserError("two arms or models would share a folder", fix="name them apart, in letters"))
        check(self, *faults)


def folder_name(name: str) -> str:
    """A name as a folder's: letters and digits, lower case.

    >>> folder_name("policy gradient (paper)")
    'policy-gradient-paper'
    """
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "arm"
