"""Attention in two parts: to the keys of a prompt, held once for all responses to it, and to a response's own.

With part p over the keys of p alone, o_p its output and l_p the log-sum-exp of its scores,

    l = log Σ_p exp(l_p),    o = Σ_p exp(l_p − l) o_p

(the split of FlashAttention, Dao et al. 2022, arXiv 2205.14135; over shared prefixes Juravsky et al. 2024, arXiv
2402.05099). The backward of each part is that of the stock kernel, given the joint o and l: a probability is
exp(score − l) whichever part its key is in. On a CPU; elsewhere, and for attention that the kernel does not have,
`Keys` are read whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Groups:
    """Which of N prompts each of B responses follows; the responses to a prompt stand beside each other."""

    index: Tensor
    """[B] int64, non-decreasing."""
    count: int
    """N."""

    @cached_property
    def sizes(self) -> list[int]:
        """Responses to each prompt."""
        sizes: list[int] = self.index.bincount(minlength=self.count).tolist()
        return sizes

    @cached_property
    def firsts(self) -> Tensor:
        """The first response to each prompt, [N] int64; any other where there is none."""
        sizes = torch.tensor(self.sizes, device=self.index.device)
        return (sizes.cumsum(0) - sizes).clamp(max=len(self.index) - 1)

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the prompts have different numbers of responses: the response in each of N · K slots, K the largest
        number, another one where a prompt has fewer [N · K] int64; the slots in use [N · K] bool; the slot of each
        response [B] int64."""
        most = max(self.sizes)
        if min(self.sizes) == most:
            return None
        within = torch.arange(most, device=self.index.device)
        used = (within < torch.tensor(self.sizes, device=self.index.device)[:, None]).flatten()
        responses = (self.firsts[:, None] + within).flatten().where(used, 0)
        return responses, used, used.nonzero().flatten()

    def fold(self, values: Tensor, kv_heads: int, blank: bool = False) -> Tensor:
        """[B, H, Q, …] → [N, H_kv, H/H_kv · K · Q, …]: all queries of a prompt's responses in a line. Slots that are
        not in use hold another response's, or 0 where `blank`."""
        heads, queries, *rest = values.shape[1:]
        if self.slots is not None:
            responses, used, _ = self.slots
            values = values[responses]
            if blank:
                values = values * used.view(-1, *[1] * (values.dim() - 1))
        each = len(values) // self.count
        parted = values.view(self.count, each, kv_heads, heads // kv_heads, queries, *rest)
        return parted.permute(0, 2, 3, 1, *range(4, parted.dim())).reshape(self.count, kv_heads, -1, *rest)

    def unfold(self, values: Tensor, heads: int, queries: int) -> Tensor:
        """The way back: [N, H_kv, H/H_kv · K · Q, …] → [B, H, Q, …]."""
        kv_heads, line, *rest = values.shape[1:]
        each = line * kv_heads // (heads * queries)
        parted = values.view(self.count, kv_heads, heads // kv_heads, each, queries, *rest)
        rows = parted.permute(0, 3, 1, 2, *range(4, parted.dim())).reshape(self.count * each, heads, queries, *rest)
        return rows if self.slots is None else rows[self.slots[2]]


class Keys(Tensor):
    """Keys or values [B, H_kv, P + t, D]: those of a prompt, held once for its responses, and the responses' own.

    Whatever operation is done on it is done on them whole, copied for each response. `Joined` alone reads the parts.
    """

    shared: Tensor
    """[N, H_kv, P, D]."""
    groups: Groups
    _whole: Tensor | None

    @classmethod
    def of(cls, shared: Tensor, groups: Groups, own: Tensor) -> Keys:
        """`own` is [B, H_kv, t, D]."""
        made = own.as_subclass(cls)
        made.shared, made.groups, made._whole = shared, groups, None
        return made

    @property
    def own(self) -> Tensor:
        """[B, H_kv, t, D]: those of the responses."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @property
    def whole(self) -> Tensor:
        """[B, H_kv, P + t, D], copied once however many operations are done on it."""
        if self._whole is None:
            self._whole = torch.cat([self.shared[self.groups.index], self.own], dim=2)
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return value.whole if isinstance(value, Keys) else value


@dataclass(frozen=True)
class Joined:
    """How responses attend to their prompts and to themselves, query, keys and values aside."""

    groups: Groups
    scaling: float
    prompt_mask: Tensor | None
    """Added to the scores against the prompt, [N, 1, H/H_kv · K · Q or 1, P]."""
    own_mask: Tensor | None
    """Added to those against the response's own keys, [B, 1, Q, t]; None: causal."""

    @classmethod
    def of(
        cls, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> Joined | None:
        """None where the keys have no parts, or where the kernel does not take them. `mask` is what transformers hands
        to SDPA: [B, 1, Q, P + t] bool or additive, None where all queries see all keys."""
        if not isinstance(keys, Keys) or not isinstance(values, Keys) or query.device.type != "cpu" or dropout:
            return None
        groups, shared, queries = keys.groups, keys.shared, query.shape[2]
        parts = (query, shared, keys.own, values.shared, values.own)  # autocast mixes them
        if (
            len({part.dtype for part in parts}) > 1
            or shared.shape[-1] != values.shared.shape[-1]
            or (mask is None and queries > 1)
        ):
            return None
        if mask is None:
            return cls(groups, scaling, None, None)
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.dtype not in (torch.bool, query.dtype):
            return None
        width, repeats = shared.shape[2], query.shape[1] // shared.shape[1]
        mask = mask.expand(len(query), 1, queries, -1)
        prompt = _prompt_mask(mask[..., :width], groups, repeats, query.dtype)
        return cls(groups, scaling, prompt, _own_mask(mask[..., width:], query.dtype))

    def attend(self, query: Tensor, keys: Keys, values: Keys) -> tuple[Tensor, Tensor]:
        """The output [B, H, Q, D], and the log-sum-exp of all scores [B, H, Q]."""
        given = (query, keys.shared, values.shared, keys.own, values.own)
        found: tuple[Tensor, Tensor] = _Attention.apply(self, *given)  # type: ignore[no-untyped-call]
        return found

    def prompt_probabilities(
        self, query: Tensor, keys: Keys, normaliser: Tensor, prompt: int, rows: slice, queries: slice
    ) -> Tensor:
        """exp(score − l) against the keys of one prompt, [b, H, q, P] float32, for those `rows` of the batch, all of
        which follow it. `normaliser` is the log-sum-exp l."""
        part, key = query[rows, :, queries], keys.shared[prompt]
        size, heads, count, dim = part.shape
        kv_heads = len(key)
        repeats = heads // kv_heads
        line = part.reshape(size, kv_heads, repeats * count, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
        scores = torch.matmul(line * self.scaling, key.mT).float()
        scores = scores.view(kv_heads, size, repeats, count, -1).transpose(0, 1)
        if self.prompt_mask is not None:
            scores += self._mask_of(prompt, rows, queries, query.shape[2])
        scores = scores.reshape(size, heads, count, -1)
        return scores.sub_(normaliser[rows, :, queries, None]).exp_()

    def _mask_of(self, prompt: int, rows: slice, queries: slice, length: int) -> Tensor:
        """`prompt_mask` of those rows and queries, of `length`: [b or 1, 1, 1, q or 1, P]."""
        assert self.prompt_mask is not None
        mask = self.prompt_mask[prompt]
        if mask.shape[1] == 1:
            return mask[None, None]
        each = max(self.groups.sizes)
        first = sum(self.groups.sizes[:prompt])
        own = mask[0, : each * length].view(each, length, -1)  # all heads are alike
        return own[rows.start - first : rows.stop - first, None, None, queries]


def _prompt_mask(mask: Tensor, groups: Groups, repeats: int, dtype: torch.dtype) -> Tensor | None:
    """`Joined.prompt_mask` of the columns [B, 1, Q, P] of a mask; as small as it can be."""
    if mask.dtype == torch.bool and mask.all():
        return None
    alike = mask[:, :, -1:]
    of_prompt = alike[groups.firsts]
    if torch.equal(mask, of_prompt[groups.index].expand_as(mask)):
        return _additive(of_prompt, dtype)
    return _additive(groups.fold(mask.expand(-1, repeats, -1, -1), 1), dtype)


def _own_mask(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`Joined.own_mask` of the columns [B, 1, Q, t] of a mask."""
    queries, width = mask.shape[-2:]
    if mask.dtype == torch.bool and queries in (1, width):  # the kernel counts a causal mask from the first key
        causal = mask.new_ones(queries, width).tril(width - queries)
        if torch.equal(mask, causal.expand_as(mask)):
            return None
    return _additive(mask, dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bool, True where a key is seen, as one that is added. Finite: where all are hidden, the other part of
    the keys takes everything."""
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        return mask.clamp(min=lowest)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


class _Attention(torch.autograd.Function):
    """Both parts and their joint backward."""

    @staticmethod
    def forward(
        ctx: Any, joined: Joined, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups, heads, queries = joined.groups, query.shape[1], query.shape[2]
        mask, scale = joined.prompt_mask, joined.scaling
        line = _FLASH(groups.fold(query, key.shape[1]), key, value, 0.0, False, attn_mask=mask, scale=scale)
        out, norm = (groups.unfold(part, heads, queries) for part in line)
        own, causal = _Own.of(query, key.shape[1]), joined.own_mask is None and queries > 1
        given = (own.queries(query), own.keys(own_key), own.keys(own_value))
        found = _FLASH(*given, 0.0, causal, attn_mask=joined.own_mask, scale=scale)
        own_out, own_norm = (own.back(part) for part in found)
        both = torch.logaddexp(norm, own_norm)
        share = (norm - both).exp_().unsqueeze(-1)  # in float32 where outputs are in half precision
        joint = torch.lerp(own_out.to(share.dtype), out.to(share.dtype), share).to(query.dtype)
        ctx.joined = joined
        ctx.save_for_backward(query, key, value, own_key, own_value, joint, both)
        ctx.mark_non_differentiable(both)
        return joint, both

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, joint, both = ctx.saved_tensors
        joined: Joined = ctx.joined
        groups, heads, queries, kv_heads = joined.groups, query.shape[1], query.shape[2], key.shape[1]
        lines = [groups.fold(part, kv_heads) for part in (query, joint, both)]
        given = (groups.fold(grad, kv_heads, blank=True), lines[0], key, value, *lines[1:], 0.0, False)
        options = {"scale": joined.scaling}
        of_query, *of_prompt = _FLASH_BACKWARD(*given, attn_mask=joined.prompt_mask, **options)
        own, causal = _Own.of(query, kv_heads), joined.own_mask is None and queries > 1
        rows = [own.queries(part) for part in (grad, query, joint, both)]
        given = (rows[0], rows[1], own.keys(own_key), own.keys(own_value), *rows[2:], 0.0, causal)
        own_of_query, *of_own = _FLASH_BACKWARD(*given, attn_mask=joined.own_mask, **options)
        of_query = groups.unfold(of_query, heads, queries) + own.back(own_of_query)
        return None, of_query, *of_prompt, *(own.summed(part) for part in of_own)


@dataclass(frozen=True)
class _Own:
    """A response's queries beside its own keys, of which several heads read the same. A single query needs no causal
    mask, so that those heads are further queries of one; elsewhere the keys are repeated for them."""

    heads: int
    kv_heads: int
    single: bool

    @classmethod
    def of(cls, query: Tensor, kv_heads: int) -> _Own:
        return cls(query.shape[1], kv_heads, query.shape[2] == 1)

    def queries(self, values: Tensor) -> Tensor:
        """[B, H, Q, …], or [B, H_kv, H/H_kv, …]."""
        return values.reshape(len(values), self.kv_heads, -1, *values.shape[3:]) if self.single else values.contiguous()

    def back(self, values: Tensor) -> Tensor:
        """[B, H, Q, …]."""
        return values.reshape(len(values), self.heads, 1, *values.shape[3:]) if self.single else values

    def keys(self, keys: Tensor) -> Tensor:
        """[B, H, t, D], or as they are."""
        return keys if self.single else keys.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def summed(self, grad: Tensor) -> Tensor:
        """The gradient of the keys, [B, H_kv, t, D]."""
        return grad if self.single else grad.unflatten(1, (self.kv_heads, -1)).sum(2)
