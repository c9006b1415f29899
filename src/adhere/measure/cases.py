"""What an audit judges: the policy's own samples, and beside them what each degenerate family makes of a prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adhere.data import Row
from adhere.measure.degenerate import FAMILIES, Case, Ids, Vocabulary
from adhere.measure.settings import AuditConfig
from adhere.model.policy import Policy
from adhere.model.responses import encode_responses
from adhere.model.settings import Sampling
from adhere.prompt import Document, documents_of
from adhere.reward.salience import TokenClass, question_only, question_span, user_tokens
from adhere.text import fold, is_answer
from adhere.types import Prompts, Rollout

RIGHT = "right"
"""The slot of the right answer among the extra responses."""
MOST = 8
"""Answers to other questions, and answers of earlier turns, that are tried on a prompt."""


@dataclass(frozen=True)
class AuditBatch:
    """Everything that is judged for a batch of prompts: one rollout, and what each of its rows is."""

    rollout: Rollout
    own: Tensor
    """[B] bool: the policy's own samples."""
    slots: dict[tuple[str, int], Tensor]
    """(family or `RIGHT`, number) → the rows [n] that hold it, at most one a prompt."""

    @classmethod
    def of(
        cls,
        policy: Policy,
        prompts: Prompts,
        config: AuditConfig,
        words: Vocabulary,
        classes: Tensor,
        seed: int,
        near: Sequence[Neighbours],
    ) -> AuditBatch:
        """Sample, make the degenerate responses, and put them side by side."""
        drawn = Sampling(max_new_tokens=config.max_new_tokens)
        samples = policy.sample(prompts, config.num_samples, sampling=drawn, seed=seed)
        cases = cases_of(policy, samples, drawn, classes, seed)
        endings, chats = policy.endings, prompts.chat or (False,) * len(prompts)
        ids: list[Ids] = []
        index: list[int] = []
        ended: list[bool] = []
        keys: list[tuple[str, int]] = []
        for place, case in enumerate(cases):
            mine = [n for n, i in enumerate(samples.prompt_index.tolist()) if i == place]
            said = [samples.response_ids[n][samples.response_mask[n]].tolist() for n in mine]
            ids += said
            ended += samples.ended[mine].tolist()
            keys += [("own", n) for n in range(len(mine))]
            asked, known = (prompts.texts[place], chats[place]), near[place]
            case = replace(
                case,
                distractors=_given(policy, asked, known.distractors),
                examples=_given(policy, asked, known.examples),
            )
            extra = _extra(case, words, random.Random(f"{seed}/{place}"))
            if prompts.answers[place]:
                (extra[RIGHT, 0],) = _given(policy, asked, prompts.answers[place][:1])
            closing = endings.closing_ids(chats[place])
            taken = {fold(samples.responses[n]).strip() for n in mine}
            for key, response in extra.items():
                cut = response[: max(1, config.max_new_tokens - len(closing))]
                text = str(policy.tokenizer.decode(cut, skip_special_tokens=True))
                if key[0] == RIGHT or fold(text).strip() not in taken:
                    ids.append([*cut, *closing])
                    ended.append(True)
                    keys.append(key)
            index += [place] * (len(ids) - len(index))
        width = max(len(row) for row in ids)
        device = prompts.ids.device
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids], device=device)
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rollout = Rollout(
            prompts,
            torch.tensor(index, device=device),
            padded,
            mask,
            torch.tensor(ended, device=device),
            tuple(texts),
        )
        slots: dict[tuple[str, int], list[int]] = {}
        for row, key in enumerate(keys):
            if key[0] != "own" and (key[0] == RIGHT or not _is_right(rollout, row)):
                slots.setdefault(key, []).append(row)
        own = torch.tensor([key[0] == "own" for key in keys], device=device)
        return cls(rollout, own, {key: torch.tensor(found, device=device) for key, found in slots.items()})


@dataclass(frozen=True)
class Neighbours:
    """What a row is beside."""

    distractors: Sequence[str]
    """Answers of the rows with the same documents, its own left out."""
    examples: Sequence[str]
    """What the earlier turns of its chat were answered with."""


def neighbours(rows: Sequence[Row]) -> list[Neighbours]:
    """Of each row, at most `MOST` of either."""
    same: dict[tuple[Document, ...], list[str]] = {}
    for row in rows:
        same.setdefault(documents_of(row.prompt), []).extend(row.answers[:1])
    found = []
    for row in rows:
        known = documents_of(row.prompt)
        others = dict.fromkeys(text for text in same[known] if not is_answer(text, row.answers)) if known else {}
        turns = [] if isinstance(row.prompt, str) else row.prompt
        said = dict.fromkeys(turn["content"] for turn in turns if turn["role"] == "assistant")
        found.append(Neighbours(list(others)[:MOST], list(said)[:MOST]))
    return found


def cases_of(policy: Policy, samples: Rollout, drawn: Sampling, classes: Tensor, seed: int) -> list[Case]:
    """What the degenerate responses to each prompt are made of; the other prompt is the next one. Draws one response to
    each question alone."""
    prompts = samples.prompts
    asked, shortened = question_only(prompts, classes, left=not policy.is_encoder_decoder)
    blind = policy.sample(asked, 1, sampling=drawn, seed=seed)
    user = user_tokens(prompts, classes)
    start, end = question_span(prompts, classes)
    position = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)
    question = user & (position > start) & (position < end)
    special = classes.to(prompts.ids.device) == TokenClass.SPECIAL
    assert samples.logprobs is not None
    likeliest = []
    for place in range(len(prompts)):
        rows = (samples.prompt_index == place).nonzero().flatten()
        row = int(rows[samples.logprobs[rows].sum(-1).argmax()])
        kept = samples.response_mask[row] & ~special[samples.response_ids[row]]
        likeliest.append((samples.response_ids[row][kept].tolist(), samples.logprobs[row][kept].tolist()))
    cases = []
    for place, (sample, logprobs) in enumerate(likeliest):
        own = prompts.ids[place][user[place]].tolist()
        stops = [n for n, i in enumerate(own) if classes[i] == TokenClass.STOP]
        unread = blind.response_ids[place][blind.response_mask[place]]
        cases.append(
            Case(
                own,
                prompts.ids[place][question[place]].tolist(),
                own[: stops[0] + 1] if stops else own,
                sample,
                logprobs,
                likeliest[(place + 1) % len(likeliest)][0],
                unread[~special[unread]].tolist() if bool(shortened[place]) else [],
            )
        )
    return cases


def _given(policy: Policy, asked: tuple[str, bool], texts: Sequence[str]) -> list[Ids]:
    """Given answers to one prompt, without their end."""
    if not texts:
        return []
    whole = [False] * len(texts)
    return encode_responses(policy.endings, [asked] * len(texts), texts, whole, alone=policy.is_encoder_decoder)


def _extra(case: Case, words: Vocabulary, rng: random.Random) -> dict[tuple[str, int], Ids]:
    """The responses of every family."""
    found: dict[tuple[str, int], Ids] = {}
    for name, family in FAMILIES.items():
        found |= {(name, n): ids for n, ids in enumerate(family(case, words, rng))}
    return found


def _is_right(rollout: Rollout, row: int) -> bool:
    """Whether a degenerate response happens to be a right answer: another prompt's may be."""
    accepted = rollout.prompts.answers[int(rollout.prompt_index[row])]
    return is_answer(rollout.responses[row], accepted)
