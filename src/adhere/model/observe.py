"""Reading while drawing: the attention and the token statistics of a draw, taken from the very forwards that draw it.

Where the policy itself is the scorer, this is the reading that needs no forward of its own. `Policy.read` beside it is
the reference, and the way for families whose attention is only had from a plain eager batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from adhere.model.accumulate import WeightedMap
from adhere.model.capture import capture
from adhere.model.logits import SPREAD, token_spread
from adhere.model.prefix import Window
from adhere.types import Reading, Rollout


class AttentionObserver:
    """Takes notes of a draw, step by step: `around` wraps each forward, `note` hears which tokens came of it.

    `wanted`: name of a map → its head weights [L, H], None for all alike; `spread`: those of `SPREAD` that are wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: Mapping[str, Tensor | None],
        temperature: float,
        spread: Collection[str] = SPREAD,
    ) -> None:
        self._model, self._wanted, self._temperature, self._spread = model, wanted, temperature, spread
        self._maps: dict[str, WeightedMap] = {}
        self._notes: list[tuple[Tensor, dict[str, Tensor]]] = []

    @contextmanager
    def around(self, window: Window) -> Iterator[None]:
        """Capture the one row of the forward in this context."""
        shape = (window.batch, 1, window.columns.stop)
        self._maps = {name: WeightedMap(shape, self._model.device, w) for name, w in self._wanted.items()}
        if not self._maps:
            yield
            return
        with capture(self._model, window.rows, window.columns, list(self._maps.values())):
            yield

    def note(self, rows: Tensor, logits: Tensor) -> None:
        """The rows of the batch ([n] int64) that the last forward predicted, and its logits [n, V]."""
        found = {name: kept.result()[:, 0] for name, kept in self._maps.items()}
        # In the prompts' own forward one row may stand for a whole group.
        found = {name: value.repeat_interleave(len(rows) // len(value), 0) for name, value in found.items()}
        found |= token_spread(logits, self._temperature, self._spread)
        self._notes.append((rows, found))

    def read(self, rollout: Rollout) -> Reading:
        """What was noted, as the reading of the rollout that came of it."""
        assert rollout.logprobs is not None
        size, width = rollout.response_mask.shape
        whole: dict[str, Tensor] = {}
        for step, (rows, found) in enumerate(self._notes[:width]):
            for name, values in found.items():
                if name not in whole:
                    whole[name] = values.new_zeros(size, width, *values.shape[1:])
                whole[name][rows, step] = values
        for values in whole.values():
            values.masked_fill_(~rollout.response_mask.view(size, width, *[1] * (values.dim() - 2)), 0.0)
        return Reading(rollout, rollout.logprobs, **whole)
