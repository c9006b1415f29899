"""The records that flow through adhere, and the one notation that every docstring uses.

    N  prompts of a batch                 P  prompt length (longest, padded)
    K  samples of one prompt (a group)    R  response length (longest, padded)
    B  responses of a batch, N * K when   L, H  layers and heads whose attention reaches the prompt
       every prompt has K                 V  vocabulary

A mask is `True` where a position counts, everywhere; its name says of what. Responses of one prompt are neighbours:
`prompt_index` never falls. All records are frozen: what changes is made anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """N encoded prompts: left-padded for decoder-only models, right-padded for encoder–decoders."""

    texts: tuple[str, ...]
    """What the model reads, chat template applied."""
    ids: Tensor
    """[N, P] int64."""
    mask: Tensor
    """[N, P] bool: True = a token of the prompt, False = padding."""
    template: Tensor
    """[N, P] bool: True = a special or chat-template token, not the user's own words."""
    answers: tuple[tuple[str, ...], ...]
    """Accepted answers of each prompt; empty where none are known."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Tensor) -> Prompts:
        """The prompts `index` ([n] int64), in that order."""
        picked = index.tolist()
        return Prompts(
            tuple(self.texts[i] for i in picked),
            self.ids[index],
            self.mask[index],
            self.template[index],
            tuple(self.answers[i] for i in picked),
        )

    def trimmed(self) -> tuple[Prompts, slice]:
        """These prompts without the columns that are padding in all of them, and which columns are left."""
        used = self.mask.any(0).nonzero().squeeze(-1)
        span = slice(int(used[0]), int(used[-1]) + 1)
        ids, mask, template = self.ids[:, span], self.mask[:, span], self.template[:, span]
        return replace(self, ids=ids, mask=mask, template=template), span


@dataclass(frozen=True)
class Rollout:
    """B responses to N prompts."""

    prompts: Prompts
    prompt_index: Tensor
    """[B] int64, non-decreasing: the prompt each response answers; equal values form a group."""
    response_ids: Tensor
    """[B, R] int64, right-padded; the end-of-sequence token, where there is one, is part of the response."""
    response_mask: Tensor
    """[B, R] bool: True = a token of the response."""
    ended: Tensor
    """[B] bool: True = ended by itself, False = cut off at the length limit."""
    responses: tuple[str, ...]
    """Decoded text, special tokens left out."""
    logprobs: Tensor | None = None
    """[B, R] float32, log-prob of each token under the policy that sampled it (temperature included); 0 on padding.
    None for responses that were given rather than sampled."""
    temperature: float = 1.0
    """Softmax temperature at which log-probs of this rollout are taken."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of each response."""
        return self.response_mask.sum(-1)

    @property
    def largest_group(self) -> int:
        """Tokens of the largest group: its prompt once and its responses, padding included."""
        return self.prompts.ids.shape[1] + int(self.prompt_index.bincount().max()) * self.response_ids.shape[1]

    def select(self, rows: Tensor) -> Rollout:
        """The responses `rows` ([n] int64, ascending), with all prompts and the padding they had."""
        picked = rows.tolist()
        return Rollout(
            self.prompts,
            self.prompt_index[rows],
            self.response_ids[rows],
            self.response_mask[rows],
            self.ended[rows],
            tuple(self.responses[i] for i in picked),
            None if self.logprobs is None else self.logprobs[rows],
            self.temperature,
        )

    def groups(self, first: int, last: int) -> tuple[Rollout, slice, slice, slice]:
        """The groups of prompts `first … last - 1`, trimmed of padding, and where they stand in this rollout: rows of
        the batch, response columns, prompt columns."""
        start, stop = torch.searchsorted(
            self.prompt_index, torch.tensor([first, last], device=self.ended.device)
        ).tolist()
        rows = slice(start, stop)
        width = slice(0, max(1, int(self.lengths[rows].max())) if stop > start else 1)
        prompts, span = self.prompts.select(torch.arange(first, last, device=self.ended.device)).trimmed()
        part = Rollout(
            prompts,
            self.prompt_index[rows] - first,
            self.response_ids[rows, width],
            self.response_mask[rows, width],
            self.ended[rows],
            self.responses[rows],
            None if self.logprobs is None else self.logprobs[rows, width],
            self.temperature,
        )
        return part, rows, width, span

    def compact(self, rows: Tensor) -> tuple[Rollout, slice, slice]:
        """The responses `rows` ([n] int64, ascending) with their prompts alone, trimmed of padding, and the response
        and prompt columns that are left."""
        used, index = self.prompt_index[rows].unique(return_inverse=True)
        chosen = replace(self.select(rows), prompts=self.prompts.select(used), prompt_index=index)
        part, _, width, span = chosen.groups(0, len(used))
        return part, width, span

    def chunks(self, max_tokens: int) -> Iterator[tuple[Rollout, slice, slice, slice]]:
        """Whole groups, as many at a time as keep prompt and response tokens (padding included) within `max_tokens`;
        a group that is larger by itself comes alone. See `groups` for what each item holds."""
        sizes = torch.bincount(self.prompt_index, minlength=len(self.prompts)).tolist()
        prompt, response = self.prompts.ids.shape[1], self.response_ids.shape[1]
        first, tokens = 0, 0
        for last, size in enumerate(sizes):
            cost = prompt + size * response
            if last > first and tokens + cost > max_tokens:
                yield self.groups(first, last)
                first, tokens = last, 0
            tokens += cost
        yield self.groups(first, len(sizes))


@dataclass(frozen=True)
class Reading:
    """One teacher-forced forward over a rollout: everything a signal may read. Floats are float32; 0 on padding."""

    rollout: Rollout
    logprobs: Tensor
    """[B, R] log-prob of each response token."""
    entropy: Tensor | None = None
    """[B, R] entropy of the next-token distribution, nats; None when it was not asked for."""
    certainty: Tensor | None = None
    """[B, R] KL(uniform ‖ p_t), nats (Intuitor); None when it was not asked for."""
    attention: Tensor | None = None
    """[B, R, P] attention of each response token to the prompt, combined over layers and heads with weights that sum
    to 1; None when it was not asked for."""
    copy_attention: Tensor | None = None
    """[B, R, P] the same, combined with the copy-head weights w^copy."""

    def select(self, rows: Tensor) -> Reading:
        """The responses `rows` ([n] int64, ascending)."""
        rest = (self.entropy, self.certainty, self.attention, self.copy_attention)
        return Reading(
            self.rollout.select(rows),
            self.logprobs[rows],
            *(None if values is None else values[rows] for values in rest),
        )

    @property
    def prompt_ids(self) -> Tensor:
        """[B, P] int64."""
        return self.rollout.prompts.ids[self.rollout.prompt_index]

    @property
    def prompt_mask(self) -> Tensor:
        """[B, P] bool."""
        return self.rollout.prompts.mask[self.rollout.prompt_index]

    @property
    def response_ids(self) -> Tensor:
        """[B, R] int64."""
        return self.rollout.response_ids

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool."""
        return self.rollout.response_mask


@dataclass(frozen=True)
class Scores:
    """What a reward says of B responses."""

    reward: Tensor
    """[B] float32."""
    signals: dict[str, Tensor]
    """Each signal before weighting and normalising, [B] float32."""
    reading: Reading | None = None
    """The scorer's reading, so that its log-probs need no second forward; None where no model was read."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the last dimension where `mask` is True; 0 where nothing counts. [..., T] → [...]."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)
