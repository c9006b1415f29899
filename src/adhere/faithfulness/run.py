"""The bench at work: rows to questions, responses drawn, every candidate scored by every reward.

What comes out is a record for each question and split: the row as it was read there, with its candidates and their
scores. All figures are computed from the records (`summary`), and `adhere rank` reads them as rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

from adhere.data import PLAIN, Columns, Row, require_all, rows_of, writable
from adhere.faithfulness.candidates import Builder, Case, Question, holding
from adhere.faithfulness.readings import HEADS, read_together, score_together, top_sentences
from adhere.faithfulness.settings import BenchConfig
from adhere.faithfulness.summary import Bench, Record, summarise
from adhere.measure.batch_cache import BatchCache
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.prompt import prompt_key
from adhere.ranking import Group, Response, batched, read_groups
from adhere.reward.heads import CopyHeads
from adhere.reward.reward import Reward
from adhere.text import contains_answer, is_answer


@dataclass(frozen=True)
class _Asked:
    """A row that is benched."""

    number: int
    row: Row
    question: Question


@dataclass(frozen=True)
class _Item:
    """A question in one split, with what is to be scored there."""

    asked: _Asked
    row: Row
    """The row with the passage that is read."""
    case: Case
    responses: Sequence[Response]
    """What is scored: texts, or ids as they were sampled."""
    candidates: Sequence[Mapping[str, Any]]
    """What the record says of each of them."""
    told: Mapping[str, Any]
    """What else it says."""


def bench(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    heads: CopyHeads,
    config: BenchConfig | None = None,
    *,
    columns: Columns = PLAIN,
    limit: int | None = None,
    cache: BatchCache | None = None,
) -> Bench:
    """Measure `rewards` on the first `limit` of `rows`; the others only lend their answers. `policy` draws and reads;
    `heads`, its copy heads, say where responses looked.

    `columns`: how the rows were read, so that they can be read again with other passages. Batches that `cache` holds
    are not done again.

    Raises `UserError`: a row without the text fields `context` and `question` or without answers, a prompt that does
    not hold its context, or one that does not fit the model.
    """
    config, cache = config or BenchConfig(), cache or BatchCache()
    builder = Builder.of(questions_of(rows, columns), config)
    asked = [_Asked(number, row, _question(row)) for number, row in enumerate(rows[:limit])]
    for batch in batched([one.row for one in asked], config.batch_size):
        prompts = policy.encode([row.prompt for row in batch], names=[row.where for row in batch])
        policy.check_room(prompts, config.max_new_tokens, [row.where for row in batch])
    records: list[Record] = []
    spans = [(first, asked[first : first + config.batch_size]) for first in range(0, len(asked), config.batch_size)]
    for first, part in policy.progress(spans, "benching", len(asked), size=lambda span: len(span[1])):
        make = partial(_batch, policy, rewards, heads, builder, part, columns)
        records += cache.get("bench", first, make)["records"]
    return summarise(records, config.seed)


def questions_of(rows: Sequence[Row], columns: Columns = PLAIN) -> list[Question]:
    """What the bench reads of rows. Raises `UserError` with all rows that it cannot use (the first twenty)."""
    require_all(rows, lambda row: _fault(row, columns))
    return [_question(row) for row in rows]


def _fault(row: Row, columns: Columns) -> str | None:
    """Why a row cannot be benched; None where it can."""
    for name in ("context", "question"):
        if not isinstance(row.fields.get(name), str) or not row.fields[name].strip():
            return f'no `{name}`; write {{"context": "…", "question": "…", "answers": ["…"]}}'
    if not row.answers:
        return 'no `answers`; write "answers": ["…"]'
    if prompt_key(_with_context(row, "", columns).prompt) == prompt_key(row.prompt):
        return "the prompt does not change with `context`; put {context} where the passage belongs"
    writable(row)
    return None


def _question(row: Row) -> Question:
    return Question(row.fields["context"], row.fields["question"], row.answers)


def _with_context(row: Row, context: str, columns: Columns) -> Row:
    """The row as it is read with another passage."""
    (changed,) = rows_of([{**row.fields, "context": context}], columns)
    return replace(changed, where=row.where)


def _batch(
    policy: Policy,
    rewards: Mapping[str, Reward],
    heads: CopyHeads,
    builder: Builder,
    part: Sequence[_Asked],
    columns: Columns,
) -> dict[str, list[Any]]:
    """The records of some questions, split by split."""
    cases = [(one, case) for one in part for case in builder.cases(one.question)]
    items = [
        _Item(
            one,
            _with_context(one.row, case.context, columns),
            case,
            [candidate.response for candidate in case.candidates],
            [{"response": c.response, "kind": c.kind, "right": c.right} for c in case.candidates],
            {},
        )
        for one, case in cases
        if case.split in builder.config.splits
    ]
    own = [(one, Case("samples", one.question.context, one.question.answers, ())) for one in part]
    own += [(one, replace(case, split="swapped-samples")) for one, case in cases if case.split == "swapped"]
    own = [(one, case) for one, case in own if case.split in builder.config.splits]
    items += _sampled(policy, part, own, builder.config, columns) if own else []
    return {"records": _records(policy, rewards, heads, items, columns)}


def _sampled(
    policy: Policy,
    part: Sequence[_Asked],
    cases: Sequence[tuple[_Asked, Case]],
    config: BenchConfig,
    columns: Columns,
) -> list[_Item]:
    """The cases with the model's own responses: samples, its likeliest one, and that without the passage."""
    drawn = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    greedy = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    matches = contains_answer if config.match == "contained" else is_answer

    def judged(response: str, case: Case, one: _Asked) -> dict[str, Any]:
        return {
            "response": response,
            "right": matches(response, case.answers),
            "true": matches(response, one.question.answers),
        }

    closed = policy.encode([_with_context(one.row, "", columns).prompt for one in part])
    prior = dict(zip([one.number for one in part], policy.sample(closed, 1, sampling=greedy).responses, strict=True))
    rows = [_with_context(one.row, case.context, columns) for one, case in cases]
    prompts = policy.encode([row.prompt for row in rows], names=[row.where for row in rows])
    likeliest = policy.sample(prompts, 1, sampling=greedy).responses
    seed = random.Random(f"{config.seed}/{part[0].number}").getrandbits(63)
    samples = policy.sample(prompts, config.num_samples, sampling=drawn, seed=seed)
    items = []
    for place, (one, case) in enumerate(cases):
        mine = (samples.prompt_index == place).nonzero().flatten().tolist()
        ids = [samples.response_ids[n][samples.response_mask[n]].tolist() for n in mine]
        ended = samples.ended[mine].tolist()
        said = [
            {"kind": "sample", **judged(samples.responses[n], case, one), "ended": whole}
            for n, whole in zip(mine, ended, strict=True)
        ]
        told = {"greedy": judged(likeliest[place], case, one), "prior": judged(prior[one.number], case, one)}
        items.append(_Item(one, rows[place], case, ids, said, told))
    return items


