"""Responses scored and ranked: given ones row by row; of many candidates the best, all, or pairs to train on.

Candidates are drawn by the policy, come with the rows, or from a server; who draws them is a function (`Draw`), so that
ranking is one path. Rows pass batch by batch, and a batch depends on its place and the seed alone.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch

from adhere.data import Row
from adhere.errors import UserError
from adhere.model.encode import Prompt
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.prompt import prompt_key
from adhere.ranking_settings import RankConfig
from adhere.reward.group import STD_FLOOR
from adhere.reward.reward import Reward
from adhere.reward.sources import cite
from adhere.types import Prompts, Rollout, Scores

NO_TALLY = {"best": 0.0, "all": 0.0, "left_out": 0.0, "flat": 0.0, "cut_off": 0.0}
"""What `lines_of` adds to."""

CHECKED = 64
"""Rows tokenised at a time, to see that they fit the model."""

Draw = Callable[[Sequence[Row], Prompts, int], Rollout]
"""Rows, their encoded prompts and a seed → the candidates of each."""
Response = str | Sequence[int]
"""Text, or token ids as they were sampled."""
Complete = Callable[[Sequence[Prompt], int], list[list[tuple[str, bool]]]]
"""Prompts and a seed → for each, texts and whether they ended by themselves."""


@dataclass(frozen=True)
class Ranked:
    """A row and candidates, each {"response", "reward", "signals", "evidence"}, best first; of equals, the first."""

    row: Row
    candidates: tuple[dict[str, Any], ...]
    cut_off: int = 0
    """Candidates that did not end by themselves."""
    turns: Sequence[Mapping[str, str]] | None = None
    """The chat that the prompt was put to the model as; None where it was plain text."""

    @property
    def flat(self) -> bool:
        """Whether there are several candidates and all of them earn the same."""
        best, worst = self.candidates[0]["reward"], self.candidates[-1]["reward"]
        return len(self.candidates) > 1 and best - worst <= STD_FLOOR

    def best(self) -> dict[str, Any]:
        """The row with its best response, the reward and the signals of that."""
        return {**self._fields(), **self.candidates[0]}

    def all(self) -> dict[str, Any]:
        """The row with every candidate; it can be ranked again."""
        return {**self._fields(), "candidates": list(self.candidates)}

    def _fields(self) -> dict[str, Any]:
        """The row as it was read, without the assistant turn that a response replaces."""
        fields = dict(self.row.fields) or {"prompt": self.row.prompt}
        for name in ("prompt", "messages"):
            turns = fields.get(name)
            if isinstance(turns, list) and turns[-1]["role"] == "assistant":
                fields[name] = turns[:-1]
        return fields

    def pair(self, margin: float, blank: Callable[[str, str], str]) -> dict[str, Any] | None:
        """Best against worst in TRL's DPO format; None where they tie, differ by less than `margin`, or read alike.

        A prompt that was asked as a chat is written as one. `blank(prompt, response)` stands between a plain prompt and
        a response, which TRL joins as they are.
        """
        best, worst = self.candidates[0], self.candidates[-1]
        difference = best["reward"] - worst["reward"]
        chosen, rejected = best["response"], worst["response"]
        if not difference > 0 or difference < margin or chosen.strip() == rejected.strip():
            return None
        prompt = self.row.prompt if self.turns is None else [dict(turn) for turn in self.turns]
        if isinstance(prompt, str):
            chosen, rejected = (blank(prompt, text) + text for text in (chosen, rejected))
        else:
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": difference}


@dataclass(frozen=True)
class Group:
    """Responses to one prompt, to be scored beside each other."""

    prompt: Prompt
    responses: Sequence[Response]
    ended: Sequence[bool]
    """Whether each text ended by itself; ids tell that themselves."""
    answers: Sequence[str] = ()
    where: str = ""
    """For messages."""


def sampled_candidates(policy: Policy, config: RankConfig, given: Collection[str] | None = None) -> Draw:
    """Candidates sampled by the policy. `given`: the fields of `config.sampling` that the user set (None: all); the
    others are those of the model's generation configuration. Raises `UserError` where that cannot be sampled with."""
    if given is not None:
        kept = {name: getattr(config.sampling, name) for name in given}
        config = replace(config, sampling=Sampling.of(policy.network.generation_config, **kept))
        config.check_draw()
    return lambda _rows, prompts, seed: policy.sample(prompts, config.num_samples, sampling=config.sampling, seed=seed)


def given_candidates(policy: Policy) -> Draw:
    """The candidates that the rows bring; each ended by itself."""

    def draw(rows: Sequence[Row], prompts: Prompts, _seed: int) -> Rollout:
        return _rollout(policy, _names(rows), prompts, [[(text, True) for text in row.candidates] for row in rows])

    return draw


