"""Attention in two parts, against softmax over all keys, and against autograd through it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adhere.model.joined import Groups, Joined, Keys
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from tests.families import CAUSAL, build, tokenizer

DIM = 8
WHOLE = Keys.__dict__["whole"]


def reference(query, key, value, mask, scaling):
    """Softmax attention [B, H, Q, D] over whole keys, in float64."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = (query.double() @ key.mT * scaling).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1), scores.softmax(-1)


def case(seed, sizes, heads, kv_heads, queries, own, places, padded, window):
    """Random queries, prompts' and responses' keys and values that ask for gradients, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    batch = len(index)

    def made(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = made(batch, heads, queries, DIM)
    shared = [made(len(sizes), kv_heads, places, DIM) for _ in range(2)]
    tail = [made(batch, kv_heads, own, DIM) for _ in range(2)]
    padding = torch.zeros(len(sizes), places, dtype=torch.bool)
    if padded:
        for n in range(len(sizes)):
            padding[n, : n % places] = True
    keys = torch.arange(places + own)
    now = places + own - queries + torch.arange(queries)
    mask = (keys <= now[:, None]) & (keys > now[:, None] - window)
    mask = mask.expand(batch, 1, queries, -1).clone()
    mask[..., :places] &= ~padding[index][:, None, None]
    mask |= keys == now[:, None]  # a query sees itself
    return Groups(index, len(sizes)), query, shared, tail, mask


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    st.sampled_from([(2, 2), (4, 2), (6, 2), (3, 1)]),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([1, 3, 100]),
)
def test_two_parts_are_one_softmax(seed, sizes, heads, queries, earlier, places, padded, window):
    """Outputs, log-sum-exp, probabilities against the prompt and all gradients: any grouping, padding and window."""
    groups, query, shared, tail, mask = case(seed, sizes, *heads, queries, queries + earlier, places, padded, window)
    keys, values = (Keys.of(held, groups, own) for held, own in zip(shared, tail, strict=True))
    wanted, norm, probabilities = reference(query, keys.whole, values.whole, mask, 0.3)
    joined = Joined.of(query, keys, values, mask, 0.3, 0.0)
    assert joined is not None
    found, both = joined.attend(query, keys, values)
    assert torch.allclose(found, wanted) and torch.allclose(both, norm)

    leaves = [query, *shared, *tail]
    back = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(seed))
    expected = torch.autograd.grad(wanted, leaves, back)
    for one, other in zip(torch.autograd.grad(found, leaves, back), expected, strict=True):
        assert torch.allclose(one, other)

    end = 0
    for prompt, size in enumerate(groups.sizes):
        rows, end = slice(end, end + size), end + size
        for part in (slice(0, queries), slice(queries - 1, queries)):
            if size:
                mine = joined.prompt_probabilities(query, keys, both, prompt, rows, part)
                assert torch.allclose(mine.double(), probabilities[rows, :, part, :places], atol=1e-6)


def test_an_additive_mask_is_the_same():
    groups, query, shared, tail, mask = case(3, [2, 1], 4, 2, 2, 2, 5, True, 4)
    keys, values = (Keys.of(held, groups, own) for held, own in zip(shared, tail, strict=True))
    added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    first, second = (Joined.of(query, keys, values, one, 0.3, 0.0).attend(query, keys, values) for one in (mask, added))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_any_other_operation_sees_whole_keys():
    groups, _, shared, tail, _ = case(0, [2, 1], 4, 2, 2, 2, 5, False, 9)
    keys = Keys.of(shared[0], groups, tail[0])
    whole = torch.cat([shared[0][[0, 0, 1]], tail[0]], dim=2)
    assert keys.shape == whole.shape and type(keys + 0) is torch.Tensor
    assert keys.whole is keys.whole  # one copy, however many operations
    assert torch.equal(keys.transpose(1, 2), whole.transpose(1, 2)) and torch.equal(
        torch.cat([keys, keys]), whole.repeat(2, 1, 1, 1)
    )
    keys.sum().backward()
    assert torch.equal(shared[0].grad, torch.tensor([2.0, 1.0]).double().view(2, 1, 1, 1).expand_as(shared[0]))


@pytest.mark.parametrize("change", ["dropout", "dtype", "dtype of new values", "width"])
def test_what_the_kernel_does_not_take_has_no_parts(change):
    groups, query, shared, tail, mask = case(0, [2, 1], 4, 2, 2, 2, 5, False, 9)
    values = [shared[1][..., :4], tail[1][..., :4]] if change == "width" else [shared[1], tail[1]]
    if change == "dtype of new values":
        values[1] = values[1].bfloat16()
    keys, values = Keys.of(shared[0], groups, tail[0]), Keys.of(values[0], groups, values[1])
    asked = query.float() if change == "dtype" else query
    assert Joined.of(asked, keys, values, mask, 0.3, 0.1 if change == "dropout" else 0.0) is None


@pytest.mark.parametrize("family", CAUSAL)
def test_no_family_copies_its_prompts_but_those_with_scores_of_their_own(family, monkeypatch):
    """Gemma 2 caps its scores, gpt-oss adds a sink to them."""
    copied = []
    monkeypatch.setattr(Keys, "whole", property(lambda keys: copied.append(keys) or WHOLE.fget(keys)))
    policy = Policy(build(family), tokenizer())
    prompts = policy.encode_texts(["w1 w2 w3", "w4 w5"])
    drawn = policy.sample(prompts, 3, sampling=Sampling(max_new_tokens=4))
    policy.read(drawn, copy_weights=torch.ones(policy.attention_shape) / 12)
    policy.read_without(drawn, torch.where(torch.arange(prompts.ids.shape[1]) == 1, 0, -1).expand_as(prompts.ids))
    assert bool(copied) == (family in ("gemma2", "gpt_oss"))
