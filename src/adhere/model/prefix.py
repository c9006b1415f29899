"""A group's prompt computed once: prefill the N prompts, let the B responses read their cache, go on from there.

The plain path, which concatenates every prompt with every response, stands beside it as its reference and serves the
families whose cache cannot be expanded. Both yield the same `Predictions`: the *head* (the row that predicts the first
token of a response) and the *tail* (the rows that predict the others). Gradients flow through the cache.

A `DynamicCache` made without a configuration keeps every key, so families with a sliding window share prefixes too:
their window is in the mask. Only recurrent and hybrid state cannot be expanded. Where RoPE depends on length
(`adhere.model.rope`), the prompt's own keys serve only as long as its responses leave the frequencies as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from adhere.model.capture import attention_in_parts
from adhere.model.families import decoder_start
from adhere.model.head import Head
from adhere.model.memory import freeing_layers
from adhere.model.rope import depends_on_length, original_frequencies, prefixes_keep
from adhere.model.shared_cache import shared_cache
from adhere.types import Prompts, Role, Rollout


@dataclass(frozen=True)
class Window:
    """The forward that is about to run, for whoever wants to read its attention."""

    rows: slice
    """Queries that predict response tokens, after those of the question where they are asked for."""
    columns: slice
    """Keys that are the prompt."""
    batch: int
    """Sequences in this forward: B, or N where the prompt of a group stands for all its responses."""
    response: slice
    """Response positions that the last of `rows` predict."""
    question: Tensor | None = None
    """[batch, t] bool: which of the t = `rows` are tokens of the question; None: nobody asked for their attention."""


Around = Callable[[Window], AbstractContextManager[None]]


def _unwatched(window: Window) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Predictions:
    """Predictions for some columns of the responses."""

    response: slice
    logits: Tensor | None
    """[B, t, V]; None where the head is yet to be applied to `hidden`."""
    hidden: Tensor | None
    """[B, t, D], what the language-model head reads; None where no `Head` was given."""

    def select(self, index: Tensor) -> Predictions:
        """The rows `index` ([m] int64), repeats allowed."""
        logits, hidden = (None if part is None else part[index] for part in (self.logits, self.hidden))
        return Predictions(self.response, logits, hidden)


@dataclass
class Prefix:
    """What is left of the prompts after prefill; `extend` changes its cache."""

    cache: Any
    mask: Tensor
    """[n, P] bool."""
    encoded: Any = None
    """Encoder output of an encoder–decoder."""
    extended: int = 0
    """Response tokens already in the cache."""

    def select(self, index: Tensor) -> Prefix:
        """The prefixes `index` ([m] int64), repeats allowed. The cache moves: use the result, not the old prefix."""
        self.cache.batch_select_indices(index)
        encoded = self.encoded
        if encoded is not None:
            encoded = type(encoded)(last_hidden_state=encoded.last_hidden_state[index])
        return Prefix(self.cache, self.mask[index], encoded, self.extended)

    def shared(self, index: Tensor, room: int = 0) -> Prefix:
        """The same before the responses of `index` ([m] int64, non-decreasing), with the prompts held once. For one
        more forward, which leaves this prefix as it is, or with `room` for decoding so many tokens."""
        encoded = self.encoded
        if encoded is not None:
            encoded = type(encoded)(last_hidden_state=encoded.last_hidden_state[index])
        return Prefix(shared_cache(self.cache, index, room), self.mask[index], encoded, self.extended)


def prefill(model: PreTrainedModel, prompts: Prompts, expandable: bool = True) -> tuple[Prefix, Tensor]:
    """Run the prompts once: the prefix, and the logits [n, V] of the first response token. With `expandable=False` the
    cache is of the model's own kind: no selecting from it."""
    config = model.config
    if config.is_encoder_decoder:
        encoded = model.get_encoder()(input_ids=prompts.ids, attention_mask=prompts.mask.long())
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        out = model(
            encoder_outputs=encoded,
            attention_mask=prompts.mask.long(),
            decoder_input_ids=_start(model, len(prompts), prompts.ids.device),
            past_key_values=cache,
            use_cache=True,
        )
        return Prefix(out.past_key_values, prompts.mask, encoded), out.logits[:, -1]
    cache = DynamicCache() if expandable else DynamicCache(config=config)
    out = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        past_key_values=cache,
        use_cache=True,
        **accepted(model, position_ids=positions(prompts.mask), logits_to_keep=1),
    )
    return Prefix(out.past_key_values, prompts.mask), out.logits[:, -1]


