"""The records that flow through adhere, and the one notation that every docstring uses.

    N  prompts of a batch                 P  prompt length (longest, padded)
    K  samples of one prompt (a group)    R  response length (longest, padded)
    B  responses of a batch, N * K when   L, H  layers and heads whose attention reaches the prompt
       every prompt has K                 V  vocabulary

A mask is `True` where a position counts, everywhere; its name says of what. Responses of one prompt are neighbours:
`prompt_index` never falls. All records are frozen: what changes is made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adhere.prompt import Document as Document
from adhere.prompt import Role as Role


@dataclass(frozen=True)
class Prompts:
    """N encoded prompts: left-padded for decoder-only models, right-padded for encoder–decoders."""

    texts: tuple[str, ...]
    """What the model reads, chat template applied."""
    ids: Tensor
    """[N, P] int64."""
    roles: Tensor
    """[N, P] uint8: the `Role` of each token, PADDING where there is none. A token that belongs to two parts has the
    role of its first character that is no blank."""
    answers: tuple[tuple[str, ...], ...]
    """Accepted answers of each prompt; empty where none are known."""
    chat: tuple[bool, ...] = ()
    """Whether each is a chat in the model's template, so that a response ends as the template ends a turn; () = none
    is."""
    documents: tuple[tuple[Document, ...], ...] = ()
    """The documents of each prompt; () = no prompt has any."""
    sources: Tensor | None = None
    """[N, P, 3] int32: each token's place among the documents of its prompt, and the characters of the document's text
    where it starts and ends; -1 for what is not there (no document; a title; a tokenizer that tells no characters).
    None = no prompt has documents."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def mask(self) -> Tensor:
        """[N, P] bool: True = a token of the prompt, False = padding."""
        return self.roles != Role.PADDING

    @property
    def template(self) -> Tensor:
        """[N, P] bool: True = padding, or a token that the tokenizer, the chat template or a layout wrote."""
        return self.roles <= Role.TEMPLATE

    @property
    def current(self) -> Tensor:
        """[N, P] bool: the words that a response is about: documents, question, instruction, the user's last turn. No
        system text, no earlier turn."""
        return self.roles >= Role.DOCUMENT

    @property
    def guessed(self) -> Tensor:
        """[N] bool: nothing says what is evidence and what is question, so that a rule has to tell them apart."""
        told = (self.roles >= Role.DOCUMENT) & (self.roles < Role.USER)
        return (self.roles == Role.USER).any(-1) & ~told.any(-1)

    def has(self, *roles: Role) -> Tensor:
        """[N, P] bool: the tokens with one of these roles."""
        return torch.isin(self.roles, torch.tensor(roles, dtype=self.roles.dtype, device=self.roles.device))

    def select(self, index: Tensor) -> Prompts:
        """The prompts `index` ([n] int64), in that order."""
        return self._of(index.tolist(), index, slice(None))

    def to(self, device: torch.device) -> Prompts:
        """The same prompts with their tensors on `device`."""
        sources = None if self.sources is None else self.sources.to(device)
        return replace(self, ids=self.ids.to(device), roles=self.roles.to(device), sources=sources)

    def only(self, keep: Tensor, *, left: bool) -> Prompts:
        """The prompts cut down to their tokens `keep` [N, P] bool, padded anew on the left or the right. `texts` stay
        those of the whole prompts."""
        order = (keep if left else ~keep).int().argsort(dim=-1, stable=True)
        mask = keep.gather(1, order)
        used = mask.any(0)
        sources = self.sources
        if sources is not None:
            sources = sources.gather(1, order[..., None].expand_as(sources)).masked_fill(~mask[..., None], -1)[:, used]
        return replace(
            self,
            ids=self.ids.gather(1, order).masked_fill(~mask, 0)[:, used],
            roles=self.roles.gather(1, order).masked_fill(~mask, Role.PADDING)[:, used],
            sources=sources,
        )

    def _of(self, places: Sequence[int], rows: Tensor | slice, columns: slice) -> Prompts:
        """The prompts `places`, which are the rows `rows` of the tensors, with the columns `columns`."""
        return Prompts(
            tuple(self.texts[i] for i in places),
            self.ids[rows, columns],
            self.roles[rows, columns],
            tuple(self.answers[i] for i in places),
            tuple(self.chat[i] for i in places) if self.chat else (),
            tuple(self.documents[i] for i in places) if self.documents else (),
            None if self.sources is None else self.sources[rows, columns],
        )

    def trimmed(self) -> tuple[Prompts, slice]:
        """These prompts without the columns that are padding in all of them, and which columns are left."""
        used = self.mask.any(0).nonzero().squeeze(-1)
        span = slice(int(used[0]), int(used[-1]) + 1)
        sources = None if self.sources is None else self.sources[:, span]
        return replace(self, ids=self.ids[:, span], roles=self.roles[:, span], sources=sources), span


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

    def tokens(self, shared: bool) -> int:
        """Tokens of one forward over it, padding included: each prompt once where it is `shared` by its group."""
        prompts = len(self.prompts) if shared else len(self)
        return prompts * self.prompts.ids.shape[1] + self.response_ids.numel()

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

    def groups(self, first: int, last: int) -> Chunk:
        """The groups of prompts `first … last - 1`."""
        start, stop = torch.searchsorted(
            self.prompt_index, torch.tensor([first, last], device=self.ended.device)
        ).tolist()
        rows = slice(start, stop)
        columns = slice(0, max(1, int(self.lengths[rows].max())) if stop > start else 1)
        prompts, span = self.prompts.select(torch.arange(first, last, device=self.ended.device)).trimmed()
        part = Rollout(
            prompts,
            self.prompt_index[rows] - first,
            self.response_ids[rows, columns],
            self.response_mask[rows, columns],
            self.ended[rows],
            self.responses[rows],
            None if self.logprobs is None else self.logprobs[rows, columns],
            self.temperature,
        )
        return Chunk(part, rows, columns, span)

    def compact(self, rows: Tensor) -> Chunk:
        """The responses `rows` ([n] int64, ascending) with their prompts alone, trimmed of padding."""
        used, index = self.prompt_index[rows].unique(return_inverse=True)
        chosen = replace(self.select(rows), prompts=self.prompts.select(used), prompt_index=index)
        return replace(chosen.groups(0, len(used)), rows=rows)

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Whole groups, as many at a time as keep prompt and response tokens (padding included) within `max_tokens`;
        a larger group comes alone."""
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
class Chunk:
    """Some whole groups of a rollout, trimmed of padding, and where they stand in it."""

    rollout: Rollout
    rows: slice | Tensor
    """Their responses: a slice, or indices [n] int64."""
    columns: slice
    """The response columns that they use."""
    span: slice
    """The prompt columns that they use."""


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
    question_attention: Tensor | None = None
    """[B, P] the copy heads' attention of the question to the prompt, the mean over its tokens; on an encoder–decoder
    that of the row before the first response token. The same for all responses to a prompt; None when not asked for."""

    def select(self, rows: Tensor) -> Reading:
        """The responses `rows` ([n] int64, ascending)."""
        rest = (self.entropy, self.certainty, self.attention, self.copy_attention, self.question_attention)
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
