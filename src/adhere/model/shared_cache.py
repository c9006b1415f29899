"""A prompt's keys and values, held once for all responses of its group.

Expanded they would take as much memory as all prompts again, for every response. A layer hands out `Keys`, which know
their two parts: attention that reads the parts copies nothing, any other copies the prompts of one layer at a time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from adhere.model.joined import Groups, Keys


def shared_cache(cache: Any, index: Tensor, room: int = 0) -> Any:
    """The rows `index` ([m] int64, non-decreasing) of a `DynamicCache`, or of an `EncoderDecoderCache` of two, for one
    forward over whole responses, or, with `room`, for decoding so many tokens."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(shared_cache(own, index), shared_cache(cross, index))
    groups = Groups(index, len(cache.layers[0].keys))
    return SharedCache([GrowingLayer(one, groups, room) if room else SharedLayer(one, groups) for one in cache.layers])


class SharedLayer(DynamicLayer):
    """The prompts of `layer` before the responses of `groups`; new keys and values are not kept."""

    def __init__(self, layer: Any, groups: Groups) -> None:  # not the base's, which sets keys and values
        self.layer, self.groups = layer, groups
        self.is_initialized = layer.is_initialized
        self.dtype, self.device = layer.dtype, layer.device

    # Annotated so, because they are plain attributes in every other layer.
    keys: Any = property(lambda self: self.layer.keys[self.groups.index])
    values: Any = property(lambda self: self.layer.values[self.groups.index])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the prompts with new ones after them."""
        groups = self.groups
        return Keys.of(self.layer.keys, groups, key_states), Keys.of(self.layer.values, groups, value_states)

    def get_seq_length(self) -> int:
        """Tokens of the longest prompt, padding included."""
        return int(self.layer.get_seq_length())


class GrowingLayer(SharedLayer):
    """The same, which keeps up to `room` new keys and values of each response, without a copy of those before."""

    def __init__(self, layer: Any, groups: Groups, room: int) -> None:
        super().__init__(layer, groups)
        self.room, self.length = room, 0
        self.own: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of prompts and responses so far, the new ones at the end."""
        new = (key_states, value_states)
        if not self.own:
            self.own = [part.new_empty(*part.shape[:2], self.room, part.shape[-1]) for part in new]
        end = self.length + key_states.shape[-2]
        for kept, part in zip(self.own, new, strict=True):
            kept[:, :, self.length : end] = part
        self.length = end
        return super().update(self.own[0][:, :, :end], self.own[1][:, :, :end])

    def get_seq_length(self) -> int:
        """Tokens of the longest prompt, padding included, and of the responses so far."""
        return super().get_seq_length() + self.length

    def select(self, groups: Groups, rows: Tensor) -> None:
        """Go on with the responses `rows` ([m] int64, ascending), which are those of `groups`."""
        self.groups, self.own = groups, [kept[rows] for kept in self.own]


class SharedCache(DynamicCache):
    """Layers that hold the prompts of the same groups."""

    def __init__(self, layers: list[SharedLayer]) -> None:
        super().__init__()
        self.layers: Any = layers

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with the responses `indices` ([m] int64, ascending)."""
        before = self.layers[0].groups
        groups = Groups(before.index[indices], before.count)
        for layer in self.layers:
            layer.select(groups, indices)
