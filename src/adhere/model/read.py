"""Reading: teacher-forced forwards over a rollout, chunk by chunk, with whatever of their attention is wanted.

Everything that knows how the forwards of one network are run and watched stands here; `Policy` puts prompts and
responses to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.model import capture, prefix
from adhere.model.accumulate import Accumulator, CopyHits, HeadMass, WeightedMap
from adhere.model.chunks import chunks
from adhere.model.constraints import Constraints
from adhere.model.families import shareable
from adhere.model.head import Head
from adhere.model.memory import TokenBudget
from adhere.model.tokens import token_statistics
from adhere.types import Reading, Rollout

# Tokens of one scoring forward, padding included: about 200 MB of activations for a 100M-parameter model.
FORWARD_TOKENS = 16_384

Watchers = Callable[[prefix.Window], list[Accumulator]]


class Reader:
    """Reads with one network. `active` is entered around every forward; `eager`: attention from `output_attentions`."""

    def __init__(
        self, network: PreTrainedModel, eager: bool, active: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.network, self.eager = network, eager
        self.budget = TokenBudget(FORWARD_TOKENS)
        self._active = active
        self._verified = False
        self._head: Head | None = None

    @property
    def shares_prefixes(self) -> bool:
        """Whether the prompt of a group is computed once (else: the plain batch)."""
        return shareable(self.network) and not self.eager

    @property
    def head(self) -> Head:
        """The language-model head by itself."""
        if self._head is None:
            self._head = Head(self.network)
        return self._head

    def verify(self) -> None:
        """See `capture.verify`; once a reader."""
        if not self._verified:
            capture.verify(self.network)
            self._verified = True

    def read(
        self,
        rollout: Rollout,
        constraints: Constraints | None,
        maps: dict[str, Tensor | None],
        spread: Collection[str],
    ) -> Reading:
        """Log-probs under `constraints`, those of `SPREAD` in `spread`, and the maps wanted: `attention` or
        `copy_attention` → weights of the heads, None for all alike."""
        size, width = rollout.response_ids.shape
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("logprobs", *spread), (size, width))
        shapes |= dict.fromkeys(maps, (size, width, rollout.prompts.ids.shape[1]))

        def work(max_tokens: int) -> Reading:
            whole = {name: torch.zeros(shape, device=self.network.device) for name, shape in shapes.items()}
            for part, rows, columns, span in chunks(self.network, rollout, max_tokens):
                padding = ~part.response_mask
                for name, values in self._read(part, constraints, maps, spread).items():
                    if name in maps:
                        whole[name][rows, columns, span] = values.masked_fill(padding[..., None], 0.0)
                    else:
                        whole[name][rows, columns] = values
            return Reading(rollout, **whole)

        return self.budget.run(work, _longest(rollout))

    @torch.no_grad()
    def copy_hits(self, rollout: Rollout, counted: Tensor) -> Tensor:
        """See `Policy.copy_hits`."""

        def work(max_tokens: int) -> Tensor:
            found = []
            for part, rows, columns, _ in chunks(self.network, rollout, max_tokens):
                prompt_ids = part.prompts.ids[part.prompt_index].masked_fill(~part.prompts.mask[part.prompt_index], -1)
                hits = CopyHits(prompt_ids, part.response_ids, counted[rows, columns])
                list(self.forwards(part, share=False, watchers=_always(hits)))
                found.append(hits.result())
            return torch.stack(found).sum(0)

        return self.budget.run(work, _longest(rollout))

    @torch.no_grad()
    def head_mass(self, rollout: Rollout, salience: Tensor) -> Tensor:
        """See `Policy.head_mass`."""

        def work(max_tokens: int) -> Tensor:
            every = torch.arange(len(rollout), device=salience.device)
            order, found = [], []
            for part, rows, _, span in chunks(self.network, rollout, max_tokens):
                mass = HeadMass(salience[rows, span], part.response_mask)
                list(self.forwards(part, share=False, watchers=_always(mass)))
                order.append(every[rows])
                found.append(mass.result())
            return torch.cat(found)[torch.cat(order).argsort()]

        return self.budget.run(work, _longest(rollout))

    def forwards(self, part: Rollout, share: bool, watchers: Watchers | None) -> Iterator[prefix.Predictions]:
        """The forward(s) of a chunk, each watched by the accumulators that `watchers(window)` makes."""
        with self._active():
            if watchers is None:
                yield from prefix.forwards(self.network, part, share, head=self.head)
                return
            if self.eager:
                yield from self._eager_forwards(part, watchers)
                return
            self.verify()

            def around(window: prefix.Window) -> AbstractContextManager[None]:
                return capture.capture(self.network, window.rows, window.columns, watchers(window))

            yield from prefix.forwards(self.network, part, share, around, self.head)

    @torch.no_grad()
    def _read(
        self, part: Rollout, constraints: Constraints | None, maps: dict[str, Tensor | None], spread: Collection[str]
    ) -> dict[str, Tensor]:
        """Statistics [b, r] and maps [b, r, p] of one chunk."""
        windows: list[tuple[prefix.Window, dict[str, WeightedMap]]] = []
        device = self.network.device

        def watchers(window: prefix.Window) -> list[Accumulator]:
            shape = (window.batch, window.rows.stop - window.rows.start, window.columns.stop)
            kept = {name: WeightedMap(shape, device, None if w is None else w.to(device)) for name, w in maps.items()}
            windows.append((window, kept))
            return list(kept.values())

        found: dict[str, list[Tensor]] = {}
        for piece in self.forwards(part, self.shares_prefixes, watchers if maps else None):
            for name, values in token_statistics(piece, part, self.head, constraints, spread).items():
                found.setdefault(name, []).append(values)
        for window, kept in windows:
            expand = window.batch != len(part)
            for name, map_ in kept.items():
                found.setdefault(name, []).append(map_.result()[part.prompt_index] if expand else map_.result())
        return {name: torch.cat(pieces, dim=1) for name, pieces in found.items()}

    def _eager_forwards(self, part: Rollout, watchers: Watchers) -> Iterator[prefix.Predictions]:
        windows: list[prefix.Window] = []
        outputs: list[Any] = []
        head = self.head  # made before anything listens

        def around(window: prefix.Window) -> AbstractContextManager[None]:
            windows.append(window)
            return nullcontext()

        handle = self.network.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            yield from prefix.plain_forwards(self.network, part, around, head, output_attentions=True)
        finally:
            handle.remove()
        window = windows[0]
        encoder_decoder = bool(self.network.config.is_encoder_decoder)
        capture.capture_eager(outputs[0], encoder_decoder, window.rows, window.columns, watchers(window))


def _always(accumulator: Accumulator) -> Watchers:
    return lambda window: [accumulator]


def _longest(rollout: Rollout) -> int:
    """Tokens of one prompt with one response, padding included: no forward takes fewer."""
    return rollout.prompts.ids.shape[1] + rollout.response_ids.shape[1]
