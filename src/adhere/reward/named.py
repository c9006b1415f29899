"""What rewards are made of, and the rewards by name: signals, weights, gates.

Where this departs from the published reward: `paper` keeps the form of CAGSR (raw sum, policy as scorer) and collapses
as it does; every weight of it is 1, `focus` is an entropy brought to [0, 1]. `attention` is the default, made to stand:
the frozen reference scores, fluency and faithfulness hold each other, a response that did not end by itself cannot win.
Imports no torch, so that the command line can list and check rewards at once.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from adhere.config import read_mapping
from adhere.errors import UserError, unknown_name


class Reads(enum.Flag):
    """What of a reading a signal reads: what no signal reads is not captured."""

    TEXT = 0
    LOGPROBS = enum.auto()
    ENTROPY = enum.auto()
    CERTAINTY = enum.auto()
    ATTENTION = enum.auto()
    COPY = enum.auto()
    CONTRAST = enum.auto()
    QUESTION = enum.auto()
    ABLATED = enum.auto()
    UNASKED = enum.auto()
    ASKING = enum.auto()
    HEADS = enum.auto()
    LEFT_OUT = enum.auto()
    CITED = enum.auto()


PREFERENCE = "preference:"
"""Before the folder of a fitted reward model: a signal, and a reward of it alone."""
CALIBRATED = "calibrated:"
"""Before a file that `adhere calibrate` wrote: a reward of weighted signals and heads."""
CALIBRATION_FORMAT = 1
"""Version of that file."""


@dataclass(frozen=True)
class Signal:
    """What a signal reads. Its formula is the function of the same name in `signals` or `controls`."""

    reads: Reads
    options: Mapping[str, str] = field(default_factory=dict)
    """Keyword of the function → field of `RewardConfig` that sets it."""


SIGNALS: dict[str, Signal] = {
    "coverage": Signal(Reads.ATTENTION),
    "soft_coverage": Signal(Reads.ATTENTION),
    "focus": Signal(Reads.ATTENTION, {"clamp": "focus_clamp"}),
    "repetition": Signal(Reads.TEXT, {"n": "ngram"}),
    "coherence": Signal(Reads.LOGPROBS),
    "grounding": Signal(Reads.COPY),
    "grounding_sum": Signal(Reads.COPY),
    "lookback": Signal(Reads.ATTENTION),
    "certainty": Signal(Reads.CERTAINTY),
    "entropy": Signal(Reads.ENTROPY),
    "contrast": Signal(Reads.LOGPROBS | Reads.CONTRAST),
    "reliance": Signal(Reads.LOGPROBS | Reads.QUESTION),
    "comprehensiveness": Signal(Reads.LOGPROBS | Reads.COPY | Reads.ABLATED),
    "leave_one_out": Signal(Reads.LOGPROBS | Reads.LEFT_OUT),
    "selfcite": Signal(Reads.COPY | Reads.LEFT_OUT | Reads.CITED),
    "question_reliance": Signal(Reads.LOGPROBS | Reads.UNASKED),
    "agreement": Signal(Reads.COPY | Reads.ASKING),
    "support": Signal(Reads.TEXT),
    "heads": Signal(Reads.ATTENTION | Reads.HEADS, {"weights": "head_weights"}),
    "overlap": Signal(Reads.TEXT),
    "length": Signal(Reads.TEXT),
    "random": Signal(Reads.TEXT),
    "majority": Signal(Reads.TEXT),
    "exact": Signal(Reads.TEXT),
}

SALIENCES = ("all", "content", "idf", "question", "self")
"""Readings of a prompt: the functions of `salience`."""

GATES = ("ended", "said", "supported")
"""What a response must pass: the functions of `gates`."""


@dataclass(frozen=True)
class RewardConfig:
    """A reward, but for the model that reads.

    >>> RewardConfig({"coherence": 1.0, "repetition": -0.5}, normalise="none").compares
    False
    """

    weights: Mapping[str, float]
    """Signal (or `preference:FOLDER`, or `module:function` of your own) → weight; 0 reports a signal without rewarding
    it."""
    salience: str = "content"
    """Which prompt tokens count: all, content, idf, question, self."""
    scorer: str = "reference"
    """Who reads the responses: the frozen reference, or the policy in training."""
    normalise: str = "group"
    """`group`: each signal to mean 0 and deviation 1 among the responses of its prompt; `none`: as it is."""
    gates: tuple[str, ...] = ()
    """What a response must pass, or get its group's minimum: `ended` by itself, `said` something, `supported` by the
    context in a word at least."""
    learn_from: tuple[str, ...] = ()
    """Gates that one response of a group at least must pass too, or training learns nothing from the group."""
    logprob_floor: float | None = None
    """A gate too: no response token below this log-prob (nats) for the scorer; None = no such gate."""
    renormalise: bool = False
    """Attention rows brought to sum 1 over the user's tokens: no sinks, no template, no fall with response length."""
    shuffle: bool = False
    """A control: attention moved to other positions of the prompt."""
    ablate: float = 0.05
    """Share of the context, the part most attended to, that `comprehensiveness` takes away, above 0 to 1."""
    focus_clamp: float = 0.0
    """Entropy below this share of its maximum earns `focus` nothing more, 0 to below 1."""
    ngram: int = 2
    """Length of the n-grams that `repetition` counts, tokens."""
    head_weights: Mapping[str, float] = field(default_factory=dict)
    """For `heads`: "layer.head", both from 0, → weight."""
    made_for: str | None = None
    """The only kind of model that this reward is for (`Policy.kind`); nothing = any."""

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise UserError("; ".join(map(str, faults)))

    @property
    def compares(self) -> bool:
        """Whether a response by itself has no reward, only one among several to its prompt."""
        return self.normalise == "group" or "majority" in self.weights

    @property
    def reads(self) -> Reads:
        """What a reading must hold for this reward."""
        needed = Reads.LOGPROBS if self.logprob_floor is not None else Reads.TEXT
        for name in self.weights:
            # A user's function may read anything but the copy heads and the contrast, which cost extra.
            whole = Reads.LOGPROBS | Reads.ENTROPY | Reads.CERTAINTY | Reads.ATTENTION
            own = Reads.TEXT if name.startswith(PREFERENCE) else whole
            needed |= SIGNALS[name].reads if name in SIGNALS else own
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
        ("salience", config.salience, list(SALIENCES)),
        ("scorer", config.scorer, ["reference", "policy"]),
        ("normalise", config.normalise, ["group", "none"]),
    ):
        if value not in known:
            faults.append(unknown_name(kind, str(value), known, where=where))
    for option in ("gates", "learn_from"):
        gates: object = getattr(config, option)  # as written by a user, whatever the annotation promises
        if not isinstance(gates, tuple):
            faults.append(UserError(f"`{option}` is {gates!r}", where=where, fix=f"write a list: {option}: [ended]"))
        else:
            faults += [unknown_name("gate", str(gate), GATES, where=where) for gate in gates if gate not in GATES]
    for option, good, wanted in (
        ("logprob_floor", config.logprob_floor is None or _number(config.logprob_floor), "a finite number or nothing"),
        ("focus_clamp", _number(config.focus_clamp) and 0 <= config.focus_clamp < 1, "a number from 0 to below 1"),
        ("ablate", _number(config.ablate) and 0 < config.ablate <= 1, "a number above 0, at most 1"),
        (
            "head_weights",
            isinstance(config.head_weights, Mapping)
            and all(re.fullmatch(r"\d+\.\d+", str(k)) and _number(v) for k, v in config.head_weights.items()),
            'a mapping such as {"0.3": 1.5}',
        ),
        ("made_for", config.made_for is None or isinstance(config.made_for, str), "text or nothing"),
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
    # Shares of 1 carry it, nats correct it: a log-prob has no floor, and what is read off the prompt is always likely.
    # Chosen on validation passages (docs/study/default.md).
    "weights": {
        "agreement": 10.0,
        "support": 5.0,
        "question_reliance": 0.5,
        "coherence": 1.0,
        "repetition": -5.0,
        "grounding": 0.0,
    },
    "normalise": "none",
    "gates": ("ended", "said"),
    # Of samples that nothing supports the likeliest would be learned: an example's answer, which then spreads.
    "learn_from": ("supported",),
}

