"""Rewards by name: signals weighted, group-normalised and gated.

reward = Σ_k weight_k · z(signal_k), z within the responses of one prompt, then the gates. Where this departs from the
published reward: `paper` keeps the form of CAGSR (raw sum, policy as scorer) and collapses as it does; every
weight of it is 1, `focus` is an entropy brought to [0, 1]. `attention` is the default, made to stand: the frozen
reference scores, each signal is normalised by itself, a response that did not end by itself cannot win.
Not here: trained reward models (`learn.preference`) and fitted weights (`learn.calibrate`).
"""

from __future__ import annotations

import enum
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from attune.errors import UserError, unknown_name
from attune.reward import rivals, signals
from attune.reward.salience import SALIENCE
from attune.reward.signals import Evidence
from attune.types import Rollout


class Reads(enum.Flag):
    """What of a replay a signal reads: what no signal reads is not captured."""

    TEXT = 0
    LOGPROBS = enum.auto()
    ATTENTION = enum.auto()
    COPY = enum.auto()
    CONTRAST = enum.auto()


@dataclass(frozen=True)
class Signal:
    """A signal's formula and what it reads."""

    function: Callable[..., Tensor]
    reads: Reads
    options: Mapping[str, str] = field(default_factory=dict)
    """Keyword of the function → field of `RewardConfig` that sets it."""

    def __call__(self, evidence: Evidence, config: RewardConfig | None = None) -> Tensor:
        """[B] float32; without a config, with the function's own defaults."""
        chosen = {} if config is None else {name: getattr(config, option) for name, option in self.options.items()}
        return self.function(evidence, **chosen)


SIGNALS: dict[str, Signal] = {
    "coverage": Signal(signals.coverage, Reads.ATTENTION),
    "soft_coverage": Signal(signals.soft_coverage, Reads.ATTENTION),
    "focus": Signal(signals.focus, Reads.ATTENTION, {"clamp": "focus_clamp"}),
    "repetition": Signal(signals.repetition, Reads.TEXT, {"n": "ngram"}),
    "coherence": Signal(signals.coherence, Reads.LOGPROBS),
    "grounding": Signal(signals.grounding, Reads.COPY),
    "grounding_sum": Signal(signals.grounding_sum, Reads.COPY),
    "lookback": Signal(signals.lookback, Reads.ATTENTION),
    "certainty": Signal(signals.certainty, Reads.LOGPROBS),
    "entropy": Signal(signals.entropy, Reads.LOGPROBS),
    "contrast": Signal(signals.contrast, Reads.LOGPROBS | Reads.CONTRAST),
    "overlap": Signal(rivals.overlap, Reads.TEXT),
    "length": Signal(rivals.length, Reads.TEXT),
    "random": Signal(rivals.random, Reads.TEXT),
    "majority": Signal(rivals.majority, Reads.TEXT),
    "exact": Signal(rivals.exact, Reads.TEXT),
}

GATES: dict[str, Callable[[Rollout], Tensor]] = {"ended": lambda rollout: rollout.ended}
"""What a response must pass: [B] bool each."""

# Spread within a group below this is rounding between forwards, not an opinion.
STD_FLOOR = 1e-5
# How far below its group's best a gated response stays at least: one standard deviation of a normalised signal.
GATE_MARGIN = 1.0


@dataclass(frozen=True)
class RewardConfig:
    """A reward, but for the model that reads."""

    weights: Mapping[str, float]
    """Signal (or `module:function` of your own) → weight; a weight of 0 reports a signal without rewarding it."""
    salience: str = "content"
    """Which prompt tokens count: all, content, idf, question, self."""
    scorer: str = "reference"
    """Who reads the responses: the frozen reference, or the policy in training."""
    normalise: str = "group"
    """`group`: each signal to mean 0 and deviation 1 among the responses of its prompt; `none`: as it is."""
    gates: tuple[str, ...] = ()
    """What a response must pass, or get its group's minimum: ended."""
    logprob_floor: float | None = None
    """A gate too: no response token below this log-prob (nats) for the scorer; None = no such gate."""
    renormalise: bool = False
    """Attention rows brought to sum 1 over the user's tokens: no sinks, no template, no fall with response length."""
    shuffle: bool = False
    """A control: attention moved to other positions of the prompt."""
    focus_clamp: float = 0.0
    """Entropy below this share of its maximum earns `focus` nothing more, 0 to below 1."""
    ngram: int = 2
    """Length of the n-grams that `repetition` counts, tokens."""

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise UserError("; ".join(map(str, faults)), where="reward")

    @property
    def reads(self) -> Reads:
        """What a replay must hold for this reward."""
        needed = Reads.LOGPROBS if self.logprob_floor is not None else Reads.TEXT
        for name in self.weights:
            # A user's function may read anything but the copy heads and the contrast, which cost extra.
            needed |= SIGNALS[name].reads if name in SIGNALS else Reads.LOGPROBS | Reads.ATTENTION
        return needed


