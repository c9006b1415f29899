"""Observing attention: what a forward attends to is fed to accumulators made for it, captured or from an eager forward.

One observer serves teacher-forced reading, eager reading and sampling. `DrawReader` reads a draw from the very forwards
that draw it; `Policy.read` is its reference, and the way for families whose attention comes from an eager batch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.model.accumulate import Accumulator, WeightedMap
from adhere.model.capture import capture, capture_eager
from adhere.model.logits import SPREAD, token_spread
from adhere.model.prefix import Window
from adhere.types import Reading, Rollout

Maps = Mapping[str, Tensor | None]
"""Name of an attention map → the weights of its heads [L, H]; None for all alike."""


class AttentionObserver:
    """Feeds the attention of each forward it wraps to the accumulators that `make(window)` returns for it.

    `eager`: from `output_attentions`, which the forward must be asked for, rather than captured.
    """

    def __init__(
        self, network: PreTrainedModel, make: Callable[[Window], Sequence[Accumulator]], eager: bool = False
    ) -> None:
        self._network, self._make, self._eager = network, make, eager

    @contextmanager
    def around(self, window: Window) -> Iterator[None]:
        """Observe the one forward that runs within this context."""
        accumulators = self._make(window)
        if not accumulators:
            yield
        elif self._eager:
            yield from self._eagerly(window, accumulators)
        else:
            with capture(self._network, window.rows, window.columns, accumulators):
                yield

    def _eagerly(self, window: Window, accumulators: Sequence[Accumulator]) -> Iterator[None]:
        outputs: list[Any] = []
        handle = self._network.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            yield
        finally:
            handle.remove()
        encoder_decoder = bool(self._network.config.is_encoder_decoder)
        capture_eager(outputs[0], encoder_decoder, window.rows, window.columns, accumulators)


class ObservedMaps:
    """Attention maps of a few forwards: call it as the `make` of an `AttentionObserver`."""

    def __init__(self, maps: Maps, device: torch.device) -> None:
        self._maps = {name: None if weights is None else weights.to(device) for name, weights in maps.items()}
        self._device = device
        self.windows: list[tuple[Window, dict[str, WeightedMap]]] = []

    def __call__(self, window: Window) -> list[WeightedMap]:
        shape = (window.batch, window.rows.stop - window.rows.start, window.columns.stop)
        made = {name: WeightedMap(shape, self._device, weights) for name, weights in self._maps.items()}
        self.windows.append((window, made))
        return list(made.values())

    def collected(self, prompt_index: Tensor) -> dict[str, Tensor]:
        """Name → [B, R, P]: the maps side by side. A prompt's own forward stands for all responses to it."""
        found: dict[str, list[Tensor]] = {}
        for window, made in self.windows:
            for name, kept in made.items():
                values = kept.result()[:, window.response.start - window.response.stop :]
                found.setdefault(name, []).append(_for_responses(values, window, prompt_index))
        return {name: torch.cat(pieces, dim=1) for name, pieces in found.items()}

    def of_question(self, prompt_index: Tensor) -> Tensor:
        """[B, P]: the copy heads' attention of the question, the mean over its tokens.

        A decoder that reads no prompt has none of its own: there it is the attention of the first row, which has read
        nothing but the prompt."""
        window, made = self.windows[0]
        values = made["copy_attention"].result()
        if window.question is None:
            return _for_responses(values[:, window.response.start - window.response.stop], window, prompt_index)
        mean = (values * window.question.unsqueeze(-1)).sum(1) / window.question.sum(-1, keepdim=True).clamp(min=1)
        return _for_responses(mean, window, prompt_index)


def _for_responses(values: Tensor, window: Window, prompt_index: Tensor) -> Tensor:
    """`values` of a forward's sequences for each response, where a sequence may be the prompt of a whole group."""
    return values[prompt_index] if window.batch != len(prompt_index) else values


class DrawReader:
    """Reads a draw step by step: `around` wraps each forward, `note` hears which tokens came of it.

    `maps`: the attention maps that are wanted; `spread`: those of `SPREAD` that are.
    """

    def __init__(
        self, network: PreTrainedModel, maps: Maps, temperature: float, spread: Collection[str] = SPREAD
    ) -> None:
        self._maps, self._temperature, self._spread = ObservedMaps(maps, network.device), temperature, spread
        self.around = AttentionObserver(network, self._maps).around
        self._notes: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    def restart(self) -> None:
        """Forget what was noted."""
        self._notes.clear()
        self._maps.windows.clear()

    def note(self, step: int, rows: Tensor, logits: Tensor, prompt_index: Tensor) -> None:
        """The rows of the batch ([n] int64) whose token `step` the last forward predicted, its logits [n, V], and which
        of the prompts in it each answers ([n] int64)."""
        found = {}
        if self._maps.windows:
            _, made = self._maps.windows.pop()
            found = {name: kept.result()[:, -1] for name, kept in made.items()}
            if step == 0:  # the prompts' own forward
                found = {name: value[prompt_index] for name, value in found.items()}
        found |= token_spread(logits, self._temperature, self._spread)
        self._notes.append((step, rows, found))

    def reading(self, rollout: Rollout) -> Reading:
        """What was noted, as the reading of the rollout that came of it."""
        assert rollout.logprobs is not None
        size, width = rollout.response_mask.shape
        whole: dict[str, Tensor] = {}
        for step, rows, found in self._notes:
            for name, values in found.items():
                if name not in whole:
                    whole[name] = values.new_zeros(size, width, *values.shape[1:])
                whole[name][rows, step] = values
        for values in whole.values():
            values.masked_fill_(~rollout.response_mask.view(size, width, *[1] * (values.dim() - 2)), 0.0)
        return Reading(rollout, rollout.logprobs, **whole)
