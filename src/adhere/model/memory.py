"""When memory runs out: the same work again with half the tokens at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from adhere.errors import RunFailed

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class TokenBudget:
    """How many tokens one forward may take, padding included. What once was too much stays so."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def run(self, work: Callable[[int], T], least: int) -> T:
        """`work(tokens)`; where memory does not suffice, from the start with half as many, and half again. Says so, in
        the log. Fewer than `least` make no forward smaller: then it raises `RunFailed`.

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
                        f"out of memory with {least} tokens in one forward",
                        fix="use fewer samples of a prompt, shorter prompts or responses, --lora, or another device",
                    ) from error
            # Out of the handler, whose traceback holds the tensors of the forward.
            self.tokens //= 2
            _LOG.warning("out of memory: from here on at most %d tokens in one forward", self.tokens)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that there is no memory left: on CUDA, on MPS, or on the CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
