"""A reward at work: bound to the model that reads, called on a rollout, or used to score texts.

reward = Σ_k weight_k · z(signal_k), z within the responses of one prompt, then the gates.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adhere.errors import RunFailed, UserError, unknown_name
from adhere.inspection.inspection import Inspection
from adhere.prompt import prompt_key
from adhere.reward import controls, heads
from adhere.reward.group import counted, gate, group_normalise
from adhere.reward.named import GATES, NAMED, PREFERENCE, SIGNALS, Reads, RewardConfig, config_of
from adhere.reward.preference import PreferenceModel
from adhere.reward.salience import (
    attended,
    only,
    question_only,
    response_content,
    salience,
    token_classes,
    user_tokens,
)
from adhere.reward.signals import Evidence
from adhere.types import Prompts, Reading, Rollout, Scores

if TYPE_CHECKING:
    from adhere.model.encode import Prompt
    from adhere.model.policy import Policy
    from adhere.model.settings import Sampling

# Enough samples to tell a copy head (0.4 of its tokens) from the rest (0.05) on a few prompts.
HEAD_SAMPLES = 4
HEAD_SEED = 0


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
    there = here in sys.path
    if not there:
        sys.path.append(here)  # last, so that a stray file never hides an installed module
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{spec!r} cannot be imported ({error})", where="reward", fix=fix) from error
    finally:
        if not there:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{spec!r}: {module_name} has no function {name!r}", where="reward", fix=fix)

    def checked(evidence: Evidence) -> Tensor:
        value = function(evidence)
        want = f"return a finite float tensor of shape [{len(evidence.reading.rollout)}], a number per response"
        if not isinstance(value, Tensor):
            raise UserError(f"{spec!r} returned {type(value).__name__}", where="reward", fix=want)
        if not value.is_floating_point() or value.shape != (len(evidence.reading.rollout),):
            raise UserError(f"{spec!r} returned {value.dtype} {list(value.shape)}", where="reward", fix=want)
        if not torch.isfinite(value).all():
            raise UserError(f"{spec!r} returned a value that is not finite", where="reward", fix=want)
        return value

    return checked


class Reward:
    """A reward bound to the model that reads: call it on a rollout, or `score` texts.

    `copy_weights` [L, H] are measured on the first prompts it sees when a signal needs them and none were given; they
    stay from then on, as `reward.copy_weights`, for the run to save. `reference` is the frozen scorer: by default
    a copy of the policy as it is now; where nothing is trained, the policy itself will do.
    """

    def __init__(
        self,
        config: RewardConfig,
        policy: Policy,
        copy_weights: Tensor | None = None,
        reference: Policy | None = None,
    ) -> None:
        if config.made_for not in (None, policy.kind):
            what = f"was made for {config.made_for}, and this model is {policy.kind}"
            raise UserError(what, where="reward", fix="calibrate on this very model")
        self.config = config
        self.policy = policy
        self.copy_weights = copy_weights
        self.classes = token_classes(policy.tokenizer)
        self._functions = {name: self._function(name) for name in config.weights}
        # Taken now: the reference is what the policy is at the start. Text alone needs no second model.
        frozen = config.scorer == "reference" and config.reads != Reads.TEXT
        self.reference: Policy | None = (reference or policy.reference()) if frozen else None

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
        responses: Sequence[str | Sequence[int]],
        answers: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """Score `responses[i]` (text, or token ids as sampled) as a response to `prompts[i]`.

        Equal prompts (and answers) form a group, wherever they stand. The scores come in the order given; the reading
        with them only if that order keeps groups together.
        """
        if not responses or len(prompts) != len(responses) or (answers is not None and len(answers) != len(prompts)):
            counts = f"{len(prompts)} prompts and {len(responses)} responses"
            counts += "" if answers is None else f" and {len(answers)} lists of answers"
            raise UserError(f"cannot score {counts}", fix="give one prompt, and one list of answers, per response")
        known = [tuple(row) for row in answers] if answers is not None else [()] * len(prompts)
        keys = [(prompt_key(prompt), row) for prompt, row in zip(prompts, known, strict=True)]
        first: dict[tuple[str, tuple[str, ...]], int] = {}
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
            scores.reading if torch.equal(order, torch.arange(len(order))) else None,
        )

    def __call__(self, rollout: Rollout, policy: Policy | None = None, reading: Reading | None = None) -> Scores:
        """Score a rollout. `policy` is the policy as it is now, the reader where the config says `scorer: policy`;
        `reading`: what that reader has read of it already (see `sample`)."""
        return self.score_evidence(self.evidence(rollout, self.reference or policy or self.policy, reading))

    def sample(
        self, policy: Policy, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int
    ) -> tuple[Rollout, Reading | None]:
        """Responses of `policy`, with its reading of them where the policy itself is the scorer: it is read as it
        samples, and scoring takes no forward of its own."""
        if self.config.scorer != "policy" or self.config.reads == Reads.TEXT:
            return policy.sample(prompts, num_samples, sampling=sampling, seed=seed), None
        reading = policy.sample_and_read(prompts, num_samples, sampling, seed, self._maps(prompts, policy))
        return reading.rollout, reading

    def inspect(
        self, prompt: Prompt, response: str | None = None, *, max_new_tokens: int = 64, name: str = ""
    ) -> Inspection:
        """`Policy.inspect` by the model that reads, with this reward and its signals beside.

        Copy heads, where a signal reads them, are measured on this prompt alone unless the reward has some already.
        A reward normalised within the group says nothing of one response, so its signals stand by themselves.
        """
        reader = self.reference or self.policy
        evidence = self.evidence(reader.answered(prompt, response, max_new_tokens, name), reader)
        scores = self.score_evidence(evidence)
        reading = evidence.reading if evidence.reading.attention is not None else reader.read(evidence.reading.rollout)
        figures = {"reward": scores.reward} if self.config.normalise == "none" else {}
        figures |= scores.signals
        return Inspection.of(reading, self.policy.tokenizer, {key: float(value) for key, value in figures.items()})

    def score_evidence(self, evidence: Evidence) -> Scores:
        """The signals and the reward of responses that have been read: no model runs here."""
        rollout = evidence.reading.rollout
        values: dict[str, Tensor] = {}
        for name, function in self._functions.items():
            values[name] = function(evidence).float()
            if not torch.isfinite(values[name]).all():
                fix = "look for NaN in the scorer's weights"
                raise RunFailed(f"signal {name} is not finite", where="reward", fix=fix)
        passed = torch.ones_like(rollout.ended)
        for name in self.config.gates:
            passed = passed & GATES[name](rollout)
        if self.config.logprob_floor is not None:
            low = (evidence.reading.logprobs < self.config.logprob_floor) & rollout.response_mask
            passed = passed & ~low.any(-1)
        reward = combine(values, self.config, rollout.prompt_index, passed)
        return Scores(reward, values, None if self.config.reads == Reads.TEXT else evidence.reading)

    def _function(self, name: str) -> Callable[[Evidence], Tensor]:
        """The signal `name`: ours, a fitted reward model, or the user's own."""
        if name in SIGNALS:
            return partial(SIGNALS[name], config=self.config)
        if name.startswith(PREFERENCE):
            return PreferenceModel.load(name.removeprefix(PREFERENCE), self.policy.device).signal
        return user_function(name)

    def _maps(self, prompts: Prompts, scorer: Policy) -> dict[str, Tensor | None]:
        """The maps of a reading that the signals read, and the weights of their heads; copy heads are measured here."""
        reads = self.config.reads
        if Reads.COPY in reads and self.copy_weights is None:
            self.copy_weights = self.measure(prompts, scorer)
        maps: dict[str, Tensor | None] = {"attention": None} if Reads.ATTENTION in reads else {}
        own = any(name not in SIGNALS and not name.startswith(PREFERENCE) for name in self.config.weights)
        if self.copy_weights is not None and (Reads.COPY in reads or own):
            maps["copy_attention"] = self.copy_weights
        return maps

    def evidence(self, rollout: Rollout, scorer: Policy, reading: Reading | None = None) -> Evidence:
        """What this reward's signals read, from one forward of `scorer` (two with `contrast`, none for text alone, one
        less where it has read the rollout already: `reading`)."""
        config, reads = self.config, self.config.reads
        maps = self._maps(rollout.prompts, scorer)
        seen = "attention" in maps
        if reads == Reads.TEXT:
            reading = _unread(rollout)
        else:
            reading = reading or scorer.read(rollout, attention=seen, copy_weights=maps.get("copy_attention"))
            reading = controls.shuffled(reading) if config.shuffle else reading
        # Text alone has no attention for `self` to read, and reads no salience either.
        weighed = salience(config.salience if seen else "content", reading, self.classes)
        return Evidence(
            reading,
            weighed,
            response_content(rollout, self.classes),
            _contrast(rollout, scorer) if Reads.CONTRAST in reads else None,
            self._after_question(rollout, scorer) if Reads.QUESTION in reads else None,
            self._without_attended(reading, scorer) if Reads.ABLATED in reads else None,
            scorer.head_mass(rollout, weighed) if Reads.HEADS in reads else None,
            user_tokens(rollout.prompts, self.classes)[rollout.prompt_index] if config.renormalise else None,
        )

    def _without_attended(self, reading: Reading, scorer: Policy) -> Tensor:
        """[B, R] log-probs of the responses without the context that the copy heads attend to most."""
        assert reading.copy_attention is not None
        prompts = reading.rollout.prompts
        dropped = attended(reading, reading.copy_attention, self.classes, self.config.ablate)
        rest = only(prompts, prompts.mask & ~dropped, left=not scorer.is_encoder_decoder)
        return scorer.read(replace(reading.rollout, prompts=rest), attention=False).logprobs

    def _after_question(self, rollout: Rollout, scorer: Policy) -> Tensor:
        """[B, R] log-probs of the responses after the question alone."""
        asked, _ = question_only(rollout.prompts, self.classes, left=not scorer.is_encoder_decoder)
        return scorer.read(replace(rollout, prompts=asked), attention=False).logprobs

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


def _unread(rollout: Rollout) -> Reading:
    """A reading of no model. NaN, not 0: what reads it after all is caught."""
    nothing = torch.full(rollout.response_mask.shape, math.nan, device=rollout.response_mask.device)
    return Reading(rollout, nothing, nothing, nothing)


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
    return scorer.read(replace(rollout, prompts=moved), attention=False).logprobs
