"""What attention has to beat: signals that read text alone, and the controls every study carries.

A reward that no control here matches has shown something; one that `overlap` matches has not. Confidence, the other
control, is `coherence` in `signals`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from adhere.errors import UserError
from adhere.reward.signals import Evidence
from adhere.text import is_answer, normalise_answer
from adhere.types import Reading, masked_mean


def overlap(evidence: Evidence) -> Tensor:
    """Share of a response's content tokens whose word occurs in its prompt: (1/m_c) Σ_{t content} 1[y_t ∈ x].
    [B] in [0, 1].

    Lexical overlap of words, template and earlier turns left out; 0 where no response token is content.
    """
    return masked_mean(evidence.repeated.any(-1).float(), evidence.content)


def support(evidence: Evidence) -> Tensor:
    """Share of a response's content tokens that the context says and the question does not. [B] in [0, 1].

    (1/m_c) Σ_{t content} 1[y_t ∈ context, y_t ∉ question]: what an answer adds, as far as the evidence has the word.
    A question said again gets 0, and so does what no document says; 0 where no response token is content.
    """
    told = (evidence.repeated & evidence.context.unsqueeze(1)).any(-1) & evidence.added
    return masked_mean(told.float(), evidence.content)


def length(evidence: Evidence) -> Tensor:
    """Number of response tokens, end-of-sequence included. [B] ≥ 0.

    Not divided by the longest of the batch: a response's own figure should not change with its company.
    """
    return evidence.reading.rollout.lengths.float()


def random(evidence: Evidence, seed: int = 0) -> Tensor:
    """A number that means nothing, uniform in [0, 1): [B]. Spurious rewards (arXiv 2506.10947).

    A hash of the prompt's and the response's ids, so that the same text always earns the same and no state is kept.
    The prompt takes part, or else one lucky short answer would be worth learning for every prompt.
    """
    reading = evidence.reading
    rows = [
        _hash(seed, prompt[prompt_mask], response[response_mask]) / 2**64
        for prompt, prompt_mask, response, response_mask in zip(
            reading.prompt_ids, reading.prompt_mask, reading.response_ids, reading.response_mask, strict=True
        )
    ]
    # Rounding to float32 may reach 1.0: half an ulp in 2^25 draws, but the range is a promise.
    return torch.tensor(rows, device=reading.response_ids.device).clamp(max=1.0 - 2**-24)


def shuffled(reading: Reading, seed: int = 0) -> Reading:
    """The same reading with the attention of every row moved to other prompt positions.

    One permutation per prompt, drawn from its ids, over the tokens of its current turn: rows keep their sum
    and their sharpness, and lose where they looked. The permutation is a single cycle, so that no token keeps its own
    attention (with two tokens, a plain draw would change nothing half of the time).
    """
    rollout = reading.rollout
    order = torch.arange(rollout.prompts.ids.shape[1], device=rollout.prompts.ids.device)
    order = order.repeat(len(rollout.prompts), 1)
    for row, (ids, own) in enumerate(zip(rollout.prompts.ids, rollout.prompts.current, strict=True)):
        positions = own.nonzero().squeeze(-1)
        generator = torch.Generator().manual_seed(_hash(seed, ids[own]) % 2**63)
        cycle = positions[torch.randperm(len(positions), generator=generator).to(positions.device)]
        order[row, cycle] = cycle.roll(1)
    index = order[rollout.prompt_index].unsqueeze(1)

    def moved(attention: Tensor | None) -> Tensor | None:
        return None if attention is None else attention.gather(2, index.expand_as(attention))

    asking = reading.question_attention
    # Moved otherwise than the responses' attention: moved alike, the two would still agree.
    away = order[rollout.prompt_index].gather(1, order[rollout.prompt_index])
    return replace(
        reading,
        attention=moved(reading.attention),
        copy_attention=moved(reading.copy_attention),
        question_attention=None if asking is None else asking.gather(1, away),
    )


def majority(evidence: Evidence) -> Tensor:
    """1 where the normalised response is its group's most common one, else 0: [B]. TTRL (arXiv 2504.16084).

    Ties go to the answer given first. An empty response has no vote and earns nothing.
    """
    rollout = evidence.reading.rollout
    answers = [normalise_answer(response) for response in rollout.responses]
    groups = rollout.prompt_index.tolist()
    votes: dict[int, Counter[str]] = {}
    for group, answer in zip(groups, answers, strict=True):
        if answer:
            votes.setdefault(group, Counter())[answer] += 1
    # `most_common` keeps the order of first sight among equals.
    winner = {group: count.most_common(1)[0][0] for group, count in votes.items()}
    hits = [float(winner.get(group) == answer) for group, answer in zip(groups, answers, strict=True)]
    return torch.tensor(hits, device=rollout.prompt_index.device)


def exact(evidence: Evidence) -> Tensor:
    """1 where the normalised response equals one of the prompt's answers, else 0: [B].

    Raises `UserError` where a prompt has no answers: 0 would read as a wrong response.
    """
    rollout = evidence.reading.rollout
    asked = sorted(set(rollout.prompt_index.tolist()))
    missing = [i for i in asked if not rollout.prompts.answers[i]]
    if missing:
        raise UserError(
            f"reward `exact` compares with `answers`, and {len(missing)} of {len(asked)} prompts have none "
            f"(the first: {rollout.prompts.texts[missing[0]][:80]!r})",
            fix='write {"prompt": "…", "answers": ["…"]}, or choose a reward that needs no answers',
        )
    hits = [
        float(is_answer(response, rollout.prompts.answers[group]))
        for group, response in zip(rollout.prompt_index.tolist(), rollout.responses, strict=True)
    ]
    return torch.tensor(hits, device=rollout.prompt_index.device)


def _hash(seed: int, *ids: Tensor) -> int:
    """64 bits that depend on the seed and every id, on every machine alike."""
    text = repr((seed, *(part.tolist() for part in ids)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