def restart(model: PreTrainedModel, prompts: Prompts, ids: Tensor, expandable: bool = True) -> tuple[Prefix, Tensor]:
    """A prefix of `prompts` and the response tokens `ids` [n, t] after them, computed anew in one forward; and the
    logits [n, V] of the next token."""
    if model.config.is_encoder_decoder:
        prefix, _ = prefill(model, prompts, expandable)
        return prefix, extend(model, prefix, ids)[:, -1]
    roles = torch.full_like(ids, Role.USER, dtype=prompts.roles.dtype)
    joined = replace(
        prompts,
        ids=torch.cat([prompts.ids, ids], dim=1),
        roles=torch.cat([prompts.roles, roles], dim=1),
        documents=(),
        sources=None,
    )
    return prefill(model, joined, expandable)


def extend(model: PreTrainedModel, prefix: Prefix, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [n, t, V] after the response tokens `ids` [n, t], which join the cache.

    Right padding (False in `mask`) need not be masked: no counted position comes after it. It only must not count as
    length."""
    count = ids.shape[1]
    if prefix.encoded is not None:
        out = model(
            encoder_outputs=prefix.encoded,
            attention_mask=prefix.mask.long(),
            decoder_input_ids=ids,
            past_key_values=prefix.cache,
            use_cache=True,
        )
    else:
        seen = prefix.mask.new_ones(len(ids), prefix.extended + count)
        within = positions(torch.ones_like(ids) if mask is None else mask)
        places = prefix.mask.sum(-1, keepdim=True) + prefix.extended + within
        out = model(
            input_ids=ids,
            attention_mask=torch.cat([prefix.mask, seen], dim=1).long(),
            past_key_values=prefix.cache,
            use_cache=True,
            **accepted(model, position_ids=places),
        )
    prefix.extended += count
    logits: Tensor = out.logits
    return logits


def forwards(
    model: PreTrainedModel,
    rollout: Rollout,
    share: bool,
    around: Around = _unwatched,
    head: Head | None = None,
    question: Tensor | None = None,
    **extra: Any,
) -> Iterator[Predictions]:
    """Head and tail of a rollout: with each prompt run once where `share` says so and the frequencies of its RoPE
    stay, else by the plain batch. Where RoPE depends on length, `rollout` is one of `adhere.model.chunks.chunks`.

    `question` [N, P] bool: tokens whose attention is to be observed as well, by a decoder that reads the prompt."""
    with freeing_layers(model):
        if reads_prompts_once(model, rollout, share):
            yield from shared_forwards(model, rollout, around, head, question)
        else:
            yield from plain_forwards(model, rollout, around, head, question, **extra)


def reads_prompts_once(model: PreTrainedModel, rollout: Rollout, share: bool) -> bool:
    """Whether the prompts of a chunk are run once: `share` says so, and the frequencies of its RoPE stay."""
    prompt = rollout.prompts.mask.sum(-1)[rollout.prompt_index]
    return share and bool(prefixes_keep(model, prompt, rollout.lengths).all())


def shared_forwards(
    model: PreTrainedModel,
    rollout: Rollout,
    around: Around = _unwatched,
    head: Head | None = None,
    question: Tensor | None = None,
) -> Iterator[Predictions]:
    """Head and tail of a rollout with each prompt run once: P·N + R·B tokens."""
    prompts, size = rollout.prompts, rollout.response_ids.shape[1]
    places = prompts.ids.shape[1]
    columns = slice(0, places)
    last = 0 if model.config.is_encoder_decoder else places - 1
    with original_frequencies(model), reading(head) as kept:
        with around(_window(model, slice(last, last + 1), columns, len(prompts), slice(0, 1), question)):
            prefix, logits = prefill(model, prompts)
        first = predictions(head, kept, logits[:, None], slice(0, 1))
        yield first.select(rollout.prompt_index)
        if size > 1:
            window = Window(slice(0, size - 1), columns, len(rollout), slice(1, size))
            with attention_in_parts(model), around(window):
                responses = prefix.shared(rollout.prompt_index)
                logits = extend(model, responses, rollout.response_ids[:, :-1], rollout.response_mask[:, :-1])
            yield predictions(head, kept, logits, slice(1, size))


def plain_forwards(
    model: PreTrainedModel,
    rollout: Rollout,
    around: Around = _unwatched,
    head: Head | None = None,
    question: Tensor | None = None,
    **extra: Any,
) -> Iterator[Predictions]:
    """The same from one forward over each prompt joined to each response: (P + R)·B tokens. The reference."""
    prompts = rollout.prompts.select(rollout.prompt_index)
    size, places = rollout.response_ids.shape[1], prompts.ids.shape[1]
    encoder_decoder = model.config.is_encoder_decoder
    # Nothing is predicted after the last token, but it counts where the length decides the frequencies.
    given = slice(0, size if depends_on_length(model) and not encoder_decoder else size - 1)
    ids, mask = rollout.response_ids[:, given], rollout.response_mask[:, given]
    first = 0 if encoder_decoder else places - 1
    asked = None if question is None else question[rollout.prompt_index]
    window = _window(model, slice(first, first + size), slice(0, places), len(rollout), slice(0, size), asked)
    with original_frequencies(model), reading(head) as kept, around(window):
        if encoder_decoder:
            out = model(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                decoder_input_ids=torch.cat([_start(model, len(rollout), ids.device), ids], dim=1),
                use_cache=False,
                **extra,
            )
        else:
            mask = torch.cat([prompts.mask, mask], dim=1)
            out = model(
                input_ids=torch.cat([prompts.ids, ids], dim=1),
                attention_mask=mask.long(),
                use_cache=False,
                **accepted(model, position_ids=positions(mask), logits_to_keep=ids.shape[1] + 1),
                **extra,
            )
    yield predictions(head, kept, out.logits, slice(0, size), ids.shape[1] + 1 - size)


def _window(
    model: PreTrainedModel, rows: slice, columns: slice, batch: int, response: slice, question: Tensor | None
) -> Window:
    """The window of `rows`, and of those before them from the first token of a `question` [batch, P] on."""
    if question is None or model.config.is_encoder_decoder or not bool(question.any()):
        return Window(rows, columns, batch, response)
    first = min(rows.start, int(question.any(0).int().argmax()))
    asked = torch.zeros(batch, rows.stop - first, dtype=torch.bool, device=question.device)
    inside = question[:, first : rows.stop]
    asked[:, : inside.shape[1]] = inside
    return Window(slice(first, rows.stop), columns, batch, response, asked)


def predictions(head: Head | None, kept: list[Tensor], logits: Tensor, response: slice, after: int = 0) -> Predictions:
    """What the last forward predicted for `response`: its last rows, but for `after` of them."""
    count = response.stop - response.start

    def rows(values: Tensor) -> Tensor:
        return values[:, values.shape[1] - count - after : values.shape[1] - after]

    whole = head is None or not head.separable
    return Predictions(response, rows(logits) if whole else None, rows(kept[-1]) if kept else None)


def positions(mask: Tensor) -> Tensor:
    """[B, T] int64: 0, 1, 2, … over the counted places of `mask`, whatever the padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def accepted(model: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that the model's forward takes: a few families count positions themselves."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _start(model: PreTrainedModel, count: int, device: torch.device) -> Tensor:
    """[count, 1]: what every decoder sequence begins with."""
    return torch.full((count, 1), decoder_start(model), dtype=torch.long, device=device)


def reading(head: Head | None) -> AbstractContextManager[list[Tensor]]:
    """Within this context, what the head reads is kept in a list; nothing is without a head."""
    return nullcontext([]) if head is None else head.inputs()