_ATTENTION_V1: dict[str, Any] = {
    "weights": {
        "coherence": 1.0,
        "comprehensiveness": 0.5,
        "overlap": 2.0,
        "repetition": -1.0,
        "grounding": 0.0,
        "coverage": 0.0,
    },
    "normalise": "none",
    "gates": ("ended", "said"),
    "renormalise": True,
}

NAMED: dict[str, RewardConfig] = {
    "attention": RewardConfig(**_ATTENTION),
    # The default before; on real models it is gamed by the words of the question and of an example.
    "attention-v1": RewardConfig(**_ATTENTION_V1),
    "paper": RewardConfig({"coverage": 1.0, "focus": 1.0, "repetition": -1.0}, scorer="policy", normalise="none"),
    # Both sources read the policy as it learns; Intuitor's reward breaks when a frozen copy gives it.
    "certainty": RewardConfig({"certainty": 1.0}, scorer="policy", normalise="none", gates=("said",)),
    "entropy": RewardConfig({"entropy": 1.0}, scorer="policy", normalise="none", gates=("said",)),
    "majority": RewardConfig({"majority": 1.0}, normalise="none"),
    "exact": RewardConfig({"exact": 1.0}, normalise="none"),
    # The four controls, in the frame of `attention`, so that only what is read differs.
    "overlap": RewardConfig({"overlap": 1.0}, gates=("ended", "said")),
    "length": RewardConfig({"length": 1.0}, gates=("ended", "said")),
    "random": RewardConfig({"random": 1.0}, gates=("ended", "said")),
    "shuffled": RewardConfig(**_ATTENTION, shuffle=True),
}


