"""adhere's rewards in TRL: `AttentionReward` stands in `reward_funcs` of `GRPOTrainer` and `RLOOTrainer`.

It reads the token ids that TRL sampled, not their text again: what is scored is what was said, and whether a response
ended by itself is known. Nothing is kept from call to call, so gradient accumulation, several iterations on one batch
and evaluation in between change nothing. As GRPO's `rollout_func`, `AttentionReward.rollout` samples in TRL's place;
what it read while it did is kept for the one call that scores those samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import Any

import torch

from adhere.errors import TooLong, UnsupportedModel, UserError
from adhere.model.encode import Prompt
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.prompt import rendered
from adhere.reward.heads import CopyHeads
from adhere.reward.named import Reads, config_of
from adhere.reward.reward import Reward
from adhere.types import Reading, Rollout

Completion = str | Sequence[Mapping[str, Any]]


class AttentionReward:
    """A reward of adhere as TRL calls it.

    `policy`: a folder or hub id, loaded as a frozen scorer; or the `Policy` whose `model` the trainer trains. Of that,
    the reward reads a copy made now (with LoRA: the model with its adapter off), or, where its config says
    `scorer: policy`, the model as it learns. `reward`: a name, `module:function`, or a mapping as in YAML.
    `name` is what TRL's logs call it (default: the reward's name). `heads`: copy heads of the model, where they are not
    to be looked up or measured (`adhere.reward.heads`); every process finds the same.

    Equal prompts of a call form a group. Over several processes, a group-normalised reward and its gates see the part
    of a group that their process holds: let `per_device_train_batch_size × steps_per_generation` be a multiple of
    `num_generations`.

    Raises `UserError`: TRL is not there, no such reward, or a path where the reward reads the policy in training;
    `UnsupportedModel` for an encoder–decoder, which TRL does not train.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        reward: str | Mapping[str, Any] = "attention",
        *,
        name: str | None = None,
        heads: CopyHeads | None = None,
    ) -> None:
        if find_spec("trl") is None:
            raise UserError("TRL is not installed", fix="pip install 'adhere[trl]'")
        config = config_of(reward)
        own = isinstance(policy, Policy)
        if config.scorer == "policy" and not own:
            raise UserError(
                "this reward reads the policy in training, and a path was given",
                where="AttentionReward",
                fix="give the Policy whose model the trainer trains, or a mapping with scorer: reference",
            )
        reader = policy if isinstance(policy, Policy) else Policy.load(policy)
        if reader.is_encoder_decoder:
            raise UnsupportedModel("TRL trains no encoder–decoder", where="AttentionReward", fix="use `adhere train`")
        frozen = own and config.scorer == "reference" and config.reads != Reads.TEXT
        self.reward = Reward(config, reader, heads, reader.reference() if frozen else None)
        self._read: Reading | None = None
        self.__name__ = name or (reward if isinstance(reward, str) else " + ".join(config.weights))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        answers: Sequence[Sequence[str] | str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[float | None]], None] | None = None,
        trainer_state: object | None = None,
        **_columns: Any,
    ) -> list[float | None]:
        """The reward of each completion; None where it is empty, or too long for the scorer. `answers` is read from
        the data set's column where the reward needs them. Each signal goes to `log_metric` as its mean, to `log_extra`
        row by row. TRL's trainers give `trainer_state`: with it the rewards are those of training (`learn_from`),
        without it those of `score`. Raises `UserError` where the ids are not of this policy's tokenizer."""
        prompts = rendered(prompts)
        self._check_vocabulary(completions, completion_ids)
        places = self._scorable(prompts, completion_ids)
        rewards: list[float | None] = [None] * len(prompts)
        if not places:
            return rewards
        known = None if answers is None else [[a] if isinstance(a, str) else a for a in (answers[i] for i in places)]
        read, self._read = self._read, None
        training = trainer_state is not None
        with self._still():
            if read is not None and len(places) == len(prompts) and _said(read.rollout) == [*map(list, completion_ids)]:
                given = read if known is None else _with_answers(read, known)
                scores = self.reward(read.rollout, reading=given, training=training)
            else:
                asked, said = [prompts[i] for i in places], [completion_ids[i] for i in places]
                scores = self.reward.score(asked, said, known, training=training)
        for place, value in zip(places, scores.reward.tolist(), strict=True):
            rewards[place] = value
        for signal, values in scores.signals.items():
            if log_metric is not None:
                log_metric(f"{self.__name__}/{signal}", float(values.mean()))
            if log_extra is not None:
                column: list[float | None] = [None] * len(prompts)
                for place, value in zip(places, values.tolist(), strict=True):
                    column[place] = value
                log_extra(f"{self.__name__}/{signal}", column)
        return rewards

    def rollout(self, prompts: Sequence[Prompt], trainer: Any) -> dict[str, list[Any]]:
        """Samples for TRL's GRPO: give it as `rollout_func`. {"prompt_ids", "completion_ids", "logprobs"}, row by row.

        The prompt of a group is computed once, and a reward that reads the policy in training (`scorer: policy`) reads
        it as it samples, without a forward of its own. Raises `UserError`: a path was given instead of the policy, or
        TRL's options ask for what is not sampled here.
        """
        args, policy = trainer.args, self.reward.policy
        if trainer.accelerator.unwrap_model(trainer.model) is not policy.model:
            raise UserError(
                "samples another model than TRL trains", where="rollout_func", fix="give AttentionReward it"
            )
        odd = {"min_p": args.min_p, "generation_kwargs": args.generation_kwargs, "use_vllm": args.use_vllm,
               "repetition_penalty": args.repetition_penalty != 1.0}  # fmt: skip
        if asked := [name for name, value in odd.items() if value]:
            raise UserError(
                f"{', '.join(asked)}: not sampled here", where="rollout_func", fix="leave that, or this, out"
            )
        sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_completion_length)
        runs = [len(list(run)) for _, run in groupby(map(json.dumps, prompts))]
        count = gcd(*runs)  # samples of a group stand side by side
        with self._still():
            asking = policy.encode(rendered(prompts[::count]))
            policy.check_room(asking, sampling.max_new_tokens, [""] * len(asking))
            # TRL seeds torch anew for each process, so its generator is the one to draw from.
            seed = int(torch.randint(2**62, ()))
            rollout, read = self.reward.sample(policy, asking, count, sampling, seed)
        # Of runs of several lengths some group was sampled in pieces, which a reward must not take for groups.
        self._read = read if set(runs) == {count} else None
        assert rollout.logprobs is not None
        ids = [row[mask].tolist() for row, mask in zip(asking.ids, asking.mask, strict=True) for _ in range(count)]
        drawn = zip(rollout.logprobs, rollout.response_mask, strict=True)
        return {
            "prompt_ids": ids,
            "completion_ids": _said(rollout),
            "logprobs": [row[mask].tolist() for row, mask in drawn],
        }

    def _scorable(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]) -> list[int]:
        """Places of the rows with a response that fits the scorer's context behind its prompt."""
        policy = self.reward.policy
        room: list[tuple[Prompt, float]] = []  # of each prompt seen; TRL's stand side by side, K at a time
        found = []
        for place, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
            if not room or room[-1][0] != prompt:
                room.append((prompt, self._room(policy, prompt)))
            if 0 < len(ids) <= room[-1][1]:
                found.append(place)
        return found

    @staticmethod
    def _room(policy: Policy, prompt: Prompt) -> float:
        try:
            left = policy.response_room(policy.encode([prompt]))
        except TooLong:
            return 0
        return float("inf") if left is None else int(left)

    def _check_vocabulary(self, completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]]) -> None:
        """Ids of another tokenizer would be scored as other words: compare what they say with TRL's text."""
        for completion, ids in zip(completions, completion_ids, strict=True):
            if isinstance(completion, str):
                text = completion
            elif len(completion) == 1 and isinstance(completion[0].get("content"), str):
                text = completion[0]["content"]
            else:
                continue  # turns of tools in between, which TRL has taken apart
            own = str(self.reward.policy.tokenizer.decode(list(ids), skip_special_tokens=True))
            if text.strip() not in own:
                raise UserError(
                    f"the ids that TRL sampled read {own[:60]!r} here and {text[:60]!r} there: two tokenizers",
                    where="AttentionReward",
                    fix="score with a model that has the tokenizer of the model in training",
                )

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Dropout off while a model reads or samples: the trainer's is in training mode, and may be the scorer."""
        readers = [policy for policy in (self.reward.reference, self.reward.policy) if policy is not None]
        moving = [module for policy in readers for module in policy.network.modules() if module.training]
        for policy in readers:
            policy.network.eval()
        try:
            yield
        finally:
            for module in moving:
                module.training = True


def _said(rollout: Rollout) -> list[list[int]]:
    """The token ids of each response."""
    return [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def _with_answers(reading: Reading, known: Sequence[Sequence[str]]) -> Reading:
    """The reading with the accepted answers of each row's prompt."""
    rollout = reading.rollout
    answers = dict(zip(rollout.prompt_index.tolist(), map(tuple, known), strict=True))
    prompts = replace(rollout.prompts, answers=tuple(answers[place] for place in sorted(answers)))
    return replace(reading, rollout=replace(rollout, prompts=prompts))
