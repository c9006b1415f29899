"""Losses: hand-worked values and gradients, TRL's own code on the same numbers, padding never read, edge cases."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adhere.learn.batch import Batch, Outputs, Totals
from adhere.learn.losses import (
    aggregate,
    cispo_loss,
    clipped_loss,
    dpo_loss,
    gspo_loss,
    kl_penalty,
    pairs,
    policy_gradient_loss,
    sequence_clipped_loss,
    value_loss,
)

INF, NAN = float("inf"), float("nan")
OF_BATCH = ("logprobs", "advantages", "ref_logprobs", "values", "returns")
"""Fields of `Batch` that have padding."""


def given_inputs(mask, now=None, now_values=None, **changes):
    """A whole batch and what the policy says of it now: zeros wherever a test says nothing."""
    mask = torch.as_tensor(mask)
    zeros = torch.zeros(mask.shape)
    settings = {
        **dict.fromkeys(OF_BATCH, zeros),
        "rewards": torch.zeros(len(mask)),
        "group": torch.zeros(len(mask), dtype=torch.long),
        "max_new_tokens": 9,
    }
    settings |= {name: torch.as_tensor(v) if isinstance(v, list) else v for name, v in changes.items()}
    totals = Totals(int(mask.sum()), len(mask), int(settings["group"].unique().numel()))
    outputs = Outputs(zeros if now is None else now, zeros, zeros if now_values is None else now_values)
    return Batch(mask=mask, totals=totals, **settings), outputs


def random_inputs(lengths, seed=0, drift=0.3, **changes):
    """A batch as in training, float64, two responses to a prompt; what the policy says now takes gradients."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(lengths), max(1, *lengths)

    def noise():
        return torch.randn(count, width, generator=generator, dtype=torch.float64)

    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    old = -noise().abs()
    settings = {
        "now": (old + drift * noise()).requires_grad_(),
        "logprobs": old,
        "ref_logprobs": old + drift * noise(),
        "advantages": noise()[:, :1] * mask,
        "now_values": noise().requires_grad_(),
        "values": noise(),
        "returns": noise(),
        "rewards": noise()[:, 0],
        "group": torch.arange(count) // 2,
    }
    return given_inputs(mask, **{**settings, **changes})


ONE_EACH = [[True, True, True, True]]


def test_policy_gradient_by_hand():
    # Response 0: two tokens, A = 2; response 1: one token, A = −1. log π: −0.5, −1.5 | −0.25.
    # −A log π: 1, 3 | −0.25. Over tokens: 3.75 / 3 = 1.25. Gradient −A / 3: −2/3, −2/3 | 1/3.
    logprobs = torch.tensor([[-0.5, -1.5], [-0.25, 9.0]], requires_grad=True)
    batch, now = given_inputs(
        [[True, True], [True, False]], now=logprobs, advantages=torch.tensor([[2.0, 2.0], [-1.0, 7.0]])
    )
    loss, metrics = policy_gradient_loss(batch, now)
    loss.backward()
    assert loss.item() == pytest.approx(1.25)
    assert metrics == {}
    assert logprobs.grad.flatten().tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("over", "value", "weights"),
    [
        # Terms 1, 3 | −0.25; what each token weighs.
        ("token", 3.75 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ("sequence", (2 - 0.25) / 2, [1 / 4, 1 / 4, 1 / 2]),
        ("limit", 3.75 / 18, [1 / 18, 1 / 18, 1 / 18]),
        ("sum", 3.75 / 2, [1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_aggregation_by_hand(over, value, weights):
    terms = torch.tensor([[1.0, 3.0], [-0.25, 8.0]], requires_grad=True)
    loss = aggregate(terms, given_inputs([[True, True], [True, False]])[0], over)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert terms.grad.flatten().tolist() == pytest.approx([*weights, 0])


def test_the_clipped_loss_by_hand():
    # clip 0.2 below and 0.3 above. ρ = 1.5, 0.5, 1.5, 0.5 with A = 1, 1, −2, −2:
    #   −min(1.5, 1.3) = −1.3, clipped: gradient 0       −min(0.5, 0.8) = −0.5: gradient −ρA = −0.5
    #   −min(−3, −2.6) = 3: gradient −ρA = 3             −min(−1, −1.6) = 1.6, clipped: gradient 0
    # Mean over 4 tokens: (−1.3 − 0.5 + 3 + 1.6) / 4 = 0.7.
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    loss, metrics = clipped_loss(*given_inputs(ONE_EACH, now=logprobs, advantages=[[1.0, 1.0, -2.0, -2.0]]), 0.2, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.7)
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, -0.5 / 4, 3 / 4, 0])
    assert {name: float(value) for name, value in metrics.items()} == {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
    }


def test_the_sequence_clipped_loss_by_hand():
    # Ratios of whole responses: 1.25 · 1.2 = 1.5 and 0.5 · 0.8 = 0.4, with A = 1 and 1, clip 0.2:
    #   −min(1.5, 1.2) = −1.2, clipped                   −min(0.4, 0.8) = −0.4: gradient −0.4 at each of its tokens
    # Mean over 2 responses: −0.8. No token by itself left [0.8, 1.2] by much; the response did.
    logprobs = torch.tensor([[1.25, 1.2], [0.5, 0.8]]).log().requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, metrics = sequence_clipped_loss(*given_inputs(mask, now=logprobs, advantages=torch.ones(2, 2)), 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.8)
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 0, -0.2, -0.2])
    assert (float(metrics["clip_ratio/low_mean"]), float(metrics["clip_ratio/high_mean"])) == (0.0, 0.5)