def served_candidates(policy: Policy, complete: Complete) -> Draw:
    """Candidates from elsewhere, by `complete`."""

    def draw(rows: Sequence[Row], prompts: Prompts, seed: int) -> Rollout:
        asked = [policy.turns_of(row.prompt) or row.prompt for row in rows]
        return _rollout(policy, _names(rows), prompts, complete(asked, seed))

    return draw


def _names(rows: Sequence[Row]) -> list[str]:
    return [row.where for row in rows]


def _rollout(
    policy: Policy, names: Sequence[str], prompts: Prompts, said: Sequence[Sequence[tuple[Response, bool]]]
) -> Rollout:
    """Given responses as candidates; raises `TooLong` for one that the context of the scoring model cannot hold."""
    index = [place for place, texts in enumerate(said) for _ in texts]
    flat = [candidate for texts in said for candidate in texts]
    return policy.respond(
        prompts,
        [response for response, _ in flat],
        torch.tensor(index),
        [ended for _, ended in flat],
        [names[place] or f"prompt {place + 1}" for place in index],
    )


def check(policy: Policy, rows: Iterable[Row], config: RankConfig) -> None:
    """Raise `UserError` unless every prompt, with its candidates or new tokens, fits the model."""
    for batch in batched(rows, config.batch_size):
        names = _names(batch)
        prompts = policy.encode([row.prompt for row in batch], names=names)
        if batch[0].candidates:
            given_candidates(policy)(batch, prompts, 0)
        else:
            policy.check_room(prompts, config.sampling.max_new_tokens, names)


