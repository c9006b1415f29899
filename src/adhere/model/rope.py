"""RoPE whose frequencies depend on length: LongRoPE (Phi-3, Phi-4) and dynamic NTK.

transformers picks the frequencies of a whole forward by its largest position. In a mixed batch a short row would be
read with the frequencies of a long one, and a prompt computed once for its group with those of the prompt alone. Here
is which rows may share a forward, and which may share a prefix. The truth is the plain forward of one prompt with one
whole response. Other kinds of RoPE (linear, YaRN, Llama 3, proportional) are fixed when the model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.types import Prompts


@dataclass(frozen=True)
class _Scaling:
    """One RoPE whose frequencies depend on length."""

    original: int
    """The longest sequence, in tokens, that keeps the original frequencies."""
    grows: bool
    """True: beyond it every length has frequencies of its own (dynamic NTK). False: all share one set (LongRoPE)."""

    def regime(self, lengths: Tensor) -> Tensor:
        """A number for each length, equal where the frequencies are. [B] int64 → [B] int64."""
        beyond = lengths.clamp(min=self.original)
        return beyond if self.grows else beyond.clamp(max=self.original + 1)


def depends_on_length(model: PreTrainedModel) -> bool:
    """Whether the RoPE of `model` changes with the longest sequence of a batch."""
    encoder, decoder = _scalings(model)
    return bool(encoder or decoder)


def extended_context(config: Any) -> int | None:
    """Tokens that dynamic NTK stretches the context to; None for every other model."""
    factors = [float(rope["factor"]) for rope in _parameters(config) if "dynamic" in _kind(rope) and rope.get("factor")]
    return int(config.max_position_embeddings * min(factors)) if factors else None


def regimes(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """What decides the frequencies of a row of `prompt` and `response` tokens, two of [B] int64 → [B, ropes] int64.

    Rows with equal regimes may share a forward. In an encoder–decoder each side has its own length, and the decoder's
    first token is not the prompt's.
    """
    encoder, decoder = _scalings(model)
    length = response.clamp(min=1) if model.config.is_encoder_decoder else prompt + response
    found = [scaling.regime(prompt) for scaling in encoder] + [scaling.regime(length) for scaling in decoder]
    return torch.stack(found, dim=1) if found else prompt.new_zeros(len(prompt), 0)


def prefixes_keep(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """[B] bool: whether the prompt's own forward has the frequencies of prompt and response, so that its keys serve."""
    alone = regimes(model, prompt, torch.zeros_like(response))
    return (alone == regimes(model, prompt, response)).all(-1)


def alike(model: PreTrainedModel, lengths: Tensor) -> list[Tensor]:
    """The places ([n] int64 each) of sequences of `lengths` tokens ([B] int64) that may share a forward."""
    return equal_rows(regimes(model, lengths, torch.zeros_like(lengths)))


def equal_rows(keys: Tensor) -> list[Tensor]:
    """The places of equal rows of `keys` [B, k]: for each distinct row [n] int64, ascending."""
    if not keys.shape[1]:
        return [torch.arange(len(keys), device=keys.device)]
    distinct, which = torch.unique(keys, dim=0, return_inverse=True)
    return [(which == number).nonzero().squeeze(-1) for number in range(len(distinct))]


def draws(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int) -> list[Tensor]:
    """The prompts ([n] int64 each) whose responses may be drawn in one batch: all of them, unless RoPE depends on
    length. Then prompts whose responses might change the frequencies go with prompts of their own length only, so
    that the whole batch changes at the same token."""
    if not depends_on_length(model):
        return [torch.arange(len(prompts), device=prompts.ids.device)]
    prompt = prompts.mask.sum(-1)
    most = torch.full_like(prompt, max_new_tokens)
    fixed = prefixes_keep(model, prompt, most)
    keys = [regimes(model, prompt, most) * fixed[:, None], fixed[:, None], (prompt * ~fixed)[:, None]]
    return equal_rows(torch.cat(keys, dim=1))


def fixed_while_drawing(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int) -> bool:
    """Whether the frequencies of a draw are those of a plain forward of each finished row, whatever its length."""
    prompt = prompts.mask.sum(-1)
    return bool(prefixes_keep(model, prompt, torch.full_like(prompt, max_new_tokens)).all())


def drawn_as_read(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int) -> bool:
    """Whether a draw is one batch whose forwards are those of a reading, so that it can be read as it is drawn."""
    return len(draws(model, prompts, max_new_tokens)) == 1 and fixed_while_drawing(model, prompts, max_new_tokens)


def outdated(model: PreTrainedModel, prompts: Prompts, response: int) -> bool:
    """Whether the keys of `prompts` with fewer than `response` new tokens are wrong for `response` of them: LongRoPE
    has just switched to its long factors. Like transformers' `generate`, dynamic NTK keeps the keys it has."""
    begun = 1 if model.config.is_encoder_decoder else prompts.mask.sum(-1)
    length = torch.full_like(prompts.mask.sum(-1), response) + begun
    switching = [scaling for scaling in _scalings(model)[1] if not scaling.grows]
    return any(bool((length == scaling.original + 1).any()) for scaling in switching)


@contextmanager
def original_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Dynamic NTK keeps the frequencies of the longest sequence it has seen: start from the original ones, and leave
    them behind for whoever comes next."""
    growing = any(scaling.grows for side in _scalings(model) for scaling in side)
    if growing:
        _forget(model)
    try:
        yield
    finally:
        if growing:
            _forget(model)


@torch.no_grad()
def _forget(model: PreTrainedModel) -> None:
    """Let every RoPE of dynamic NTK see position 0 alone, which restores its original frequencies."""
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = {"": kinds} if isinstance(kinds, str) else kinds or {}
        for layer_type in (name for name, kind in named.items() if "dynamic" in kind):
            # transformers before 5.13 notes the longest length under another name than it reads it from.
            longest = f"{layer_type}_max_seq_len_cached".removeprefix("_")
            original = getattr(module, "original_max_seq_len", 0)
            setattr(module, longest, original + 1)
            module(first.float(), first, *([layer_type] if layer_type else []))
            setattr(module, longest, original)


def _scalings(model: PreTrainedModel) -> tuple[list[_Scaling], list[_Scaling]]:
    """The RoPEs of encoder and decoder that depend on length; a decoder-only model has no encoder."""
    decoder = _scalings_of(model.config.get_text_config(decoder=True))
    return (_scalings_of(model.get_encoder().config) if model.config.is_encoder_decoder else []), decoder


def _scalings_of(config: Any) -> list[_Scaling]:
    found = set()
    for rope in _parameters(config):
        if _kind(rope) in ("longrope", "su"):
            original = rope.get("original_max_position_embeddings")
            found.add(_Scaling(int(original or config.original_max_position_embeddings), grows=False))
        elif "dynamic" in _kind(rope):
            found.add(_Scaling(int(config.max_position_embeddings), grows=True))
    return sorted(found, key=lambda scaling: (scaling.original, scaling.grows))


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a configuration: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [value for value in parameters.values() if isinstance(value, dict)]
    return each or [parameters]


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
