"""The language-model head by itself: logits of any rows of hidden states, a bounded number at a time.

A forward gives `[B, R, V]` logits at once: for 64 responses of 128 tokens and a vocabulary of 262,144 that is 8 GB. So
the forward stops short of them: what its head reads is kept, and the head is applied later, chunk by chunk.

What happens between the head's matrix and the logits (soft caps, scales, biases) is the model's own code, which runs
again with the decoder's output given and the head's input replaced. Families where that does not give the logits of a
plain forward keep them whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adhere.model.families import decoder_start

PROBE_TOKENS = 8
_LOG = logging.getLogger(__name__)


class Head:
    """From what the head of `model` reads to its logits. Tried on eight tokens when it is made; says once, in the log,
    where the family keeps its logits whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._matrix = model.get_output_embeddings()
        self._decoder = model.get_decoder()
        self.vocabulary = 0
        self._inputs: dict[str, Any] = {}
        self._output: Any = None
        self.separable = False  # while it is tried
        self.separable = self._matrix is not None and self._probe()
        if not self.separable:
            _LOG.warning(
                "the logits of the family %r are held whole: its head does not work by itself", model.config.model_type
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of what the head reads, [n, D]; gradients flow to it and to the weights."""
        with instead_of(self._decoder, lambda *_, **__: self._output), _reading(self._matrix, lambda _: hidden[None]):
            logits: Tensor = self._model(**self._inputs).logits
        return logits.squeeze(0)

    @contextmanager
    def inputs(self) -> Iterator[list[Tensor]]:
        """What the head reads in each forward of this context, [B, t, D]. Where the head works by itself only one row
        goes through it, so the forwards' own logits are those of that row."""
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden[:1, -1:] if self.separable else hidden

        if self._matrix is None:
            yield kept
        else:
            with _reading(self._matrix, keep):
                yield kept

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether the head by itself gives the logits of a plain forward."""
        model, device = self._model, self._model.device
        if self._decoder is model:
            return False
        ids = torch.arange(PROBE_TOKENS, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
        self._inputs = {"input_ids": ids, "use_cache": False}
        if model.config.is_encoder_decoder:
            start = torch.full((1, 1), decoder_start(model), device=device)
            encoded = model.get_encoder()(input_ids=ids)
            self._inputs = {
                "encoder_outputs": encoded,
                "decoder_input_ids": torch.cat([start, ids], dim=1),
                "use_cache": False,
            }
        outputs: list[Any] = []
        handle = self._decoder.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            with self.inputs() as read:
                whole = model(**self._inputs).logits
        finally:
            handle.remove()
        if len(read) != 1 or len(outputs) != 1:
            return False
        self._output, self.vocabulary = outputs[0], whole.shape[-1]
        alone = self(read[0][0])
        error = (alone - whole[0]).abs().max() if alone.shape == whole[0].shape else torch.inf
        return bool(error <= 8 * torch.finfo(model.dtype).eps ** 0.75 * whole.abs().max())


@contextmanager
def instead_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context calling `module` calls `forward`."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextmanager
def _reading(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context `module` reads what `change` makes of its input."""
    handle = module.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
