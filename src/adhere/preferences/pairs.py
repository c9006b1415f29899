"""Preference pairs without people: a good response of each prompt against a corruption of it.

Chosen is the row's own answer where there is one, or else the likeliest sample of the policy. Rejected is what
`adhere.measure.degenerate` makes of it: what an audit tries on a reward is here what a reward model learns to refuse.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adhere.data import Row
from adhere.errors import UserError
from adhere.measure.cases import cases_of
from adhere.measure.degenerate import FAMILIES, Case, Ids, Vocabulary
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.preferences.settings import PairConfig
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


def make_pairs(
    policy: Policy,
    rows: Sequence[Row],
    config: PairConfig | None = None,
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
    words = Vocabulary.of(policy.tokenizer, classes, set(policy.endings.tokens))
    starts = list(range(0, len(rows), config.batch_size))
    if len(rows) - starts[-1] < 2:
        starts.pop()  # the last prompt alone would have no other prompt beside it
    pairs: list[dict[str, Any]] = []
    spans = zip(starts, [*starts[1:], len(rows)], strict=True)
    for first, last in policy.progress(spans, "making pairs", len(rows), size=lambda span: span[1] - span[0]):
        batch = rows[first:last]
        cases = _cases(policy, batch, config, classes, config.seed + first)
        for place, (row, case) in enumerate(zip(batch, cases, strict=True)):
            rng = random.Random(f"{config.seed}/{first + place}")
            chosen = _text(policy, case.sample)
            count = 0
            for name in rng.sample(CORRUPTIONS, len(CORRUPTIONS)):
                made = FAMILIES[name](case, words, rng)
                rejected = _text(policy, rng.choice(made)) if made else ""
                pair = Row(row.prompt, chosen=chosen, rejected=rejected)
                if rejected and count < config.pairs_per_prompt and pair_fault(pair) is None:
                    pairs.append({"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "corruption": name})
                    count += 1
    return pairs


def _text(policy: Policy, ids: Ids) -> str:
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
    answers = {n: text for n, row in enumerate(rows) if config.chosen != "sample" and (text := _answer(row))}
    if answers:
        names = [rows[n].where for n in answers]
        answered = policy.respond(prompts, list(answers.values()), torch.tensor(list(answers)), names=names)
        logprobs = policy.read(answered, attention=False, spread=()).logprobs
        for row, place in enumerate(answers):
            own = answered.response_mask[row].nonzero().flatten()[:-1]  # without its end
            ids = answered.response_ids[row][own].tolist()
            cases[place] = replace(cases[place], sample=ids, logprobs=logprobs[row][own].tolist())
    return cases
