"""Prompts in, ids out: plain or chat, padded the way the family wants them, with the role of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adhere.errors import TooLong, UserError
from adhere.model.compose import Composed, compose
from adhere.model.context import context_length
from adhere.model.settings import CHAT, ChatOptions
from adhere.prompt import Prompt as Prompt
from adhere.prompt import Role
from adhere.types import Prompts

BATCH = 1024
"""Texts of one call of the tokenizer: offsets as Python objects take some 100 bytes a token."""
_BLANK = np.array([chr(code).isspace() for code in range(0x3002)])
"""Whether each character is a blank: there are none after U+3000."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    network: PreTrainedModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
    options: ChatOptions = CHAT,
) -> Prompts:
    """Tokenise `prompts`, padded on the left for decoder-only models, on the right for encoder–decoders. `names` says
    where each comes from (`file:line`), for messages.

    The start tokens that the tokenizer adds are set once, whether or not the text has them written out; a token that it
    adds at the end stays for an encoder alone, as it would close the prompt of a decoder.

    Raises `UserError`: no prompts, an empty prompt, one longer than the model's context (`TooLong`), messages for a
    tokenizer without a chat template, or turns that the template refuses.
    """
    if not prompts:
        raise UserError("no prompts", fix="give at least one")
    where = [name or f"prompt {n}" for n, name in enumerate(names or [""] * len(prompts), 1)]
    composed = compose(tokenizer, prompts, options, where)
    limit = context_length(network)
    left = not network.config.is_encoder_decoder
    start, end = _added(tokenizer, composed[0].text)
    end = [] if left else end
    rows: list[_Row] = []
    for first in range(0, len(composed), BATCH):
        part = composed[first : first + BATCH]
        for place, (one, row) in enumerate(zip(part, _tokenised(tokenizer, part), strict=True), first):
            whole = one.whole or row.ids[: len(start)].tolist() == start
            row = row.within([] if whole else start, [] if row.ids[len(row.ids) - len(end) :].tolist() == end else end)
            if not len(row.ids):
                raise UserError("the prompt is empty", where=where[place], fix="write some text")
            if limit is not None and len(row.ids) > limit:
                what = f"the prompt has {len(row.ids)} tokens, the model's context holds {limit}"
                raise TooLong(what, where=where[place], fix="shorten it")
            rows.append(row)
    documents = tuple(one.documents for one in composed)
    return Prompts(
        tuple(one.text for one in composed),
        padded([row.ids for row in rows], int(tokenizer.pad_token_id), left),
        padded([row.roles for row in rows], Role.PADDING, left),
        tuple(tuple(a) for a in answers) if answers is not None else ((),) * len(prompts),
        tuple(one.chat for one in composed),
        documents if any(documents) else (),
        padded([row.sources for row in rows], -1, left) if any(documents) else None,
    )


@dataclass(frozen=True)
class _Row:
    """The tokens of one prompt: ids [n], roles [n], sources [n, 3]; see `Prompts`."""

    ids: np.ndarray
    roles: np.ndarray
    sources: np.ndarray

    def within(self, before: list[int], after: list[int]) -> _Row:
        """The row between tokens that the tokenizer adds."""
        if not before and not after:
            return self
        room = (len(before), len(after))
        return _Row(
            np.concatenate([before, self.ids, after]).astype(np.int64),
            np.pad(self.roles, room, constant_values=Role.TEMPLATE),
            np.pad(self.sources, (room, (0, 0)), constant_values=-1),
        )


def _tokenised(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Composed]) -> Iterator[_Row]:
    """The tokens of each text, without those that the tokenizer adds by itself."""
    texts = [one.text for one in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    special = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
    for place, one in enumerate(prompts):
        ids = np.asarray(encoded["input_ids"][place], dtype=np.int64)
        if tokenizer.is_fast:
            roles, sources = _by_offsets(one, np.asarray(encoded["offset_mapping"][place], dtype=np.int64))
        else:
            roles, sources = _by_growing(tokenizer, one, ids.tolist())
        roles[np.isin(ids, special)] = Role.TEMPLATE
        yield _Row(ids, roles, sources)


def _by_offsets(prompt: Composed, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roles and sources of tokens that stand at the characters `offsets` [n, 2]. The first character that is no blank
    decides, as tokens reach over the blanks before them."""
    size = len(prompt.text)
    role = np.full(size + 1, Role.TEMPLATE, dtype=np.uint8)
    document, shift, end = (np.full(size + 1, -1, dtype=np.int64) for _ in range(3))
    for stretch in prompt.stretches:
        inside = slice(stretch.start, stretch.end)
        role[inside], document[inside] = stretch.role, stretch.document
        if stretch.offset >= 0:
            shift[inside], end[inside] = stretch.start - stretch.offset, stretch.end
    code = np.frombuffer(prompt.text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    solid = ~_BLANK[np.minimum(code, len(_BLANK) - 1)]
    solid_from = np.minimum.accumulate(np.append(np.where(solid, np.arange(size), size), size)[::-1])[::-1]
    starts, ends = offsets.reshape(-1, 2).T
    first = np.where(solid_from[starts] < ends, solid_from[starts], starts)
    known = end[first] >= 0
    sources = np.full((len(first), 3), -1, dtype=np.int32)
    sources[:, 0] = document[first]
    sources[known, 1] = (first - shift[first])[known]
    sources[known, 2] = (np.minimum(ends, end[first]) - shift[first])[known]
    return role[first], sources


def _by_growing(tokenizer: PreTrainedTokenizerBase, prompt: Composed, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same for a tokenizer that tells no offsets: the tokens before a stretch are those that the text up to it has
    in common with the whole. Characters of documents stay unknown."""
    roles = np.full(len(ids), Role.TEMPLATE, dtype=np.uint8)
    sources = np.full((len(ids), 3), -1, dtype=np.int32)

    def before(place: int) -> int:
        part = tokenizer(prompt.text[:place], add_special_tokens=False)["input_ids"]
        return next((n for n, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))

    for stretch in prompt.stretches:
        inside = slice(before(stretch.start), before(stretch.end))
        roles[inside], sources[inside, 0] = stretch.role, stretch.document
    return roles, sources


def _added(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text, seen on `text`."""
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UserError(
        "the tokenizer reads a text otherwise with special tokens than without", fix="use another tokenizer"
    )


def padded(rows: Sequence[np.ndarray], fill: int, left: bool) -> Tensor:
    """The rows [n, …] as one tensor [N, longest, …]."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for out, row in zip(padded, rows, strict=True):
        out[width - len(row) if left else 0 :][: len(row)] = row
    return torch.from_numpy(padded)