def rank(reward: Reward, rows: Iterable[Row], config: RankConfig, draw: Draw, first: int = 0) -> Iterator[list[Ranked]]:
    """The rows, ranked, a batch at a time. `first`: rows before them (whole batches, or all), ranked elsewhere."""
    start = -(-first // config.batch_size)  # rounded up: after the last row, which need not fill its batch
    for number, batch in enumerate(batched(rows, config.batch_size), start):
        prompts = reward.policy.encode(
            [row.prompt for row in batch], [row.answers for row in batch], [row.where for row in batch]
        )
        rollout = draw(batch, prompts, random.Random(f"{config.seed}/{number}").getrandbits(63))
        candidates: list[list[dict[str, Any]]] = [[] for _ in batch]
        found = _figures(reward(rollout), reward.policy, cited=config.keep != "pairs")
        for place, text, figures in zip(rollout.prompt_index.tolist(), rollout.responses, found, strict=True):
            candidates[place].append({"response": text, **figures})
        cut_off = torch.bincount(rollout.prompt_index[~rollout.ended], minlength=len(batch)).tolist()
        yield [
            Ranked(
                row,
                tuple(sorted(found, key=lambda candidate: candidate["reward"], reverse=True)),
                cut,
                reward.policy.turns_of(row.prompt),
            )
            for row, found, cut in zip(batch, candidates, cut_off, strict=True)
        ]


def lines_of(
    batch: Sequence[Ranked], config: RankConfig, blank: Callable[[str, str], str], tally: dict[str, float]
) -> list[dict[str, Any]]:
    """What is written of a ranked batch. To `tally` go sums over prompts: the best reward, the mean of all candidates,
    whether it was left out, whether its candidates all earn the same, the share of them that was cut off."""
    lines: list[dict[str, Any]] = []
    for ranked in batch:
        tally["best"] += ranked.candidates[0]["reward"]
        tally["all"] += sum(one["reward"] for one in ranked.candidates) / len(ranked.candidates)
        tally["flat"] += ranked.flat
        tally["cut_off"] += ranked.cut_off / len(ranked.candidates)
        if config.keep == "pairs":
            pair = ranked.pair(config.margin, blank)
            tally["left_out"] += pair is None
            lines += [pair] if pair else []
        else:
            lines.append(ranked.best() if config.keep == "best" else ranked.all())
    return lines


def blank_between(policy: Policy) -> Callable[[str, str], str]:
    """What belongs between a prompt and a response for their joint text to have the tokens that were scored.

    A blank where a tokenizer drops it in decoding (words, SentencePiece), nothing where responses bring their own.
    """
    tokenizer = policy.tokenizer

    def between(prompt: str, response: str) -> str:
        before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after: list[int] = tokenizer(response, add_special_tokens=False)["input_ids"]

        def parts(blank: str) -> bool:
            joined: list[int] = tokenizer(prompt + blank + response, add_special_tokens=False)["input_ids"]
            return joined == before + after

        return " " if not parts("") and parts(" ") else ""

    return between


def score_rows(reward: Reward, rows: Sequence[Row], *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Each row as it was read, plus `reward`, `signals` and `evidence` (see `_figures`); in the order given.

    Rows with the same prompt form a group wherever they stand, so a group-normalised reward compares them. About
    `batch_size` rows are scored at a time; a group is never split. Raises what `check_given` does.
    """
    check_given(reward.policy, rows)  # all readable, or none scored
    scored: list[dict[str, Any]] = [{} for _ in rows]
    for places in reward.policy.progress(_groups(rows, batch_size), "scoring", len(rows), size=len):
        part = [rows[place] for place in places]
        rollout, back = reward.paired(
            [row.prompt for row in part],
            [row.response or "" for row in part],
            [row.answers for row in part],
            _names(part),
        )
        figures_of = _figures(reward(rollout), reward.policy)
        for place, figures in zip(places, [figures_of[i] for i in back.tolist()], strict=True):
            scored[place] = {**rows[place].fields, **figures}
    return scored


def check_given(policy: Policy, rows: Iterable[Row]) -> None:
    """Raise `UserError` for a prompt that cannot be read, `TooLong` for a response that does not fit the context of the
    model with its prompt."""
    for batch in batched(rows, CHECKED):
        prompts = policy.encode([row.prompt for row in batch], names=_names(batch))
        policy.respond(prompts, [row.response or "" for row in batch], torch.arange(len(batch)), names=_names(batch))


def group_starts(rows: Iterable[Row], batch_size: int, shard_rows: int) -> tuple[list[int], int]:
    """Where a file of rows can be cut into parts of `shard_rows` or more that `score_rows` scores as it does the whole:
    the places of their first rows, and how many groups there are.

    No group or batch is cut, so that needs the rows of a prompt to be neighbours: `scattered` tells where they are not.
    """
    starts, batch, groups, before = [0], 0, 0, ""
    for place, row in enumerate(rows):
        if (key := _key(row)) == before:
            continue
        groups, before = groups + 1, key
        if place - batch >= batch_size:
            batch = place
            if place - starts[-1] >= shard_rows:
                starts.append(place)
    return starts, groups


def scattered(rows: Callable[[], Iterable[Row]]) -> tuple[Row, Row] | None:
    """A row whose prompt was there before, but for another prompt in between, and the row that had it first.

    Holds eight bytes a group, and goes through the rows a second time only where two groups are alike in these.
    """
    marks = array("Q", (int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) for key, _ in _runs(rows())))
    sorted_marks = np.sort(np.frombuffer(marks, dtype=np.uint64))
    alike = set(sorted_marks[1:][sorted_marks[1:] == sorted_marks[:-1]].tolist())
    first: dict[str, Row] = {}
    for (key, row), found in zip(_runs(rows()) if alike else (), marks, strict=False):
        if found in alike and first.setdefault(key, row) is not row:
            return row, first[key]
    return None


def _runs(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """The prompt and the first row of each stretch of rows with the same prompt."""
    for key, run in groupby(rows, _key):
        yield key, next(run)


def read_groups(policy: Policy, groups: Sequence[Group]) -> Rollout:
    """Groups as a rollout, in their order. Raises `UserError` for a prompt that cannot be read, `TooLong` for one that
    does not fit the model's context with each of its responses."""
    names = [group.where for group in groups]
    prompts = policy.encode([group.prompt for group in groups], [group.answers for group in groups], names)
    said = [list(zip(group.responses, group.ended, strict=True)) for group in groups]
    return _rollout(policy, names, prompts, said)


def score_groups(reward: Reward, groups: Sequence[Group]) -> list[list[dict[str, Any]]]:
    """{"reward", "signals", "evidence"} of each response of each group. Two groups stay two, though their prompts be
    equal."""
    figures = iter(_figures(reward(read_groups(reward.policy, groups)), reward.policy))
    return [[next(figures) for _ in group.responses] for group in groups]


def _figures(scores: Scores, policy: Policy, *, cited: bool = True) -> list[dict[str, Any]]:
    """{"reward", "signals"} of each response; and, where the copy heads were read, the "evidence" that it rests on."""
    table = torch.stack([scores.reward, *scores.signals.values()], dim=1).tolist()
    found: list[dict[str, Any]] = [
        {"reward": reward, "signals": dict(zip(scores.signals, signals, strict=True))} for reward, *signals in table
    ]
    if cited and scores.reading is not None and scores.reading.copy_attention is not None:
        for figures, sentences in zip(found, cite(scores.reading, policy.tokenizer), strict=True):
            figures["evidence"] = [sentence.to_json() for sentence in sentences]
    return found


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows, `size` at a time; the last are fewer."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _groups(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places of the rows, whole groups at a time, at least `size` rows each but the last."""
    if size < 1:
        raise UserError(f"batch_size is {size}", fix="set it to 1 or above")
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(_key(row), []).append(place)
    batch: list[int] = []
    for group in groups.values():
        batch += group
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _key(row: Row) -> str:
    return prompt_key(row.prompt)
