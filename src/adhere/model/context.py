"""How much of a model's context prompts and responses take. What does not fit is refused by name: beyond its positions
a network computes numbers all the same, which mean nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.errors import TooLong, UserError
from adhere.model.rope import extended_context
from adhere.types import Prompts, Rollout


def context_length(network: PreTrainedModel) -> int | None:
    """Tokens that the model's positions can hold; None where they are relative (T5). Dynamic NTK stretches them."""
    config = network.config if network.config.is_encoder_decoder else network.config.get_text_config(decoder=True)
    limit = extended_context(config) or getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def response_room(network: PreTrainedModel, prompts: Prompts) -> Tensor | None:
    """[N] int64: tokens that a response to each prompt may have before the context is full; None = no limit."""
    limit = context_length(network)
    if limit is None:
        return None
    encoder_decoder = network.config.is_encoder_decoder
    return torch.full_like(prompts.ids[:, 0], limit) if encoder_decoder else limit - prompts.mask.sum(-1)


def require_room(network: PreTrainedModel, prompts: Prompts, max_new_tokens: int, names: Sequence[str]) -> None:
    """Raise `UserError` where a prompt and `max_new_tokens` do not fit the context; `names` says where each is."""
    room = response_room(network, prompts)
    if room is not None and (short := (room < max_new_tokens).nonzero().flatten().tolist()):
        raise UserError(
            f"prompt and {max_new_tokens} new tokens do not fit the model's context"
            + (f" ({len(short)} such prompts)" if len(short) > 1 else ""),
            where=names[short[0]] or f"prompt {short[0] + 1}",
            fix=f"shorten the prompt, or set max_new_tokens to {int(room.min())} or less",
        )


def require_fit(network: PreTrainedModel, rollout: Rollout, names: Sequence[str] | None = None) -> None:
    """Raise `TooLong` for the first response that does not fit the context with its prompt; `names[b]` says where
    response b comes from."""
    room = response_room(network, rollout.prompts)
    if room is None:
        return
    if wide := (rollout.lengths > room[rollout.prompt_index]).nonzero().flatten().tolist():
        raise TooLong(
            f"prompt and a response of {int(rollout.lengths[wide[0]])} tokens do not fit the model's context of "
            f"{context_length(network)}" + (f" ({len(wide)} such responses)" if len(wide) > 1 else ""),
            where=(names and names[wide[0]]) or f"response {wide[0] + 1}",
            fix="shorten the response or the prompt",
        )
