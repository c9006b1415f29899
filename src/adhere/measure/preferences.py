"""Preference pairs without people: a good response of each prompt against a corruption of it.

Chosen is the row's own answer where there is one, or else the likeliest sample of the policy. Rejected is what
`adhere.measure.degenerate` makes of it: what an audit tries on a reward is here what a reward model learns to refuse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adhere.data import Row
from adhere.errors import UserError, unknown_name
from adhere.measure.audit import cases_of
from adhere.measure.degenerate import FAMILIES, Case, Ids, Vocabulary
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.salience import token_classes
from adhere.row_pairs import pair_fault

CORRUPTIONS = (
    "truncated",
    "padded",
    "n-gram loop",
    "random span copied",
    "keywords stuffed",
    "another prompt's answer",
    "words shuffled",
    "entity swapped",
    "risky token dropped",
    "fluent, ungrounded",
)


@dataclass(frozen=True)
class PairConfig:
    """How preference pairs are made."""

    chosen: str = "auto"
    """The preferred response: answer (the row's first answer or its reference), sample (the likeliest of the policy's
    own that ended), or auto, an answer where there is one."""
    pairs_per_prompt: int = 2
    """Pairs of each prompt, each with another corruption."""
    num_samples: int = 4
    """Samples of which the likeliest is taken."""
    max_new_tokens: int = 64
    """Longest sample in tokens."""
    batch_size: int = 32
    """Prompts at a time."""
    seed: int = 0
    """Seed of samples and corruptions."""

    def __post_init__(self) -> None:
        if self.chosen not in (known := ("auto", "answer", "sample")):
            raise unknown_name("`chosen`", self.chosen, known)
        for name in ("pairs_per_prompt", "num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", fix="set it to 1 or above")


def make_pairs(
    policy: Policy,
    rows: Sequence[Row],
    config: PairConfig | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected", "corruption"}` rows; a prompt without any corruption that differs gives none.

    Raises `UserError`: fewer than two prompts, a row without an answer where `chosen: answer` asks for one, or prompts
    that leave no room for a response.
    """
    config = config or PairConfig()
    if len(rows) < 2:
        raise UserError("pairs need two prompts or more", fix="give more prompts")
    if config.chosen == "answer" and (bare := next((row for row in rows if _answer(row) is None), None)):
        raise UserError("no `answers` and no `reference`", where=bare.where, fix="write one, or use --chosen auto")
    classes = token_classes(policy.tokenizer)
    words = Vocabulary.of(policy.tokenizer, classes, {int(policy.tokenizer.eos_token_id)})
    starts = list(range(0, len(rows), config.batch_size))
    if len(rows) - starts[-1] < 2:
        starts.pop()  # the last prompt alone would have no other prompt beside it
    pairs: list[dict[str, Any]] = []
    for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
        part = rows[first:last]
        cases = _cases(policy, part, config, classes, config.seed + first)
        for place, (row, case) in enumerate(zip(part, cases, strict=True)):
            rng = random.Random(f"{config.seed}/{first + place}")
            chosen = _said(policy, case.sample)
            found = 0
            for name in rng.sample(CORRUPTIONS, len(CORRUPTIONS)):
                made = FAMILIES[name](case, words, rng)
                rejected = _said(policy, rng.choice(made)) if made else ""
                pair = Row(row.prompt, chosen=chosen, rejected=rejected)
                if rejected and found < config.pairs_per_prompt and pair_fault(pair) is None:
                    pairs.append({"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "corruption": name})
                    found += 1
        progress(last)
    return pairs


def _said(policy: Policy, ids: Ids) -> str:
    return str(policy.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _answer(row: Row) -> str | None:
    return row.answers[0] if row.answers else row.reference


def _cases(policy: Policy, rows: Sequence[Row], config: PairConfig, classes: Tensor, seed: int) -> list[Case]:
    """A case a prompt, whose sample is the response to prefer."""
    prompts = policy.encode([row.prompt for row in rows], names=[row.where for row in rows])
    policy.check_room(prompts, config.max_new_tokens, [row.where for row in rows])
    drawn = Sampling(max_new_tokens=config.max_new_tokens)
    cases = cases_of(
        policy, policy.sample(prompts, config.num_samples, sampling=drawn, seed=seed), drawn, classes, seed
    )
    answers = {n: said for n, row in enumerate(rows) if config.chosen != "sample" and (said := _answer(row))}
    if answers:
        given = policy.respond(prompts, list(answers.values()), torch.tensor(list(answers)))
        logprobs = policy.read(given, attention=False).logprobs
        for row, place in enumerate(answers):
            kept = given.response_mask[row].nonzero().flatten()[:-1]  # without its end
            ids, known = given.response_ids[row][kept].tolist(), logprobs[row][kept].tolist()
            cases[place] = replace(cases[place], sample=ids, logprobs=known)
    return cases
