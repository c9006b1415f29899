"""Exact attention to the prompt from one ordinary forward, never holding a T × T map.

`capture` registers an attention function with transformers' attention interface. It returns what the stock SDPA
function returns and, for the wanted query rows only, forms the probabilities against the prompt columns, a few
sequences at a time, and hands them to accumulators. It takes a plain transformers model and knows no `Policy`.

Not covered: families that never call the attention interface (`UnsupportedModel` names the family; `capture_eager`
reads the same tiles from `output_attentions` at the price of full maps), and gradients through the attention
(a reward is a number, so capture runs without autograd).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adhere.errors import UnsupportedModel
from adhere.model.accumulate import Accumulator, Tile, WeightedMap
from adhere.model.families import attention_layers, bypasses, prompt_attention_modules
from adhere.model.joined import Joined, Keys

IMPLEMENTATION = "adhere"
# Scores of this many elements stay near the core on a CPU and keep a GPU busy; larger tiles only cost memory.
TILE_ELEMENTS = 1 << 19


@dataclass
class _Capture:
    """What one `capture` context wants, and how many layers it has seen."""

    modules: frozenset[int]
    rows: slice
    columns: slice
    accumulators: Sequence[Accumulator]
    layers: list[nn.Module] = field(default_factory=list)


_ACTIVE: ContextVar[_Capture | None] = ContextVar("adhere_capture", default=None)


@contextmanager
def capture(model: PreTrainedModel, rows: slice, columns: slice, accumulators: Sequence[Accumulator]) -> Iterator[None]:
    """Within this context each forward of `model` feeds `accumulators` the attention of query `rows` to key `columns`.

    On a decoder-only model the attention is the self-attention and `columns` are the prompt's places among the keys;
    on an encoder–decoder it is the cross-attention, whose keys are the prompt. Wrap exactly one forward: layers are
    numbered in the order they are called.

    Raises `UnsupportedModel` when the forward reached fewer attention layers than the model has.
    """
    if not model._can_set_attn_implementation():
        raise bypasses(model)
    state = _Capture(prompt_attention_modules(model), rows, columns, accumulators)
    token = _ACTIVE.set(state)
    try:
        with attention_implementation(model), torch.no_grad():
            yield
    finally:
        _ACTIVE.reset(token)
    if len(state.layers) != attention_layers(model):
        raise bypasses(model)


def capture_eager(
    outputs: Any, is_encoder_decoder: bool, rows: slice, columns: slice, accumulators: Sequence[Accumulator]
) -> None:
    """Feed `accumulators` from the `output_attentions` of an eager forward: the reference, and the slow way round for
    families that bypass the attention interface. Holds every full map of the forward."""
    maps = outputs.cross_attentions if is_encoder_decoder else outputs.attentions
    for layer, attention in enumerate(maps):
        values = attention[:, :, rows].float()
        for accumulator in accumulators:
            accumulator.add(layer, Tile(values, slice(0, len(values)), slice(0, values.shape[2]), columns))


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str = IMPLEMENTATION) -> Iterator[None]:
    """Run `model` with the attention implementation `name`, then put back what every sub-configuration had."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def reads_parts(model: PreTrainedModel) -> bool:
    """Whether attention can read a prompt that is held once where it is (`adhere.model.joined`): on a CPU, where SDPA's
    place can be taken. Elsewhere `Keys` are copied for each response."""
    settable = model._can_set_attn_implementation() and model.config._attn_implementation in ("sdpa", IMPLEMENTATION)
    return settable and model.device.type == "cpu" and not model.config.is_encoder_decoder


