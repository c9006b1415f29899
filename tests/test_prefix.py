"""Prefix sharing against the plain batch: log-probs to 1e-5 and gradients to 1e-4 relative, unequal prompt and response
lengths, groups of unequal size, decoder-only and encoder–decoder, sliding windows; recurrent families fall back."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adhere.model.families import shareable
from adhere.model.head import Head
from adhere.model.logits import token_logprobs
from adhere.model.prefix import plain_forwards, shared_forwards
from adhere.types import Prompts, Role, Rollout
from tests.families import CAUSAL, SEQ2SEQ, VOCAB, build


def rollout(model, width=7):
    torch.manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.bool)
    if model.config.is_encoder_decoder:
        mask[0, -4:] = mask[1, -1:] = False
    else:
        mask[0, :4] = mask[1, :1] = False
    prompts = Prompts(
        ("a", "b", "c"), torch.randint(3, VOCAB, (3, 11)) * mask, mask.to(torch.uint8) * Role.USER, ((),) * 3
    )
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    kept = torch.arange(width)[None] < torch.tensor([4, 7, 7, 2, 1, 6])[:, None]
    ids = torch.randint(3, VOCAB, (6, width)) * kept
    return Rollout(prompts, index, ids, kept, torch.ones(6, dtype=torch.bool), ("",) * 6)


def logprobs_and_gradient(model, parts, batch):
    model.zero_grad()
    pieces = [token_logprobs(p.logits, batch.response_ids[:, p.response]) for p in parts(model, batch)]
    logprobs = torch.cat(pieces, dim=1) * batch.response_mask
    # Unequal weights, so that no error can cancel over the batch.
    (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_shared_prefixes_equal_the_plain_batch(family):
    model = build(family)
    assert shareable(model)
    batch = rollout(model)
    plain, plain_gradient = logprobs_and_gradient(model, plain_forwards, batch)
    shared, shared_gradient = logprobs_and_gradient(model, shared_forwards, batch)
    assert (plain - shared).abs().max() <= 1e-5
    assert (plain_gradient - shared_gradient).norm() <= 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_responses_of_one_token_need_the_prompt_only(family):
    model = build(family)
    batch = rollout(model, width=1)
    parts = list(shared_forwards(model, batch))
    assert [part.response for part in parts] == [slice(0, 1)]
    plain = next(plain_forwards(model, batch))
    assert torch.allclose(parts[0].logits, plain.logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "t5"])
def test_what_the_head_read_comes_along(family):
    """The hidden states that a value head reads are those of the rows that predict the response."""
    model = build(family)
    batch = rollout(model)
    plain = next(plain_forwards(model, batch, head=Head(model))).hidden
    shared = torch.cat([part.hidden for part in shared_forwards(model, batch, head=Head(model))], dim=1)
    assert plain.shape == (6, 7, 32)
    assert torch.allclose(plain[batch.response_mask], shared[batch.response_mask], atol=1e-5)


def test_the_prompt_is_computed_once():
    model = build("llama")
    batch = rollout(model)
    seen = []
    model.model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(shared_forwards(model, batch))
    list(plain_forwards(model, batch))
    assert seen == [(3, 11), (6, 6), (6, 17)]


def test_recurrent_and_hybrid_families_are_not_shareable():
    mamba = AutoConfig.for_model("mamba", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    hybrid = AutoConfig.for_model(
        "lfm2", vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    for config in (mamba, hybrid):
        assert not shareable(AutoModelForCausalLM.from_config(config))