def config_of(spec: str | Mapping[str, Any]) -> RewardConfig:
    """A name of `NAMED`, `preference:FOLDER`, `calibrated:FILE`, a `module:function` of your own, or a mapping of
    `RewardConfig`'s fields, as a config."""
    if isinstance(spec, str):
        if spec in NAMED:
            return NAMED[spec]
        if spec.startswith(PREFERENCE):
            return RewardConfig({spec: 1.0}, normalise="none", gates=("ended", "said"))
        if spec.startswith(CALIBRATED):
            return config_of(read_calibration(spec.removeprefix(CALIBRATED)))
        if ":" in spec:
            return RewardConfig({spec: 1.0})
        raise unknown_name("reward", spec, NAMED)
    known = [option.name for option in fields(RewardConfig)]
    unknown = [unknown_name("reward option", str(key), known, where="reward") for key in spec if key not in known]
    if unknown:
        raise unknown[0] if len(unknown) == 1 else UserError("; ".join(map(str, unknown)))
    options = dict(spec)
    options.setdefault("weights", {})  # named as missing by the config's own check
    for name in ("gates", "learn_from"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    return RewardConfig(**options)


def read_calibration(path: str) -> Mapping[str, Any]:
    """The reward in a file that `adhere calibrate` wrote. Raises `UserError` for any other file."""
    file = read_mapping(path)
    reward = file.get("reward")
    if not isinstance(reward, Mapping) or "weights" not in reward or "made_for" not in reward:
        raise UserError("is no calibration", where=path, fix="give the file that `adhere calibrate` wrote")
    if file.get("format") != CALIBRATION_FORMAT:
        what = f"has format {file.get('format')!r}, and this version reads {CALIBRATION_FORMAT}"
        raise UserError(what, where=path, fix="calibrate again")
    return reward
