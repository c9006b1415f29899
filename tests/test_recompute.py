"""Layers that run again in the backward pass give the gradients of a plain one: shared prompts and not, LoRA with
dropout, the value head, DPO's pairs; and large rollouts are learned from that way by themselves."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from adhere.learn.learner import Learner
from adhere.model import adapters, recompute
from adhere.model.families import layers
from adhere.model.policy import Policy
from adhere.model.prefix import plain_forwards, shared_forwards
from adhere.model.recompute import recomputing, tokens_that_fit
from adhere.model.settings import Lora
from tests.families import CAUSAL, SEQ2SEQ, build, tokenizer
from tests.test_prefix import logprobs_and_gradient, rollout

PROMPTS = ["mary is in the garden . where is mary ?"] * 3 + ["w3 w4 ?"] * 2 + ["the w7 is in the w9 w10 w11 ."]
RESPONSES = ["garden .", "w1 w2 w3 w4 w5", "w6", "in the w9", "w2 w2", "w1"]


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("forwards", [shared_forwards, plain_forwards])
def test_recomputed_layers_give_the_gradients_of_the_plain_batch(family, forwards):
    model = build(family)
    batch = rollout(model)
    assert layers(model), "nothing would be recomputed"
    plain, plain_gradient = logprobs_and_gradient(model, plain_forwards, batch)

    def again(model, batch):
        with recomputing(model):
            return list(forwards(model, batch))

    found, gradient = logprobs_and_gradient(model, again, batch)
    assert (plain - found).abs().max() <= 1e-5
    assert (plain_gradient - gradient).norm() <= 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_layer_keeps_its_activations(family):
    model = build(family)
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    sizes = []
    for context in (nullcontext(), recomputing(model)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
            loss = sum(piece.logits.sum() for piece in shared_forwards(model, rollout(model)))
        sizes.append(sum(kept))
        loss.backward()
    assert sizes[1] < sizes[0] / 2
    assert vars(layers(model)[0]).get("forward") is None, "the layer's own forward is back"


def learner_and_gradient(policy, given, plain_tokens, value_head=False):
    torch.manual_seed(3)
    learner = Learner(policy, value_head)
    learner.plain_tokens = plain_tokens
    learner.zero_grad()
    out = learner(given)
    weights = torch.linspace(-1, 2, out.logprobs.numel()).view_as(out.logprobs)
    loss = (out.logprobs * weights).sum()
    if out.values is not None:
        loss = loss + (out.values - 1).square().sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in learner.trained().items() if p.grad is not None}
    return out.logprobs.detach(), found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bart", "t5", "phi3 longrope", "llama dynamic"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_get_the_same_gradients_with_dropout_too(family, dropout):
    """The second run drops what the first one dropped."""
    policy = Policy(adapters.add(build(family), Lora(rank=4, dropout=dropout)), tokenizer())
    with torch.no_grad():  # LoRA's second factor starts at zero, and so would the gradient of the first
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    given = policy.paired(PROMPTS, RESPONSES)
    plain, expected = learner_and_gradient(policy, given, plain_tokens=10**6)
    found, gradients = learner_and_gradient(policy, given, plain_tokens=0)
    assert torch.allclose(plain, found, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_full_fine_tuning_with_a_value_head_gets_the_same_gradients(family):
    policy = Policy(build(family), tokenizer())
    given = policy.paired(PROMPTS, RESPONSES)
    _, expected = learner_and_gradient(policy, given, 10**6, value_head=True)
    _, gradients = learner_and_gradient(policy, given, 0, value_head=True)
    assert "value_head.weight" in gradients and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name


def test_only_a_rollout_too_large_is_recomputed(monkeypatch):
    policy = Policy(build("llama"), tokenizer())
    given = policy.paired(PROMPTS, RESPONSES)
    runs = []
    policy.network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    policy.reader.head  # noqa: B018  tried now, on a forward of its own
    assert tokens_that_fit(policy.network, None, recomputed=False) == recompute.PLAIN_BYTES // (
        3 * recompute.WIDTHS_PER_LAYER * 32 * 4
    )
    for most, expected in ((given.tokens(shared=True), 2), (given.tokens(shared=True) - 1, 4)):
        monkeypatch.setattr(recompute, "PLAIN_BYTES", most * 3 * recompute.WIDTHS_PER_LAYER * 32 * 4)
        runs.clear()
        Learner(policy, value_head=False)(given).logprobs.sum().backward()
        assert len(runs) == expected, "prompt and responses, once or twice each"
    with torch.no_grad():
        runs.clear()
        Learner(policy, value_head=False)(given)
    assert len(runs) == 2, "values that nobody differentiates are computed once"
