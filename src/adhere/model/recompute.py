"""Gradient checkpointing that keeps a shared prompt: each layer keeps its inputs alone, and runs again on the way back.

transformers' own checkpointing drops the key/value cache, and with it the prompt that was computed once for its group.
Here the layer that runs again finds the cache as it was before the layer first ran. Values and gradients are those of a
plain backward pass, at the price of one more forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from adhere.model.capture import attention_in_parts
from adhere.model.families import layers
from adhere.model.head import instead_of

WIDTHS_PER_LAYER = 48
"""Numbers that a layer keeps of each token for its backward pass, in hidden sizes (measured: 42 to 48 with LoRA)."""
PLAIN_BYTES = 1 << 29
"""Activations that a backward pass may hold without recomputing, on a CPU."""
RECOMPUTED_BYTES = 1 << 27
"""The same where it recomputes. Smaller: a forward of a few hundred tokens keeps a CPU as busy as a longer one."""
SHARE_OF_DEVICE = 8
"""A CUDA device may hold one of so many parts of its memory, either way."""


def tokens_that_fit(model: PreTrainedModel, compute: torch.dtype | None, *, recomputed: bool) -> int:
    """How many tokens' activations a backward pass may hold: of all layers, or, `recomputed`, the inputs of all layers
    and the activations of one. `compute` is what forwards are cast to; None: the dtype of the weights."""
    count = len(layers(model))
    kept = count + WIDTHS_PER_LAYER if recomputed else max(1, count) * WIDTHS_PER_LAYER
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    most = RECOMPUTED_BYTES if recomputed else PLAIN_BYTES
    if model.device.type == "cuda":
        most = max(most, torch.cuda.get_device_properties(model.device).total_memory // SHARE_OF_DEVICE)
    return max(1, most // (kept * width * (compute or model.dtype).itemsize))


@contextmanager
def recomputing(
    model: PreTrainedModel, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Within this context the forwards of `model` keep the inputs of its layers alone. `again` is entered whenever a
    layer runs a second time, which happens in the backward pass, outside this context."""

    @contextmanager
    def as_before() -> Iterator[None]:
        with again(), attention_in_parts(model):
            yield

    with ExitStack() as stack:
        for layer in layers(model):
            stack.enter_context(instead_of(layer, partial(_run, layer.forward, as_before)))
        yield


def _run(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args, **kwargs)`, and the same once more in the backward pass."""
    caches = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Cache | EncoderDecoderCache)}
    before = {key: _copy(cache) for key, cache in caches.items()}
    first = True

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if first:
            first = False
            return forward(*args, **kwargs)
        old = {key: _copy(cache) for key, cache in before.items()}
        args = tuple(old.get(id(value), value) for value in args)
        kwargs = {name: old.get(id(value), value) for name, value in kwargs.items()}
        return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)


def _copy(cache: Any) -> Any:
    """A cache with the same keys and values, which grows on its own: layers replace their tensors and change none."""
    twin = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        twin.self_attention_cache = _copy(cache.self_attention_cache)
        twin.cross_attention_cache = _copy(cache.cross_attention_cache)
        twin.is_updated = dict(cache.is_updated)
    else:
        twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
