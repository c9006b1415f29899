"""Which responses share a forward: as many as fit the tokens of one, and none whose positions depend on another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.model.rope import depends_on_length, equal_rows, prefixes_keep, regimes
from adhere.types import Chunk, Rollout


def chunks(model: PreTrainedModel, rollout: Rollout, max_tokens: int, together: int | None = None) -> Iterator[Chunk]:
    """`Rollout.chunks`, cut again where a group alone is larger than `max_tokens`, and where RoPE depends on length.

    A response that is larger by itself comes alone. `together`, where it is less: tokens up to which groups share a
    forward. No group is cut for that, as its prompt would be computed again.
    Then each chunk holds rows with one set of frequencies that all keep their prefix, or all do not. Its rows of the
    batch come as a slice, or as indices ([n] int64, ascending).
    """
    for chunk in rollout.chunks(min(max_tokens, together or max_tokens)):
        part, rows, span = chunk.rollout, chunk.rows, chunk.span
        pieces = [own for alike in _alike(model, part) for own in alike.split(_fitting(part, max_tokens))]
        if len(pieces) == 1:
            yield chunk
            continue
        assert isinstance(rows, slice)
        for own in pieces:
            piece = part.compact(own)
            inner = slice(span.start + piece.span.start, span.start + piece.span.stop)
            yield Chunk(piece.rollout, rows.start + own, piece.columns, inner)


def _alike(model: PreTrainedModel, part: Rollout) -> list[Tensor]:
    """The rows ([n] int64 each) whose frequencies are the same."""
    if not depends_on_length(model):
        return [torch.arange(len(part), device=part.ended.device)]
    prompt = part.prompts.mask.sum(-1)[part.prompt_index]
    keeps = prefixes_keep(model, prompt, part.lengths)[:, None]
    return equal_rows(torch.cat([regimes(model, prompt, part.lengths), keeps], dim=1))


def _fitting(part: Rollout, max_tokens: int) -> int:
    """How many rows of `part` fit `max_tokens` with their prompt: all, unless it is one large group."""
    if len(part.prompts) > 1:
        return max(1, len(part))
    return max(1, (max_tokens - part.prompts.ids.shape[1]) // max(1, part.response_ids.shape[1]))