def _faults(config: RewardConfig) -> list[UserError]:
    """Everything wrong with a config, in the words of the user."""
    where, faults = "reward", []
    if not isinstance(config.weights, Mapping) or not config.weights:
        faults.append(UserError("`weights` is empty or no mapping", where=where, fix="write weights: {grounding: 1.0}"))
    else:
        for name, weight in config.weights.items():
            if not isinstance(name, str) or (name not in SIGNALS and ":" not in name):
                faults.append(unknown_name("signal", str(name), SIGNALS, where=where))
            if not _number(weight):
                faults.append(UserError(f"weight of {name} is {weight!r}", where=where, fix="write a finite number"))
    for kind, value, known in (
        ("salience", config.salience, list(SALIENCE)),
        ("scorer", config.scorer, ["reference", "policy"]),
        ("normalise", config.normalise, ["group", "none"]),
    ):
        if value not in known:
            faults.append(unknown_name(kind, str(value), known, where=where))
    if isinstance(config.gates, str) or not isinstance(config.gates, tuple | list):
        faults.append(UserError(f"`gates` is {config.gates!r}", where=where, fix="write a list: gates: [ended]"))
    else:
        faults += [unknown_name("gate", str(gate), GATES, where=where) for gate in config.gates if gate not in GATES]
    for option, good, wanted in (
        ("logprob_floor", config.logprob_floor is None or _number(config.logprob_floor), "a finite number or nothing"),
        ("focus_clamp", _number(config.focus_clamp) and 0 <= config.focus_clamp < 1, "a number from 0 to below 1"),
        ("ngram", type(config.ngram) is int and config.ngram >= 1, "a whole number, 1 or more"),
        ("renormalise", type(config.renormalise) is bool, "true or false"),
        ("shuffle", type(config.shuffle) is bool, "true or false"),
    ):
        if not good:
            faults.append(UserError(f"`{option}` is {getattr(config, option)!r}", where=where, fix=f"write {wanted}"))
    return faults


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_ATTENTION: dict[str, Any] = {
    "weights": {"grounding": 1.0, "coverage": 1.0, "coherence": 1.0, "repetition": -1.0},
    "gates": ("ended",),
    "renormalise": True,
}

NAMED: dict[str, RewardConfig] = {
    "attention": RewardConfig(**_ATTENTION),
    "paper": RewardConfig({"coverage": 1.0, "focus": 1.0, "repetition": -1.0}, scorer="policy", normalise="none"),
    # Both sources read the policy as it learns; Intuitor's reward breaks when a frozen copy gives it.
    "certainty": RewardConfig({"certainty": 1.0}, scorer="policy", normalise="none"),
    "entropy": RewardConfig({"entropy": 1.0}, scorer="policy", normalise="none"),
    "majority": RewardConfig({"majority": 1.0}, normalise="none"),
    "exact": RewardConfig({"exact": 1.0}, normalise="none"),
    # The four controls, in the frame of `attention`, so that only what is read differs.
    "overlap": RewardConfig({"overlap": 1.0}, gates=("ended",)),
    "length": RewardConfig({"length": 1.0}, gates=("ended",)),
    "random": RewardConfig({"random": 1.0}, gates=("ended",)),
    "shuffled": RewardConfig(**_ATTENTION, shuffle=True),
}


def config_of(spec: str | Mapping[str, Any]) -> RewardConfig:
    """A name of `NAMED`, a `module:function` of your own, or a mapping of `RewardConfig`'s fields, as a config."""
    if isinstance(spec, str):
        if spec in NAMED:
            return NAMED[spec]
        if ":" in spec:
            return RewardConfig({spec: 1.0})
        raise unknown_name("reward", spec, NAMED)
    known = [option.name for option in fields(RewardConfig)]
    unknown = [unknown_name("reward option", str(key), known, where="reward") for key in spec if key not in known]
    if unknown:
        raise unknown[0] if len(unknown) == 1 else UserError("; ".join(map(str, unknown)))
    options = dict(spec)
    options.setdefault("weights", {})  # named as missing by the config's own check
    if isinstance(options.get("gates"), list):
        options["gates"] = tuple(options["gates"])
    return RewardConfig(**options)