def _records(
    policy: Policy, rewards: Mapping[str, Reward], heads: CopyHeads, items: list[_Item], columns: Columns
) -> list[Record]:
    """Each item as a record, with the scores of its candidates and whether the sentence that each of them looked at
    most holds the answer."""
    if not items:
        return []
    # Equal prompts become neighbours, the passage as it is first.
    items.sort(key=lambda i: (i.asked.number, i.case.context != i.asked.question.context, i.case.context))
    groups = [
        Group(item.row.prompt, item.responses, [True] * len(item.responses), item.case.answers, item.row.where)
        for item in items
    ]
    reading = read_together(policy, read_groups(policy, groups), rewards, heads)
    classes = next(iter(rewards.values())).classes
    tops = {name: top_sentences(reading, name, classes) for name in HEADS}
    values = {name: found.tolist() for name, found in score_together(policy, rewards, reading).items()}
    records, first = [], 0
    for item in items:
        spans, holds = holding(item.case.context, item.case.answers)
        right = [span for span, good in zip(spans, holds, strict=True) if good]
        # Votes count among samples only: of made candidates, one each, the first would win.
        told = {n: v for n, v in values.items() if item.told or "majority" not in rewards[n].config.weights}
        candidates = []
        for row, candidate in enumerate(item.candidates, first):
            more = {"evidence_hit": {name: found[row] in right for name, found in tops.items()}} if right else {}
            candidates.append({**candidate, "scores": {name: found[row] for name, found in told.items()}, **more})
        first += len(candidates)
        passage = blake2b(item.asked.question.context.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
        about = {
            "question": item.asked.number,
            "passage": passage,
            "split": item.case.split,
            "holding": sum(holds) / len(holds) if holds else 0.0,
            **item.told,
        }
        fields = {**item.row.fields, columns.answers_field or "answers": list(item.case.answers)}
        records.append({**fields, "candidates": candidates, "bench": about})
    return records
