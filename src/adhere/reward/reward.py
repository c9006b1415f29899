"""A reward at work: bound to the model that reads, called on a rollout, or used to score texts.

reward = Σ_k weight_k · z(signal_k), z within the responses of one prompt, then the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adhere.errors import RunFailed, UserError, unknown_name
from adhere.inspection.inspection import Inspection
from adhere.progress import phase
from adhere.prompt import prompt_key
from adhere.reward import controls, signals
from adhere.reward.custom import checked, user_function
from adhere.reward.evidence import gather, maps_read, spread_read
from adhere.reward.gates import passes
from adhere.reward.group import counted, gate, group_normalise, level
from adhere.reward.heads import CopyHeads, check_shape, copy_heads
from adhere.reward.inspecting import inspected
from adhere.reward.named import NAMED, PREFERENCE, SIGNALS, Reads, RewardConfig, config_of
from adhere.reward.preference import PreferenceModel
from adhere.reward.salience import token_classes
from adhere.reward.signals import Evidence
from adhere.reward.words import Spelling
from adhere.types import Prompts, Reading, Rollout, Scores

if TYPE_CHECKING:
    from adhere.model.encode import Prompt
    from adhere.model.policy import Policy
    from adhere.model.settings import Sampling

FORMULAS: dict[str, Callable[..., Tensor]] = {
    name: getattr(signals, name, None) or getattr(controls, name) for name in SIGNALS
}
"""Name of a signal → its formula."""


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


class Reward:
    """A reward bound to the model that reads: call it on a rollout, or `score` texts.

    `policy` is read as it is and never copied. While it is trained, give `reference`, a frozen policy that reads in its
    place (`policy.reference()`), unless the config says `scorer: policy`. `functions`: signals of
    your own that the config names and that no module need hold. `heads` are the copy heads of the model that
    reads; where a signal needs them and none are given, they are looked up or measured now (`heads.copy_heads`), and
    never change afterwards: no prompt and no other response has a part in them.

    Raises `UserError`: the reward was made for another kind of model, or the heads were; or the model has no copy heads
    of its own to be found.

    >>> from adhere.model.policy import Policy
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> reward = Reward(RewardConfig({"coherence": 1.0}, normalise="none"), policy)
    >>> story = "mary went to the garden . john is in the office . where is mary ? answer :"
    >>> garden, office = reward.score([story] * 2, ["garden", "office"]).reward.tolist()
    >>> garden > office
    True
    """

    def __init__(
        self,
        config: RewardConfig,
        policy: Policy,
        heads: CopyHeads | None = None,
        reference: Policy | None = None,
        functions: Mapping[str, Callable[[Evidence], Tensor]] | None = None,
    ) -> None:
        if config.made_for not in (None, policy.kind):
            what = f"was made for {config.made_for}, and this model is {policy.kind}"
            raise UserError(what, where="reward", fix="calibrate on this very model")
        self.config = config
        self.policy = policy
        self.reference = reference if config.scorer == "reference" else None
        with phase(policy.progress, "reading the vocabulary"):
            self.classes = token_classes(policy.tokenizer)
            self.spelling = Spelling.of(policy.tokenizer)
        self.functions = functions or {}
        self._functions = {name: self._function(name) for name in config.weights}
        if heads is not None:
            check_shape(heads, self.scorer)
        elif Reads.COPY in config.reads:
            heads = copy_heads(self.scorer)
        self.heads = heads

    @classmethod
    def named(
        cls, name: str, policy: Policy, heads: CopyHeads | None = None, reference: Policy | None = None
    ) -> Reward:
        """A reward of `NAMED`."""
        if name not in NAMED:
            raise unknown_name("reward", name, NAMED)
        return cls(NAMED[name], policy, heads, reference)

    @classmethod
    def resolve(
        cls,
        spec: str | Mapping[str, Any],
        policy: Policy,
        heads: CopyHeads | None = None,
        reference: Policy | None = None,
    ) -> Reward:
        """A reward from what a user wrote: see `config_of`."""
        return cls(config_of(spec), policy, heads, reference)

    @property
    def scorer(self) -> Policy:
        """The model that reads responses: the reference where there is one, else the policy."""
        return self.reference or self.policy

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[int]],
        answers: Sequence[Sequence[str]] | None = None,
        *,
        training: bool = False,
        names: Sequence[str] | None = None,
    ) -> Scores:
        """Score `responses[i]` (text, or token ids as sampled) as a response to `prompts[i]`, from `names[i]`.

        Equal prompts (and answers) form a group, wherever they stand. The scores come in the order given; the reading
        with them only if that order keeps groups together. Raises `TooLong` where a prompt and its response do not fit
        the model's context.
        """
        rollout, back = self.paired(prompts, responses, answers, names)
        scores = self(rollout, training=training)
        in_order = torch.equal(back.cpu(), torch.arange(len(back)))
        return Scores(
            scores.reward[back],
            {name: value[back] for name, value in scores.signals.items()},
            scores.reading if in_order else None,
        )

    def paired(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[int]],
        answers: Sequence[Sequence[str]] | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[Rollout, Tensor]:
        """`responses[i]` as a response to `prompts[i]`, groups together; and the row that each i has there, [B]."""
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
        where = [name or f"response {n}" for n, name in enumerate(names or [""] * len(prompts), 1)]
        once = list(first.values())
        encoded = self.policy.encode([prompts[i] for i in once], [known[i] for i in once], [where[i] for i in once])
        places = order.tolist()
        rollout = self.policy.respond(
            encoded, [responses[i] for i in places], index[order], names=[where[i] for i in places]
        )
        return rollout, order.argsort().to(rollout.ended.device)

    def __call__(
        self,
        rollout: Rollout,
        policy: Policy | None = None,
        reading: Reading | None = None,
        *,
        training: bool = False,
    ) -> Scores:
        """Score a rollout. `policy` is the policy as it is now, the reader where the config says `scorer: policy`;
        `reading`: what that reader has read of it already (see `sample`)."""
        return self.score_evidence(self.evidence(rollout, self.reference or policy or self.policy, reading), training)

    def sample(
        self, policy: Policy, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int
    ) -> tuple[Rollout, Reading | None]:
        """Responses of `policy`, with its reading of them where the policy itself is the scorer: it is read as it
        samples, and scoring takes no forward of its own."""
        if self.config.scorer != "policy" or self.config.reads == Reads.TEXT or Reads.ASKING in self.config.reads:
            return policy.sample(prompts, num_samples, sampling=sampling, seed=seed), None
        maps, spread = maps_read(self.config, self.heads), spread_read(self.config)
        reading = policy.sample_and_read(prompts, num_samples, sampling, seed, maps, spread=spread)
        return reading.rollout, reading

    def inspect(
        self, prompt: Prompt, response: str | None = None, *, max_new_tokens: int = 64, name: str = ""
    ) -> Inspection:
        """`Policy.inspect` by the model that reads, with this reward and its signals beside.

        A reward normalised within the group says nothing of one response, so its signals stand by themselves.
        """
        reader = self.scorer
        evidence = self.evidence(reader.answered(prompt, response, max_new_tokens, name), reader)
        scores = self.score_evidence(evidence)
        reading, heads = evidence.reading, self.heads
        if reading.attention is None or (heads is not None and reading.copy_attention is None):
            reading = reader.read(reading.rollout, copy_weights=None if heads is None else heads.weights)
        figures = {"reward": scores.reward} if self.config.normalise == "none" else {}
        figures |= scores.signals
        return inspected(reader, reading, heads, {key: float(value) for key, value in figures.items()})

    def score_evidence(self, evidence: Evidence, training: bool = False) -> Scores:
        """The signals and the reward of responses that have been read: no model runs here. `training`: as training
        takes them, with a group at its lowest reward where none of it passes `learn_from`."""
        rollout = evidence.reading.rollout
        values: dict[str, Tensor] = {}
        for name, function in self._functions.items():
            values[name] = function(evidence).float()
            if not torch.isfinite(values[name]).all():
                fix = "look for NaN in the scorer's weights"
                raise RunFailed(f"signal {name} is not finite", where="reward", fix=fix)
        passed = passes(self.config.gates, evidence)
        if self.config.logprob_floor is not None:
            low = (evidence.reading.logprobs < self.config.logprob_floor) & rollout.response_mask
            passed = passed & ~low.any(-1)
        reward = combine(values, self.config, rollout.prompt_index, passed)
        if training and self.config.learn_from:
            reward = level(reward, rollout.prompt_index, passed & passes(self.config.learn_from, evidence))
        return Scores(reward, values, None if self.config.reads == Reads.TEXT else evidence.reading)

    def _function(self, name: str) -> Callable[[Evidence], Tensor]:
        """The signal `name`: ours, a fitted reward model, or the user's own."""
        if name in SIGNALS:
            options = {option: getattr(self.config, where) for option, where in SIGNALS[name].options.items()}
            return partial(FORMULAS[name], **options)
        if name.startswith(PREFERENCE):
            return PreferenceModel.load(name.removeprefix(PREFERENCE), self.policy.device, self.policy.progress).signal
        return checked(name, self.functions[name]) if name in self.functions else user_function(name)

    def evidence(self, rollout: Rollout, scorer: Policy | None = None, reading: Reading | None = None) -> Evidence:
        """What this reward's signals read of a rollout: see `adhere.reward.evidence.gather`."""
        return gather(self.config, rollout, scorer or self.scorer, self.heads, self.classes, self.spelling, reading)

    @property
    def reads_attention(self) -> bool:
        """Whether a signal of this reward reads any attention."""
        return bool(self.config.reads & (Reads.ATTENTION | Reads.COPY))
