"""Text in, ids out: prompts (plain or chat) and responses, padded the way the family wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adhere.errors import TooLong, UserError
from adhere.model.rope import extended_context
from adhere.types import Prompts

Prompt = str | Sequence[Mapping[str, str]]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    network: PreTrainedModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
) -> Prompts:
    """Tokenise `prompts`, padded on the left for decoder-only models, on the right for encoder–decoders. `names` says
    where each comes from (`file:line`), for messages.

    Raises `UserError`: no prompts, an empty prompt, one longer than the model's context (`TooLong`), or messages for a
    tokenizer without a chat template.
    """
    if not prompts:
        raise UserError("no prompts", fix="give at least one")
    limit = context_length(network)
    texts: list[str] = []
    rows: list[list[int]] = []
    templates: list[list[int]] = []
    for number, prompt in enumerate(prompts, 1):
        where = (names[number - 1] if names else "") or f"prompt {number}"
        text, tokens, template = _one(tokenizer, prompt, where)
        if not tokens or not text.strip():
            raise UserError("the prompt is empty", where=where, fix="write some text")
        if limit is not None and len(tokens) > limit:
            raise TooLong(
                f"the prompt has {len(tokens)} tokens, the model's context holds {limit}", where=where, fix="shorten it"
            )
        texts.append(text)
        rows.append(tokens)
        templates.append(template)
    left = not network.config.is_encoder_decoder
    pad = int(tokenizer.pad_token_id)
    ids = _padded(rows, pad, left)
    mask = _padded([[1] * len(row) for row in rows], 0, left).bool()
    known = tuple(tuple(a) for a in answers) if answers is not None else ((),) * len(prompts)
    return Prompts(tuple(texts), ids, mask, _padded(templates, 1, left).bool(), known)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, ended: bool = True) -> list[int]:
    """Ids of a given response, with the end-of-sequence token where it `ended` by itself."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return [*ids, int(tokenizer.eos_token_id)] if ended else ids


def padded_responses(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, R] and mask [B, R] bool of responses given as ids."""
    mask = _padded([[1] * len(row) for row in rows], 0, left=False).bool()
    return _padded(rows, int(tokenizer.pad_token_id), left=False), mask


def context_length(network: PreTrainedModel) -> int | None:
    """Tokens that the model's positions can hold; None where they are relative (T5). Dynamic NTK stretches them."""
    config = network.config if network.config.is_encoder_decoder else network.config.get_text_config(decoder=True)
    limit = extended_context(config) or getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def _one(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str) -> tuple[str, list[int], list[int]]:
    """Text, ids and template marks (1 = special or template token) of one prompt."""
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_special_tokens_mask=True)
        return prompt, list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    if tokenizer.chat_template is None:
        raise UserError("messages, but the tokenizer has no chat template", where=where, fix="write a plain `prompt`")
    messages = [dict(message) for message in prompt]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = _content_spans(text, [message["content"] for message in prompt])
    template = [int(not any(a < end and start < b for a, b in spans)) for start, end in encoded["offset_mapping"]]
    return text, list(encoded["input_ids"]), template


def _content_spans(text: str, contents: Sequence[str]) -> list[tuple[int, int]]:
    """Where each message's own words stand in the rendered chat; templates may strip them."""
    spans, place = [], 0
    for content in contents:
        found = text.find(content.strip(), place)
        if found >= 0:
            place = found + len(content.strip())
            spans.append((found, place))
    return spans


def _padded(rows: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    width = max(len(row) for row in rows)
    blank = [[fill] * (width - len(row)) for row in rows]
    padded = [[*b, *row] if left else [*row, *b] for b, row in zip(blank, rows, strict=True)]
    return torch.tensor(padded, dtype=torch.long)  # said, as rows that are all empty hold nothing to tell it by
