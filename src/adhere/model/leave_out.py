"""Responses read again without one part of their prompt, each part in turn.

A decoder reads the prompt once. What comes after its parts, the question and the responses, is read anew with the keys
of one part masked: S·(|q| + R) tokens a response rather than S·(P + R). It comes near a prompt without the part, and is
not the same: tokens between the part and the question have seen it, and positions keep their gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.model.capture import attention_in_parts
from adhere.model.head import Head
from adhere.model.memory import freeing_layers
from adhere.model.prefix import Predictions, accepted, positions, predictions, prefill, reading
from adhere.model.rope import original_frequencies
from adhere.model.shared_cache import shared_cache
from adhere.types import Rollout


def masked_forwards(
    model: PreTrainedModel, group: Rollout, parts: Tensor, head: Head, max_tokens: int
) -> Iterator[tuple[Tensor, Rollout, Predictions]]:
    """What a decoder-only model predicts for the responses to one prompt with each part of it masked in turn: pairs
    (response, part) [m, 2] int64, the rollout of their responses, and the predictions, `max_tokens` at a time.

    `parts` is [P] int64: the part of each prompt token, -1 = in none; at least one has one. The first token is never
    masked: attention with nothing else to look at goes there.
    """
    prompt, size = group.prompts, group.response_ids.shape[1]
    width = prompt.ids.shape[1]
    cut = min(int((parts >= 0).nonzero().max()) + 1, width - 1)
    before = replace(prompt, ids=prompt.ids[:, :cut], roles=prompt.roles[:, :cut], documents=(), sources=None)
    every = torch.arange(len(group), device=parts.device)
    pairs = torch.cartesian_prod(every, parts[parts >= 0].unique())
    with original_frequencies(model), freeing_layers(model), attention_in_parts(model):
        prefix, _ = prefill(model, before)
        for some in pairs.split(max(1, max_tokens // (width + size))):
            rows, part = some.unbind(-1)
            seen = prompt.mask & (parts != part[:, None])
            seen[:, prompt.mask[0].int().argmax()] = True
            given = group.response_mask[rows, : size - 1]
            places = positions(torch.cat([prompt.mask.expand(len(rows), -1), given], dim=1))
            after = prompt.ids[:, cut:].expand(len(rows), -1)
            with reading(head) as kept:
                out = model(
                    input_ids=torch.cat([after, group.response_ids[rows, : size - 1]], dim=1),
                    attention_mask=torch.cat([seen, given], dim=1).long(),
                    past_key_values=shared_cache(prefix.cache, torch.zeros_like(rows)),
                    use_cache=True,
                    **accepted(model, position_ids=places[:, cut:], logits_to_keep=size),
                )
            yield some, group.select(rows), predictions(head, kept, out.logits, slice(0, size))
