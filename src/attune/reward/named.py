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
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.errors import RunFailed, UserError, unknown_name
from attune.reward import heads, rivals, signals
from attune.reward.group import counted, gate, group_normalise
from attune.reward.salience import SALIENCE, response_content, salience, token_classes, user_tokens
from attune.reward.signals import Evidence
from attune.types import Prompts, Replay, Rollout, Scores

if TYPE_CHECKING:
    from attune.model.encode import Prompt
    from attune.model.policy import Policy


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

# Enough samples to tell a copy head (0.4 of its tokens) from the rest (0.05) on a few prompts.
HEAD_SAMPLES = 4
HEAD_SEED = 0

GATES: dict[str, Callable[[Rollout], Tensor]] = {"ended": lambda rollout: rollout.ended}
"""What a response must pass: [B] bool each."""


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
            raise UserError("; ".join(map(str, faults)))

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
    gates: object = config.gates  # as written by a user, whatever the annotation promises
    if not isinstance(gates, tuple):
        faults.append(UserError(f"`gates` is {gates!r}", where=where, fix="write a list: gates: [ended]"))
    else:
        faults += [unknown_name("gate", str(gate), GATES, where=where) for gate in gates if gate not in GATES]
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
    # Coverage is reported, not rewarded: weighed, it costs a tenth of `agree` (docs/results.md).
    "weights": {"grounding": 0.5, "coherence": 1.0, "repetition": -1.0, "coverage": 0.0},
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


def combine(values: Mapping[str, Tensor], config: RewardConfig, group: Tensor, passed: Tensor) -> Tensor:
    """The reward from its signals: Σ weight · z(signal), then the gates. {name: [B]}, [B] int64, [B] bool → [B].

    Responses behind a gate take no part in the mean and deviation of their group, unless none passed.
    """
    total = torch.zeros(len(group), device=group.device)
    among = counted(group, passed)
    for name, weight in config.weights.items():
        value = values[name].float()
        total = total + weight * (group_normalise(value, group, among) if config.normalise == "group" else value)
    return gate(total, group, passed)


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