def test_the_gspo_loss_by_hand():
    # Geometric means of the ratios: (2 · 0.5 · 1.331)^⅓ = 1.1, and 0.64^½ = 0.8, with A = 1 and −1, clip 0.3 and 0.05:
    #   −min(1.1, 1.05) = −1.05, clipped                 −min(−0.8, −0.8) = 0.8: gradient ρ / 2 tokens = 0.4 at each
    # Mean over 2 responses: −0.125. Single tokens are far outside of [0.7, 1.05].
    logprobs = torch.tensor([[2.0, 0.5, 1.331], [1.6, 0.4, 5.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    loss, metrics = gspo_loss(*given_inputs(mask, now=logprobs, advantages=advantages), 0.3, 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(-0.125)
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 0, 0, 0.2, 0.2, 0])
    assert (float(metrics["clip_ratio/low_mean"]), float(metrics["clip_ratio/high_mean"])) == (0.0, 0.5)


def test_the_cispo_loss_by_hand():
    # log π = −1, old −1 − log ρ with ρ = 1.5, 0.5, 1.5, 0.5 and A = 1, 1, −2, −2; weights at most 1.2, no bound below:
    #   −w A log π = 1.2, 0.5, −2.4, −1, and the gradient of each is −w A: −1.2, −0.5, 2.4, 1, none is 0. Over 4 tokens.
    logprobs = torch.full((1, 4), -1.0, requires_grad=True)
    old = -1 - torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    batch, now = given_inputs(ONE_EACH, now=logprobs, logprobs=old, advantages=[[1.0, 1.0, -2.0, -2.0]])
    loss, metrics = cispo_loss(batch, now, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx((1.2 + 0.5 - 2.4 - 1) / 4)
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.3, -0.125, 0.6, 0.25])
    assert {name: float(value) for name, value in metrics.items()} == {"cispo_clip_ratio": 0.25}


@pytest.mark.parametrize(
    ("loss_of", "over"),
    [
        (lambda batch, now: gspo_loss(batch, now, 0.2, 0.2), "sequence"),
        (lambda batch, now: cispo_loss(batch, now, 0.2), "token"),
        (lambda batch, now: clipped_loss(batch, now, 0.2, 0.2, "limit"), "limit"),
        (lambda batch, now: clipped_loss(batch, now, 0.2, 0.2), "token"),
        (lambda batch, now: clipped_loss(batch, now, 0.2, 0.2, "sequence"), "sequence"),
        (lambda batch, now: sequence_clipped_loss(batch, now, 0.2, 0.2), "sum"),
    ],
    ids=["gspo", "cispo", "dr. grpo", "token", "sequence mean", "whole response"],
)
def test_on_policy_the_clipped_losses_have_the_policy_gradient(loss_of, over):
    batch, now = random_inputs([3, 1, 4, 2], drift=0.0)
    loss_of(batch, now)[0].backward()
    clipped = now.logprobs.grad.clone()
    now.logprobs.grad = None
    policy_gradient_loss(batch, now, over)[0].backward()
    assert torch.allclose(clipped, now.logprobs.grad, atol=1e-12)


def test_kl_estimates_by_hand():
    # d = log π_ref − log π = −log 2 and log 2. k1 = −d; k3 = exp(d) − d − 1 = 0.5 + log 2 − 1 and 2 − log 2 − 1.
    logprobs, reference = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    mask = torch.tensor([[True, True]])
    log2 = math.log(2)
    assert kl_penalty(logprobs, reference, mask, "k1").flatten().tolist() == pytest.approx([log2, -log2])
    assert kl_penalty(logprobs, reference, mask).flatten().tolist() == pytest.approx([log2 - 0.5, 1 - log2])
    # d k3 / d log π = 1 − exp(d) = 0.5 and −1.
    logprobs.requires_grad_()
    kl_penalty(logprobs, reference, mask, "k3").sum().backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.5, -1.0])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_both_kl_estimates_are_unbiased(estimator, mine, reference):
    """Their mean under π over all tokens is KL(π ‖ π_ref)."""
    p = torch.tensor(mine, dtype=torch.float64) / sum(mine)
    q = torch.tensor(reference[: len(mine)], dtype=torch.float64) / sum(reference[: len(mine)])
    estimates = kl_penalty(p.log()[None], q.log()[None], torch.ones(1, len(p), dtype=torch.bool), estimator)[0]
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-9)
    assert estimator == "k1" or estimates.ge(-1e-12).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_gradient_of_a_kl_loss_on_own_samples(estimator):
    """Its mean under π: nothing for k1; for k3 the gradient of KL(π_ref ‖ π)."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = logits.log_softmax(-1)
    estimates = kl_penalty(p[None], q.log()[None], torch.ones(1, 3, dtype=torch.bool), estimator)[0]
    # The samples are fixed when the loss is taken, so their probability carries no gradient.
    found = torch.autograd.grad((p.exp().detach() * estimates).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((q * (q.log() - p)).sum(), logits)[0]
    wanted = torch.zeros_like(forward) if estimator == "k1" else forward
    assert torch.allclose(found, wanted, atol=1e-12, rtol=0)


def test_the_value_loss_by_hand():
    # clip 0.2. V = 1, 0.1, 1, old 0.5, 0, 1.1; returns 2, 0, 1. V_clipped = 0.7, 0.1, 1.
    # (V − R)² = 1, 0.01, 0; clipped: 1.69, 0.01, 0. ½ · (1.69 + 0.01 + 0) / 3 = 17/60.
    # Gradient (V − R) / 3: 0 where the clipped error, which does not move with V, is larger; 0.1 / 3; 0.
    values = torch.tensor([[1.0, 0.1, 1.0]], requires_grad=True)
    batch, now = given_inputs([[True] * 3], now_values=values, values=[[0.5, 0.0, 1.1]], returns=[[2.0, 0.0, 1.0]])
    loss, metrics = value_loss(batch, now, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(17 / 60)
    assert values.grad.flatten().tolist() == pytest.approx([0, 0.1 / 3, 0])
    assert float(metrics["value_loss"]) == pytest.approx(17 / 60)
    assert not metrics["value_loss"].requires_grad


def test_dpo_by_hand():
    # Group 0: rewards 1, 5, 3: response 1 against 0. Group 1: equal rewards, no pair.
    # Δ = sum of log π − log π_ref: response 0: 0.5 − 0.25 = 0.25; response 1: 1.25 (one token). β = 0.5: margin 0.5.
    # Loss −log σ(0.5) over two groups. Gradient at a token of the chosen −β σ(−0.5) / 2, of the rejected the opposite.
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, True]])
    logprobs = torch.tensor([[0.5, -0.25], [1.25, 40.0], [3.0, 3.0], [3.0, 3.0], [1.0, 1.0]]).sub(1).requires_grad_()
    batch, now = given_inputs(
        mask,
        now=logprobs,
        ref_logprobs=torch.full((5, 2), -1.0),
        rewards=[1.0, 5.0, 3.0, 2.0, 2.0],
        group=[0, 0, 0, 1, 1],
    )
    loss, metrics = dpo_loss(batch, now, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)) / 2)
    pull = 0.5 / (1 + math.exp(0.5)) / 2
    assert logprobs.grad[0].tolist() == pytest.approx([pull, pull])
    assert logprobs.grad[1].tolist() == pytest.approx([-pull, 0])
    assert logprobs.grad[2:].eq(0).all()
    found = {name: float(value) for name, value in metrics.items()}
    assert found == pytest.approx({"dpo/accuracy": 0.5, "dpo/margin": 0.25, "dpo/pairs": 0.5})
    # The other way round the policy has it wrong.
    wrong = dpo_loss(replace(batch, rewards=-batch.rewards), now, 0.5)[1]
    assert float(wrong["dpo/accuracy"]) == 0.0 and float(wrong["dpo/margin"]) < 0


@pytest.mark.parametrize(
    ("rewards", "group", "wanted"),
    [
        ([1.0, 3.0, 2.0], [0, 0, 0], ([1], [0])),
        ([2.0, 2.0, 1.0, 1.0], [0, 0, 0, 0], ([0], [2])),
        ([1.0, 1.0], [0, 0], ([], [])),
        ([1.0], [0], ([], [])),
        ([1.0, 2.0, 3.0, 3.0, 9.0, 8.0], [4, 4, 5, 5, 7, 7], ([1, 4], [0, 5])),
        ([], [], ([], [])),
    ],
    ids=["three", "ties: the first", "all equal", "alone", "three groups", "nothing"],
)
def test_pairs(rewards, group, wanted):
    chosen, rejected = pairs(torch.tensor(rewards), torch.tensor(group, dtype=torch.long))
    assert (chosen.tolist(), rejected.tolist()) == wanted
    assert chosen.dtype == rejected.dtype == torch.long


def test_dpo_without_a_pair_is_zero_with_zero_gradients():
    batch, now = random_inputs([3, 2], rewards=torch.ones(2))
    loss, metrics = dpo_loss(batch, now, 0.1)
    loss.backward()
    assert loss.item() == 0 and now.logprobs.grad.eq(0).all()
    assert all(float(value) == 0 for value in metrics.values())


LOSSES = {
    "policy gradient": policy_gradient_loss,
    "clipped": lambda batch, now: clipped_loss(batch, now, 0.2, 0.2),
    "sequence mean": lambda batch, now: clipped_loss(batch, now, 0.2, 0.2, "sequence"),
    "over the limit": lambda batch, now: clipped_loss(batch, now, 0.2, 0.2, "limit"),
    "whole response": lambda batch, now: sequence_clipped_loss(batch, now, 0.2, 0.2),
    "gspo": lambda batch, now: gspo_loss(batch, now, 0.2, 0.2),
    "cispo": lambda batch, now: cispo_loss(batch, now, 0.2),
    "kl": lambda batch, now: (
        aggregate(kl_penalty(now.logprobs, batch.ref_logprobs, batch.mask), batch, "token"),
        {},
    ),
    "value": lambda batch, now: value_loss(batch, now, 0.2),
    "dpo": lambda batch, now: dpo_loss(batch, now, 0.1),
}


@pytest.mark.parametrize("padding", [-INF, INF, NAN, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_never_read_and_gets_no_gradient(name, padding):
    """One response fills its row, one has a single token, one is empty."""
    batch, now = random_inputs([4, 1, 0, 3], seed=3)

    def dirty(tensor):
        out = tensor.detach().masked_fill(~batch.mask, padding)
        return out.requires_grad_() if tensor.requires_grad else out

    dirtied = replace(batch, **{field: dirty(getattr(batch, field)) for field in OF_BATCH})
    results = []
    for given_batch, said in (
        (batch, now),
        (dirtied, Outputs(dirty(now.logprobs), dirty(now.entropy), dirty(now.values))),
    ):
        loss, metrics = LOSSES[name](given_batch, said)
        loss.backward()
        results.append((loss, metrics, said.logprobs.grad, said.values.grad))
    (loss, metrics, *gradients), (other, others, *other_gradients) = results
    assert torch.isfinite(loss) and torch.equal(loss, other) and metrics == others
    for one, two in zip(gradients, other_gradients, strict=True):
        assert (one is None) == (two is None)
        assert one is None or (torch.equal(one, two) and two[~batch.mask].eq(0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_padding_is_a_loss_of_zero(name):
    """There are 0 tokens then, which must not be divided by. DPO alone has something to say: a pair with no margin."""
    batch, now = random_inputs([0, 0])
    loss, metrics = LOSSES[name](batch, now)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if name == "dpo" else 0)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert now.logprobs.grad is None or now.logprobs.grad.eq(0).all()


@pytest.mark.parametrize("name", ["clipped", "whole response", "gspo", "cispo"])
def test_a_ratio_beyond_float32_leaves_finite_numbers(name):
    """exp(200) is inf in float32, and inf times an advantage of 0 would be NaN for the whole batch."""
    logprobs = torch.zeros(3, 2, requires_grad=True)
    advantages = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    mask = torch.ones(3, 2, dtype=torch.bool)
    given = given_inputs(mask, now=logprobs, logprobs=torch.full((3, 2), -200.0), advantages=advantages)
    loss, _ = LOSSES[name](*given)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed: TRL's own losses are not compared")


def bare(cls, **attributes):
    """A trainer of TRL with what its loss reads, and nothing that needs a model or data."""
    trainer = object.__new__(cls)
    defaults = {
        "accelerator": Accelerator(cpu=True),
        "model": nn.Linear(1, 1),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**defaults, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def in_trl(batch, **more):
    nothing = torch.zeros(len(batch.mask), 1, dtype=torch.long)
    mask = batch.mask.long()
    return {
        **{"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask},
        "advantages": batch.advantages[:, 0],
        "num_items_in_batch": mask.sum(),
        **more,
    }


def gradient(loss, now):
    return torch.autograd.grad(loss, now.logprobs)[0]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_of", "over", "kind", "level", "bound"),
    [
        (clipped_loss, "token", "dapo", "token", 0.28),
        (partial(clipped_loss, over="sequence"), "sequence", "grpo", "token", 0.28),
        (partial(clipped_loss, over="limit"), "limit", "dr_grpo", "token", 0.28),
        (gspo_loss, "sequence", "grpo", "sequence", 0.28),
        # TRL bounds the ratio of CISPO by epsilon_high itself, we and its paper by 1 + epsilon_high.
        (lambda batch, now, low, high: cispo_loss(batch, now, high), "token", "cispo", "token", 1.28),
    ],
    ids=["dapo", "grpo", "dr_grpo", "gspo", "cispo"],
)
def test_every_loss_is_the_one_of_trl(trl, loss_of, over, kind, level, bound, beta):
    batch, now = random_inputs([4, 2, 5, 1, 6, 6], seed=1, drift=0.8)
    trainer = bare(
        trl.GRPOTrainer,
        **{"loss_type": kind, "beta": beta, "epsilon_low": 0.2, "epsilon_high": bound, "max_completion_length": 9},
        **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": level},
        **{"use_vllm": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        now.logprobs,
        torch.zeros_like(now.logprobs),
        None,
    )
    theirs = trainer._compute_loss(
        None, in_trl(batch, old_per_token_logps=batch.logprobs, ref_per_token_logps=batch.ref_logprobs)
    )
    ours, metrics = loss_of(batch, now, 0.2, 0.28)
    penalty = kl_penalty(now.logprobs, batch.ref_logprobs, batch.mask)
    ours = ours + beta * aggregate(penalty, batch, over)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(gradient(ours, now), gradient(theirs, now), atol=1e-12)
    logged = trainer._metrics["train"]
    for name, value in metrics.items():
        assert float(value) == pytest.approx(logged[name][0], abs=1e-6) and float(value) > 0
    if beta:
        assert float(aggregate(penalty, batch, "token")) == pytest.approx(logged["kl"][0], rel=1e-6)


def test_the_sequence_clipped_loss_is_the_rloo_of_trl(trl):
    batch, now = random_inputs([4, 2, 5, 1, 3, 3], seed=2, drift=0.2)
    trainer = bare(trl.RLOOTrainer, epsilon_low=0.2, epsilon_high=0.2)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        now.logprobs,
        torch.zeros_like(now.logprobs),
        None,
    )
    old = (batch.logprobs * batch.mask).sum(-1)
    theirs = trainer._compute_loss(None, in_trl(batch, old_logps=old))
    ours, metrics = sequence_clipped_loss(batch, now, 0.2, 0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(gradient(ours, now), gradient(theirs, now), atol=1e-12)
    found = {name: float(value) for name, value in metrics.items()}
    assert found == pytest.approx({name: trainer._metrics["train"][name][0] for name in found})
    assert sum(found.values()) > 0


def test_dpo_is_the_one_of_trl(trl):
    """TRL has one pair a row, chosen first; ours are groups of two with the better response at either place."""
    batch, now = random_inputs([4, 2, 5, 1], seed=5, rewards=torch.tensor([1.0, 2.0, 4.0, 3.0]))
    order = torch.tensor([1, 2, 0, 3])
    logprobs = (now.logprobs * batch.mask)[order]
    reference = (batch.ref_logprobs * batch.mask)[order].sum(-1)
    nothing = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = bare(
        trl.DPOTrainer,
        **{"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "beta": 0.3},
        **{"loss_types": ["sigmoid"], "loss_weights": [1.0], "use_weighting": False},
    )
    mask = torch.cat([torch.zeros(4, 1, dtype=torch.long), batch.mask[order].long()], dim=1)
    row = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    row |= {"ref_chosen_logps": reference[:2], "ref_rejected_logps": reference[2:]}
    theirs = trainer._compute_loss(lambda **k: outputs, row, False)
    ours, metrics = dpo_loss(batch, now, 0.3)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(gradient(ours, now), gradient(theirs, now), atol=1e-12)
    logged = trainer._metrics["train"]
    assert float(metrics["dpo/accuracy"]) == pytest.approx(logged["rewards/accuracies"][0])
    assert float(metrics["dpo/margin"]) == pytest.approx(logged["rewards/margins"][0], rel=1e-6)
    assert float(metrics["dpo/pairs"]) == 1