def group_normalise(values: Tensor, group: Tensor, counted: Tensor | None = None) -> Tensor:
    """z-scores within groups: (x − mean) / deviation over the `counted` responses. [B], [B] int64, [B] bool → [B].

    The deviation divides by the group's size. Where it is below `STD_FLOOR`, a group of one included, all get 0.

    >>> group_normalise(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
    tensor([-1.,  1.,  0.])
    """
    if not len(values):
        return values.float()
    member = torch.ones_like(group, dtype=torch.bool) if counted is None else counted
    size = int(group.max()) + 1

    def mean(of: Tensor) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64, device=of.device).index_add(0, group[member], of[member])
        return (total / torch.bincount(group[member], minlength=size).clamp(min=1))[group]

    # float64, or else equal rewards would not subtract to equal differences.
    offset = values.double() - mean(values.double())
    deviation = mean(offset**2).sqrt()
    return torch.where(deviation > STD_FLOOR, offset / deviation.clamp(min=STD_FLOOR), 0.0).float()


def gate(reward: Tensor, group: Tensor, passed: Tensor) -> Tensor:
    """Rewards with every response that did not pass at its group's minimum. [B], [B] int64, [B] bool → [B].

    The minimum is that of the responses that passed, and at least `GATE_MARGIN` below their best: otherwise a gated
    response would tie with it where one passed, or all earned the same. A group in which none passed gets one value,
    made in the same way from its own rewards.

    >>> gate(torch.tensor([0.5, -2.0, 9.0]), torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
    tensor([ 0.5000, -2.0000, -2.0000])
    """
    if not len(reward):
        return reward
    counted = _counted(group, passed)
    ends = torch.zeros(int(group.max()) + 1, dtype=reward.dtype, device=reward.device)
    low = ends.scatter_reduce(0, group[counted], reward[counted], "amin", include_self=False)[group]
    high = ends.scatter_reduce(0, group[counted], reward[counted], "amax", include_self=False)[group]
    return torch.where(passed, reward, torch.minimum(low, high - GATE_MARGIN))


def combine(values: Mapping[str, Tensor], config: RewardConfig, group: Tensor, passed: Tensor) -> Tensor:
    """The reward from its signals: Σ weight · z(signal), then the gates. {name: [B]}, [B] int64, [B] bool → [B].

    Responses behind a gate take no part in the mean and deviation of their group, unless none passed.
    """
    total = torch.zeros(len(group), device=group.device)
    counted = _counted(group, passed)
    for name, weight in config.weights.items():
        value = values[name].float()
        total = total + weight * (group_normalise(value, group, counted) if config.normalise == "group" else value)
    return gate(total, group, passed)


def _counted(group: Tensor, passed: Tensor) -> Tensor:
    """[B] bool: who passed, and everyone of a group where none did."""
    if not len(group):
        return passed
    some = torch.bincount(group[passed], minlength=int(group.max()) + 1) > 0
    return passed | ~some[group]


def user_function(spec: str) -> Callable[[Evidence], Tensor]:
    """Import `module:function`, looking in the working directory too. Raises `UserError` where it is not there."""
    module_name, _, name = spec.partition(":")
    fix = "write module:function, the module on the Python path or in the working directory"
    here = os.getcwd()
    sys.path.append(here)  # last, so that a stray file never hides an installed module
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{spec!r} cannot be imported ({error})", where="reward", fix=fix) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{spec!r}: {module_name} has no function {name!r}", where="reward", fix=fix)

    def checked(evidence: Evidence) -> Tensor:
        value = function(evidence)
        want = f"return a finite float tensor of shape [{len(evidence.replay.rollout)}], a number per response"
        if not isinstance(value, Tensor):
            raise UserError(f"{spec!r} returned {type(value).__name__}", where="reward", fix=want)
        if not value.is_floating_point() or value.shape != (len(evidence.replay.rollout),):
            raise UserError(f"{spec!r} returned {value.dtype} {list(value.shape)}", where="reward", fix=want)
        if not torch.isfinite(value).all():
            raise UserError(f"{spec!r} returned a value that is not finite", where="reward", fix=want)
        return value

    return checked