class Reward:
    """A reward bound to the model that reads: call it on a rollout, or `score` texts.

    `copy_weights` [L, H] are measured on the first prompts it sees when a signal needs them and none were given; they
    stay from then on, as `reward.copy_weights`, for the run to save.
    """

    def __init__(self, config: RewardConfig, policy: Policy, copy_weights: Tensor | None = None) -> None:
        self.config = config
        self.policy = policy
        self.copy_weights = copy_weights
        self.classes = token_classes(policy.tokenizer)
        self._functions: dict[str, Callable[[Evidence], Tensor]] = {
            name: partial(SIGNALS[name], config=config) if name in SIGNALS else user_function(name)
            for name in config.weights
        }
        # Taken now: the reference is what the policy is at the start. Text alone needs no second model.
        frozen = config.scorer == "reference" and config.reads != Reads.TEXT
        self.reference: Policy | None = policy.reference() if frozen else None

    @classmethod
    def named(cls, name: str, policy: Policy, copy_weights: Tensor | None = None) -> Reward:
        """A reward of `NAMED`."""
        if name not in NAMED:
            raise unknown_name("reward", name, NAMED)
        return cls(NAMED[name], policy, copy_weights)

    @classmethod
    def resolve(cls, spec: str | Mapping[str, Any], policy: Policy, copy_weights: Tensor | None = None) -> Reward:
        """A reward from what a user wrote: see `config_of`."""
        return cls(config_of(spec), policy, copy_weights)

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        answers: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """Score `responses[i]` as a response to `prompts[i]`; equal prompts (and answers) form a group, wherever they
        stand. The scores come in the order given; the replay with them only if that order keeps groups together.
        """
        if not responses or len(prompts) != len(responses) or (answers is not None and len(answers) != len(prompts)):
            counts = f"{len(prompts)} prompts and {len(responses)} responses"
            counts += "" if answers is None else f" and {len(answers)} lists of answers"
            raise UserError(f"cannot score {counts}", fix="give one prompt, and one list of answers, per response")
        known = [tuple(row) for row in answers] if answers is not None else [()] * len(prompts)
        keys = [json.dumps([prompt, row], default=dict) for prompt, row in zip(prompts, known, strict=True)]
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        place = {key: n for n, key in enumerate(first)}
        index = torch.tensor([place[key] for key in keys])
        order = index.argsort(stable=True)
        encoded = self.policy.encode([prompts[i] for i in first.values()], [known[i] for i in first.values()])
        rollout = self.policy.respond(encoded, [responses[i] for i in order.tolist()], index[order])
        scores = self(rollout)
        back = order.argsort().to(scores.reward.device)
        return Scores(
            scores.reward[back],
            {name: value[back] for name, value in scores.signals.items()},
            scores.replay if torch.equal(order, torch.arange(len(order))) else None,
        )

    def __call__(self, rollout: Rollout, policy: Policy | None = None) -> Scores:
        """Score a rollout. `policy` is the policy as it is now, the reader where the config says `scorer: policy`."""
        return self.judge(self.evidence(rollout, self.reference or policy or self.policy))

    def judge(self, evidence: Evidence) -> Scores:
        """The signals and the reward of responses that have been read: no model runs here."""
        rollout = evidence.replay.rollout
        read = rivals.shuffled(evidence) if self.config.shuffle else evidence
        values: dict[str, Tensor] = {}
        for name, function in self._functions.items():
            values[name] = function(read).float()
            if not torch.isfinite(values[name]).all():
                fix = "look for NaN in the scorer's weights"
                raise RunFailed(f"signal {name} is not finite", where="reward", fix=fix)
        passed = torch.ones_like(rollout.ended)
        for name in self.config.gates:
            passed = passed & GATES[name](rollout)
        if self.config.logprob_floor is not None:
            low = (evidence.replay.logprobs < self.config.logprob_floor) & rollout.response_mask
            passed = passed & ~low.any(-1)
        reward = combine(values, self.config, rollout.prompt_index, passed)
        return Scores(reward, values, None if self.config.reads == Reads.TEXT else evidence.replay)

    def evidence(self, rollout: Rollout, scorer: Policy) -> Evidence:
        """What this reward's signals read, from one forward of `scorer` (two with `contrast`, none for text alone)."""
        config, reads = self.config, self.config.reads
        if Reads.COPY in reads and self.copy_weights is None:
            self.copy_weights = self.measure(rollout.prompts, scorer)
        own = any(name not in SIGNALS for name in config.weights)
        weights = self.copy_weights if Reads.COPY in reads or own else None
        seen = Reads.ATTENTION in reads
        if reads == Reads.TEXT:
            replay = _unread(rollout)
        else:
            replay = scorer.replay(rollout, attention=seen, copy_weights=weights)
        return Evidence(
            replay,
            # Text alone has no attention for `self` to read, and reads no salience either.
            salience(config.salience if seen else "content", replay, self.classes),
            response_content(rollout, self.classes),
            _contrast(rollout, scorer) if Reads.CONTRAST in reads else None,
            user_tokens(rollout.prompts, self.classes)[rollout.prompt_index] if config.renormalise else None,
        )

    @property
    def reads_attention(self) -> bool:
        """Whether a signal of this reward reads any attention."""
        return bool(self.config.reads & (Reads.ATTENTION | Reads.COPY))

    @property
    def needs_heads(self) -> bool:
        """Whether a signal of this reward reads the copy heads."""
        return Reads.COPY in self.config.reads

    def measure(self, prompts: Prompts, scorer: Policy | None = None) -> Tensor:
        """Copy-head weights [L, H] from the scorer's own samples to `prompts`. Raises `UserError` if none copies."""
        reader = scorer or self.reference or self.policy
        return heads.copy_weights(*heads.measure(reader, prompts, HEAD_SAMPLES, HEAD_SEED, self.classes))


def _unread(rollout: Rollout) -> Replay:
    """A replay of no model. NaN, not 0: what reads it after all is caught."""
    nothing = torch.full(rollout.response_mask.shape, math.nan, device=rollout.response_mask.device)
    return Replay(rollout, nothing, nothing, nothing)


def _contrast(rollout: Rollout, scorer: Policy) -> Tensor:
    """[B, R] log-probs of the responses after the next prompt of the batch that reads differently."""
    texts = rollout.prompts.texts
    if len(set(texts)) < 2:
        raise UserError(
            "signal contrast needs another prompt in the batch", fix="score several different prompts at once"
        )
    count = len(texts)
    other = [next(j % count for j in range(i + 1, i + count) if texts[j % count] != texts[i]) for i in range(count)]
    moved = rollout.prompts.select(torch.tensor(other, device=rollout.prompts.ids.device))
    return scorer.replay(replace(rollout, prompts=moved), attention=False).logprobs
