"""Memory: the same work again with half the tokens at a time where it runs out, and what was freed given back."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from adhere.errors import RunFailed
from adhere.model.families import layers

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
EVERY = 4
"""Layers from one giving back of memory to the next: every time would cost up to a tenth of a forward."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class TokenBudget:
    """How many tokens run at a time, padding included. What once was too much stays so."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def run(self, work: Callable[[int], T], least: int, most: int = sys.maxsize) -> T:
        """`work(tokens)`; where memory does not suffice, from the start with half as many, and half again. Says so, in
        the log. The work takes `most` at once; fewer than `least` make no forward smaller: then it raises `RunFailed`.

        `work` must leave nothing behind when it fails.
        """
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error):
                    raise
                if self.tokens <= least:
                    raise RunFailed(
                        f"out of memory with {least} tokens at a time",
                        fix="use fewer samples of a prompt, shorter prompts or responses, --lora, or another device",
                    ) from error
            # Out of the handler, whose traceback holds the tensors of the forward.
            self.tokens = min(self.tokens, most) // 2
            _LOG.warning("out of memory: from here on at most %d tokens at a time", self.tokens)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def give_back() -> None:
    """Return freed memory to the system. glibc keeps the holes that aligned blocks leave and seldom fills them again,
    so that without this the memory of a forward grows layer by layer to several times what is in use."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def freeing(pieces: Iterable[T]) -> Iterator[T]:
    """`pieces`; after the work on each, freed memory is given back."""
    for piece in pieces:
        yield piece
        give_back()


@contextmanager
def freeing_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the forwards of `model` give freed memory back after every few layers, on a CPU."""
    some = layers(model)[EVERY - 1 :: EVERY] if model.device.type == "cpu" else []
    handles = [layer.register_forward_hook(lambda *_: give_back()) for layer in some]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that there is no memory left: on CUDA, on MPS, or on the CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
