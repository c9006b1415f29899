"""A prompt's keys and values for all responses of its group, copied layer by layer when a forward reads them.

Expanded at once they would take as much memory as all prompts again, for every response. This cache does not grow: it
serves one forward over whole responses, not decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


def shared_cache(cache: Any, index: Tensor) -> Any:
    """The rows `index` ([m] int64, repeats allowed) of a `DynamicCache`, or of an `EncoderDecoderCache` of two."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(shared_cache(own, index), shared_cache(cross, index))
    shared = DynamicCache()
    shared.layers = [SharedLayer(layer, index) for layer in cache.layers]
    return shared


class SharedLayer(DynamicLayer):
    """The rows `index` of `layer`, copied whenever they are read; new keys and values are not kept."""

    def __init__(self, layer: DynamicLayer, index: Tensor) -> None:  # not the base's, which sets keys and values
        self.layer, self.index = layer, index
        self.is_initialized = layer.is_initialized
        self.dtype, self.device = layer.dtype, layer.device

    # Annotated so, because they are plain attributes in every other layer.
    keys: Any = property(lambda self: self.layer.keys[self.index])
    values: Any = property(lambda self: self.layer.values[self.index])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the prompt with new ones after them."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens of the longest prompt, padding included."""
        return int(self.layer.get_seq_length())
