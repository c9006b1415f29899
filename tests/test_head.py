"""The language-model head by itself against a plain forward: log-probs, entropy, certainty and gradients, chunk by
chunk, on every family; families where it does not work keep their logits whole and say so."""

from __future__ import annotations

import pytest
import torch

from adhere.learn.learner import Learner
from adhere.model import logits as logits_module
from adhere.model.head import Head
from adhere.model.logits import token_logprobs, token_spread
from adhere.model.policy import Policy
from adhere.model.prefix import plain_forwards
from adhere.model.settings import Lora, Sampling
from tests.families import CAUSAL, SEQ2SEQ, VOCAB, build, save, tokenizer

PROMPTS = [
    "mary is in the garden . where is mary ?",
    "w3 w4 ?",
    "w3 w4 ?",
    "the w7 is in the w9 w10 w11 . where is w7 ?",
]
RESPONSES = ["garden .", "w1 w2 w3 w4 w5", "w6", "in the w9"]
# Scales, soft caps, biases of the head itself, as checkpoints of these families have them.
HEADS = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def of(family):
    """A tiny model of `family` whose head does something between its matrix and the logits, where it can."""
    model = build(family)
    for name, value in HEADS.get(family, {}).items():
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        bias.normal_(0, 2, generator=torch.Generator().manual_seed(1))
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_chunks_of_a_head_are_the_plain_forward(family, monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 3 * VOCAB)
    policy = Policy(of(family), tokenizer())
    assert policy.reader.head.separable
    rollout = policy.paired(PROMPTS, RESPONSES)
    mask = rollout.response_mask
    logits = next(plain_forwards(policy.network, rollout)).logits
    logprobs = token_logprobs(logits, rollout.response_ids)
    reading = policy.read(rollout, attention=False)
    assert ((reading.logprobs - logprobs) * mask).abs().max() <= 1e-5
    for name, values in token_spread(logits.detach()).items():
        assert torch.allclose(getattr(reading, name), values * mask, atol=1e-4)
    weights = torch.linspace(-1, 2, mask.numel()).view_as(mask) * mask
    (logprobs * weights).sum().backward()
    plain = gradients(policy.network)
    (Learner(policy, value_head=False)(rollout).logprobs * weights).sum().backward()
    ours = gradients(policy.network)
    assert ours.keys() == plain.keys()
    apart = sum((ours[name] - plain[name]).square().sum() for name in plain) ** 0.5
    assert apart <= 1e-4 * sum(gradient.square().sum() for gradient in plain.values()) ** 0.5


@pytest.mark.parametrize("family", [*HEADS, "bart", "t5"])
def test_the_head_is_more_than_its_matrix_here(family):
    """Else the test above would say nothing of scales, caps and biases."""
    model = of(family)
    head = Head(model)
    hidden = torch.randn(4, 32)
    matrix = model.get_output_embeddings()(hidden)
    assert (head(hidden) - matrix).abs().max() > 0.1 or family == "t5"
    if family == "t5":  # scaled before its matrix, which reads the scaled states
        assert torch.allclose(head(hidden), matrix, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_no_forward_holds_more_logits_than_a_chunk(family, monkeypatch):
    """Every tensor as wide as the vocabulary that the head makes has at most as many rows as a chunk."""
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 4 * VOCAB)
    policy = Policy(build(family), tokenizer())
    rows = []
    policy.read(PROMPTS, RESPONSES)
    policy.network.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: rows.append(output.numel() // output.shape[-1])
    )
    policy.read(PROMPTS, RESPONSES)
    rollout = policy.paired(PROMPTS, RESPONSES)
    Learner(policy, value_head=False)(rollout).logprobs.sum().backward()
    assert max(rows) <= 4 and sum(rows) >= 2 * int(rollout.response_mask.sum())


def test_draws_and_spreads_of_a_large_vocabulary_come_in_parts(monkeypatch):
    policy = Policy(build("llama"), tokenizer())
    prompts, sampling = policy.encode(PROMPTS), Sampling(temperature=0, top_p=0.9, max_new_tokens=5)
    whole = policy.sample_and_read(prompts, 3, sampling, 0, {})
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 2 * VOCAB)
    parts = policy.sample_and_read(prompts, 3, sampling, 0, {})
    assert torch.equal(whole.response_ids, parts.response_ids)
    for name in ("logprobs", "entropy", "certainty"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-6)


def test_an_adapter_on_the_head_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 3 * VOCAB)
    policy = Policy.load(save("llama", tmp_path), device="cpu", lora=Lora(rank=2, alpha=4))
    reference = policy.reference()
    before = policy.read(PROMPTS, RESPONSES).logprobs
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    after = policy.read(PROMPTS, RESPONSES).logprobs
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.allclose(reference.read(PROMPTS, RESPONSES).logprobs, before, atol=1e-5)
    out = Learner(policy, value_head=True)(policy.paired(PROMPTS, RESPONSES))
    assert torch.allclose(out.logprobs, after, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_family_that_changes_its_logits_elsewhere_keeps_them_whole_and_says_so_once(family, caplog):
    model = build(family)
    # What no tiny family does: logits that depend on more than what the head reads.
    forward = model.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        if not hasattr(model, "first"):
            model.first = True
        else:
            out.logits = out.logits * 2
        return out

    model.forward = shifted
    policy = Policy(model, tokenizer())
    with caplog.at_level("WARNING"):
        reading = policy.read(PROMPTS, RESPONSES, attention=False)
        policy.read(PROMPTS, RESPONSES, attention=False)
    assert not policy.reader.head.separable
    assert [r.message for r in caplog.records] == [
        f"the logits of the family {family!r} are held whole: its head does not work by itself"
    ]
    rollout = policy.paired(PROMPTS, RESPONSES)
    plain = token_logprobs(next(plain_forwards(model, rollout)).logits, rollout.response_ids)
    assert ((reading.logprobs - plain) * rollout.response_mask).abs().max() <= 1e-5
    out = Learner(policy, value_head=True)(rollout)
    assert torch.allclose(out.logprobs, reading.logprobs, atol=1e-5) and out.values is not None
