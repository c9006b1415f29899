"""Reading: teacher-forced forwards over a rollout, chunk by chunk, with whatever of their attention is wanted.

Everything that knows how the forwards of one network are run and observed stands here; `Policy` puts prompts and
responses to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.model import capture, precision, prefix
from adhere.model.accumulate import Accumulator, CopyHits, HeadMass, Strongest
from adhere.model.chunks import chunks
from adhere.model.constraints import Constraints
from adhere.model.families import shareable
from adhere.model.head import Head
from adhere.model.leave_out import masked_forwards
from adhere.model.memory import TokenBudget, freeing
from adhere.model.observe import AttentionObserver, Maps, ObservedMaps
from adhere.model.tokens import token_statistics
from adhere.progress import Progress, silent
from adhere.types import Chunk, Reading, Rollout

FORWARD_TOKENS = 16_384
"""Tokens of one forward, padding included; a larger group is cut."""
CPU_FORWARD_TOKENS = 2_048
"""The same on a CPU, which is as busy with them: about 100 MB of activations for a model of 100M parameters."""
CPU_TOKENS_TOGETHER = 1_024
"""Groups share a forward up to here on a CPU, which is slower with more (SmolLM2: 31 to 39 s for
3,400 tokens in one forward, 24 to 29 s a thousand at a time)."""

Make = Callable[[prefix.Window], Sequence[Accumulator]]


class Reader:
    """Reads with one network. `active` is entered around every forward; `eager`: attention from `output_attentions`."""

    def __init__(
        self, network: PreTrainedModel, eager: bool, active: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.network, self.eager = network, eager
        self.budget = TokenBudget(CPU_FORWARD_TOKENS if network.device.type == "cpu" else FORWARD_TOKENS)
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
            with precision.exact(self.network.device):  # the tolerance is that of the weights' dtype
                capture.verify(self.network)
            self._verified = True

    def read(
        self,
        rollout: Rollout,
        constraints: Constraints | None,
        maps: Maps,
        spread: Collection[str],
        progress: Progress,
        question: Tensor | None = None,
    ) -> Reading:
        """Log-probs under `constraints`, those of `SPREAD` in `spread`, the attention maps `maps`, and the attention of
        the prompt tokens `question` [N, P] bool."""
        size, width = rollout.response_ids.shape
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("logprobs", *spread), (size, width))
        shapes |= dict.fromkeys(maps, (size, width, rollout.prompts.ids.shape[1]))
        if question is not None:
            shapes["question_attention"] = size, rollout.prompts.ids.shape[1]

        def work(max_tokens: int) -> Reading:
            whole = {name: torch.zeros(shape, device=self.network.device) for name, shape in shapes.items()}
            for chunk in self._shown(progress, rollout, max_tokens):
                padding = ~chunk.rollout.response_mask
                asked = None if question is None else question[rollout.prompt_index[chunk.rows].unique()][:, chunk.span]
                for name, values in self._read(chunk.rollout, constraints, maps, spread, asked).items():
                    if name == "question_attention":
                        whole[name][chunk.rows, chunk.span] = values
                    elif name in maps:
                        whole[name][chunk.rows, chunk.columns, chunk.span] = values.masked_fill(padding[..., None], 0.0)
                    else:
                        whole[name][chunk.rows, chunk.columns] = values
            return Reading(rollout, **whole)

        return self.budget.run(work, _longest(rollout), rollout.tokens(shared=True))

    @torch.no_grad()
    def read_without(
        self, rollout: Rollout, parts: Tensor, constraints: Constraints | None, progress: Progress
    ) -> Tensor:
        """See `Policy.read_without`."""
        count = int(parts.max()) + 1 if parts.numel() else 0

        def work(max_tokens: int) -> Tensor:
            found = torch.zeros(len(rollout), count, rollout.response_ids.shape[1], device=self.network.device)
            # Prompt by prompt: where one ends, another's parts may go on, and no score depends on its company.
            prompts = progress(range(len(rollout.prompts)), "reading", len(rollout.prompts))
            for number in freeing(prompts):
                group = rollout.groups(number, number + 1)
                own = parts[number, group.span]
                if len(group.rollout) and bool((own >= 0).any()):
                    for pairs, logprobs in self._without(group.rollout, own, constraints, max_tokens):
                        found[group.rows][pairs[:, 0], pairs[:, 1], group.columns] = logprobs
            return found

        return self.budget.run(work, _longest(rollout), rollout.tokens(shared=True))

    def _without(
        self, group: Rollout, parts: Tensor, constraints: Constraints | None, max_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(response, part) [m, 2] int64 and log-probs [m, R] of those responses without that part, for one prompt."""
        if not self._encodes and prefix.reads_prompts_once(self.network, group, self.shares_prefixes):
            with self._active():
                for pairs, own, piece in masked_forwards(self.network, group, parts, self.head, max_tokens):
                    yield pairs, token_statistics(piece, own, self.head, constraints, ())["logprobs"]
            return
        every = torch.arange(len(group), device=parts.device)
        for one in parts[parts >= 0].unique():
            rest = group.prompts.only(group.prompts.mask & (parts != one), left=not self._encodes)
            logprobs = self.read(replace(group, prompts=rest), constraints, {}, (), silent).logprobs
            yield torch.stack([every, one.expand_as(every)], dim=1), logprobs

    @property
    def _encodes(self) -> bool:
        return bool(self.network.config.is_encoder_decoder)

    @torch.no_grad()
    def copy_hits(self, rollout: Rollout, counted: Tensor, copied: Tensor) -> tuple[Tensor, float]:
        """See `Policy.copy_hits`."""

        def work(max_tokens: int) -> tuple[Tensor, float]:
            found: list[Tensor] = []
            logprobs: list[Tensor] = []
            for chunk in freeing(chunks(self.network, rollout, max_tokens)):
                part, here = chunk.rollout, counted[chunk.rows, chunk.columns]
                hits = CopyHits(copied[chunk.rows, chunk.columns, chunk.span], here)
                for piece in self.forwards(part, False, _always(hits)):
                    own = token_statistics(piece, part, self.head, None, ())["logprobs"]
                    logprobs.append(own[here[:, piece.response]])
                found.append(hits.result())
            return torch.stack(found).sum(0), float(torch.cat(logprobs).mean())

        return self.budget.run(work, _longest(rollout), rollout.tokens(shared=True))

    @torch.no_grad()
    def head_mass(self, rollout: Rollout, salience: Tensor, progress: Progress) -> Tensor:
        """See `Policy.head_mass`."""

        def work(max_tokens: int) -> Tensor:
            every = torch.arange(len(rollout), device=salience.device)
            order, found = [], []
            for chunk in self._shown(progress, rollout, max_tokens):
                mass = HeadMass(salience[chunk.rows, chunk.span], chunk.rollout.response_mask)
                list(self.forwards(chunk.rollout, False, _always(mass)))
                order.append(every[chunk.rows])
                found.append(mass.result())
            return torch.cat(found)[torch.cat(order).argsort()]

        return self.budget.run(work, _longest(rollout), rollout.tokens(shared=True))

    @torch.no_grad()
    def strongest(self, rollout: Rollout, counted: Tensor, count: int, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Where each head by itself looked, of a single response: its `count` most-attended `counted` ([1, P] bool)
        prompt positions for every response token, and how much. For the n heads that `heads` [L, H] bool keeps, in its
        order: [n, R, count] int64 and float32, on the CPU."""
        assert len(rollout) == 1, "tiles are put together row by row, which needs a single sequence"

        def work(_max_tokens: int) -> tuple[Tensor, Tensor]:
            kept = Strongest(counted, count, heads)
            list(self.forwards(rollout, False, _always(kept)))
            places, values = kept.result()
            return places[0], values[0]

        return self.budget.run(work, _longest(rollout))

    def _shown(self, progress: Progress, rollout: Rollout, max_tokens: int) -> Iterator[Chunk]:
        """The chunks of a rollout, a response of them counting as one."""
        together = CPU_TOKENS_TOGETHER if self.network.device.type == "cpu" else None
        pieces = freeing(chunks(self.network, rollout, max_tokens, together))
        return progress(pieces, "reading", len(rollout), size=lambda chunk: len(chunk.rollout))

    def forwards(
        self, part: Rollout, share: bool, make: Make | None = None, question: Tensor | None = None
    ) -> Iterator[prefix.Predictions]:
        """The forward(s) of a chunk, each observed by the accumulators that `make(window)` returns; `question` [N, P]
        bool are prompt tokens to observe besides."""
        with self._active():
            head = self.head  # made before anything observes
            if make is None:
                yield from prefix.forwards(self.network, part, share, head=head)
                return
            around = AttentionObserver(self.network, make, self.eager).around
            if self.eager:
                yield from prefix.plain_forwards(self.network, part, around, head, question, output_attentions=True)
                return
            self.verify()
            yield from prefix.forwards(self.network, part, share, around, head, question)

    @torch.no_grad()
    def _read(
        self,
        part: Rollout,
        constraints: Constraints | None,
        maps: Maps,
        spread: Collection[str],
        question: Tensor | None,
    ) -> dict[str, Tensor]:
        """Statistics [b, r], maps [b, r, p] and question attention [b, p] of one chunk."""
        observed = ObservedMaps(maps, self.network.device)
        found: dict[str, list[Tensor]] = {}
        for piece in self.forwards(part, self.shares_prefixes, observed if maps else None, question):
            for name, values in token_statistics(piece, part, self.head, constraints, spread).items():
                found.setdefault(name, []).append(values)
        statistics = {name: torch.cat(pieces, dim=1) for name, pieces in found.items()}
        found_maps = observed.collected(part.prompt_index)
        if question is not None:
            found_maps["question_attention"] = observed.of_question(part.prompt_index)
        return statistics | found_maps


def _always(accumulator: Accumulator) -> Make:
    return lambda window: [accumulator]


def _longest(rollout: Rollout) -> int:
    """Tokens of one prompt with one response, padding included: no forward takes fewer."""
    return rollout.prompts.ids.shape[1] + rollout.response_ids.shape[1]