def attention_in_parts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within this context it does."""
    return attention_implementation(model) if reads_parts(model) else nullcontext()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered as `adhere`. query [B, H, Q, D]; key, value [B, H_kv, S, D]; the mask is boolean
    [B, 1, Q, S], additive, or None, as transformers hands it to SDPA."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    state, layer, wanting = _ACTIVE.get(), 0, list[Accumulator]()
    if state is not None and id(module) in state.modules:
        layer = len(state.layers)
        state.layers.append(module)
        wanting = [accumulator for accumulator in state.accumulators if accumulator.wants(layer)]
    if isinstance(key, Keys) and isinstance(value, Keys):
        plain = softcap is None and sinks is None and position_bias is None
        if plain and (joined := Joined.of(query, key, value, attention_mask, scale, dropout)) is not None:
            output, normaliser = joined.attend(query, key, value)
            if state is not None and wanting:
                _feed_joined(wanting, layer, joined, (query, key, normaliser), state.rows, state.columns)
            return output.transpose(1, 2).contiguous(), None
        key, value = key.whole, value.whole
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scores = _Scores(query, key, attention_mask, scale, causal, position_bias, softcap, sinks)
    if state is not None and wanting:
        _feed(wanting, layer, scores, state.rows, state.columns)
    if scores.softcap is None and scores.sinks is None:
        given = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        output, _ = sdpa_attention_forward(*given, position_bias=position_bias, **kwargs)
        return output, None
    return scores.attend(value), None


def _feed(accumulators: Sequence[Accumulator], layer: int, scores: _Scores, rows: slice, columns: slice) -> None:
    batch, heads, queries, _ = scores.query.shape
    first, last, _ = rows.indices(queries)
    row = heads * scores.key.shape[2]
    height = max(1, min(last - first, TILE_ELEMENTS // row))
    depth = max(1, TILE_ELEMENTS // (row * height))
    for start in range(0, batch, depth):
        some = slice(start, min(start + depth, batch))
        for top in range(first, last, height):
            values = scores.probabilities(some, slice(top, min(top + height, last)))
            tile = Tile(values, some, slice(top - first, top - first + values.shape[2]), columns)
            for accumulator in accumulators:
                accumulator.add(layer, tile)


def _feed_joined(
    accumulators: Sequence[Accumulator],
    layer: int,
    joined: Joined,
    given: tuple[Tensor, Keys, Tensor],
    rows: slice,
    columns: slice,
) -> None:
    """The same where prompt and responses have keys of their own; `given` are queries, keys and log-sum-exp."""
    query, key, normaliser = given
    first, last, _ = rows.indices(query.shape[2])
    row = query.shape[1] * key.shared.shape[2]
    height = max(1, min(last - first, TILE_ELEMENTS // row))
    depth = max(1, TILE_ELEMENTS // (row * height))
    end = 0
    for prompt, size in enumerate(joined.groups.sizes):
        begin, end = end, end + size
        for start in range(begin, end, depth):
            some = slice(start, min(start + depth, end))
            for top in range(first, last, height):
                part = slice(top, min(top + height, last))
                values = joined.prompt_probabilities(query, key, normaliser, prompt, some, part)
                tile = Tile(values, some, slice(top - first, part.stop - first), columns)
                for accumulator in accumulators:
                    accumulator.add(layer, tile)


@dataclass(frozen=True)
class _Scores:
    """Everything that decides the attention probabilities of one layer."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    is_causal: bool
    position_bias: Tensor | None
    softcap: float | None
    """Gemma 2: softcap · tanh(score / softcap), before the mask."""
    sinks: Tensor | None
    """gpt-oss: one learned logit a head ([H]) that joins the denominator."""

    def probabilities(self, batch: slice, rows: slice) -> Tensor:
        """softmax over all keys, `[b, H, rows, S]` float32, of the sequences `batch` and the queries `rows`."""
        query, key = self.query[batch, :, rows], self.key[batch]
        size, heads, count, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        # Keys arrive unrepeated (GQA): the queries of one key head stand in line for it.
        grouped = query.reshape(size, kv_heads, heads // kv_heads * count, dim)
        scores = torch.matmul(grouped * self.scaling, key.transpose(2, 3)).view(size, heads, count, keys).float()
        # In place from here on: a pass that allocates costs twice one that does not.
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.position_bias is not None:
            scores.add_(_part(self.position_bias, batch, rows))
        self._mask(scores, batch, rows)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(1, heads, 1, 1).expand(size, heads, count, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

    def _mask(self, scores: Tensor, batch: slice, rows: slice) -> None:
        floor = torch.finfo(scores.dtype).min
        if self.mask is not None:
            mask = _part(self.mask, batch, rows)[..., : scores.shape[-1]]
            _ = scores.masked_fill_(~mask, floor) if mask.dtype == torch.bool else scores.add_(mask)
        elif self.is_causal and self.query.shape[2] > 1:
            places = torch.arange(self.query.shape[2], device=scores.device)[rows]
            # No row can see past itself, and every row sees the keys up to the first row: only the rest needs a mask.
            late = scores[..., rows.start + 1 :]
            keys = torch.arange(rows.start + 1, self.key.shape[2], device=scores.device)
            late.masked_fill_(keys[None, :] > places[:, None], floor)

    def attend(self, value: Tensor) -> Tensor:
        """The attention output `[B, Q, H, D]` for what SDPA cannot express, a few sequences at a time."""
        batch, heads, queries, _ = self.query.shape
        step = max(1, TILE_ELEMENTS // (heads * queries * self.key.shape[2]))
        kv_heads = value.shape[1]
        outputs = []
        for start in range(0, batch, step):
            part = slice(start, start + step)
            weights = self.probabilities(part, slice(0, queries)).to(value.dtype)
            grouped = weights.reshape(len(weights), kv_heads, heads // kv_heads * queries, -1)
            outputs.append(torch.matmul(grouped, value[part]).view(len(weights), heads, queries, -1))
        return torch.cat(outputs).transpose(1, 2).contiguous()


def _part(tensor: Tensor, batch: slice, rows: slice) -> Tensor:
    """The sequences and rows of a [B or 1, H or 1, Q or 1, S] tensor that broadcasts."""
    tensor = tensor if tensor.shape[0] == 1 else tensor[batch]
    return tensor if tensor.shape[2] == 1 else tensor[:, :, rows]


@torch.no_grad()
def verify(model: PreTrainedModel) -> None:
    """Compare capture with eager attention on eight tokens, so that a family nobody has tried cannot give a silently
    wrong reward. Costs two tiny forwards.

    Raises `UnsupportedModel` when the two differ by more than the rounding of the model's dtype.
    """
    device, encoder_decoder = model.device, model.config.is_encoder_decoder
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "use_cache": False}
    if encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    rows, columns = (slice(0, 4) if encoder_decoder else slice(4, 8)), (slice(0, 8) if encoder_decoder else slice(0, 4))
    shape = (1, 4, columns.stop)
    ours, theirs = WeightedMap(shape, device), WeightedMap(shape, device)
    with capture(model, rows, columns, [ours]):
        model(**inputs)
    with attention_implementation(model, "eager"):
        capture_eager(model(**inputs, output_attentions=True), encoder_decoder, rows, columns, [theirs])
    error = float((ours.result() - theirs.result()).abs().max())
    if not error <= 8 * torch.finfo(model.dtype).eps ** 0.75:
        raise UnsupportedModel(
            f"captured attention of the family {model.config.model_type!r} differs from eager attention by {error:.1e}",
            fix="load it with attention='eager' (--attention eager)",
        )


def register(name: str = IMPLEMENTATION, function: Callable[..., Any] = _attention) -> None:
    """Make `adhere` an attention implementation of transformers, with the mask function it needs: without one under the
    same name transformers passes no mask at all."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


register()
