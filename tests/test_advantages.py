"""Advantages: hand-worked cases, GAE against its definition, the invariances each estimator promises, edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from adhere.errors import UserError
from adhere.learn.advantages import (
    SCALES,
    baseline,
    gae,
    group_mean,
    group_relative,
    leave_one_out,
    token_rewards,
    whiten,
)

INF, NAN = float("inf"), float("nan")
# One prompt with three responses and one with two.
GROUP = torch.tensor([0, 0, 0, 1, 1])
REWARDS = torch.tensor([1.0, 2.0, 6.0, 4.0, 2.0])


@st.composite
def grouped(draw, least=1):
    """Rewards in eighths (exact in floating point), float64, and groups of 1 to 5 responses."""
    sizes = draw(st.lists(st.integers(least, 5), min_size=1, max_size=5))
    group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    eighths = draw(st.lists(st.integers(-800, 800), min_size=len(group), max_size=len(group)))
    return torch.tensor(eighths, dtype=torch.float64) / 8, group


@st.composite
def token_level(draw):
    """Rewards and values [B, R] and a right-padded mask; rows may be empty."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    width = max(1, *lengths)
    numbers = st.lists(st.integers(-16, 16), min_size=len(lengths) * width, max_size=len(lengths) * width)
    rewards, values = (torch.tensor(draw(numbers), dtype=torch.float64).view(-1, width) / 4 for _ in range(2))
    return rewards, values, torch.arange(width) < torch.tensor(lengths)[:, None]


def test_group_mean_is_given_to_each_response_with_the_size_of_its_group():
    # (1 + 2 + 6) / 3 = 3 and (4 + 2) / 2 = 3.
    mean, sizes = group_mean(REWARDS, GROUP)
    assert mean.tolist() == [3, 3, 3, 3, 3]
    assert sizes.tolist() == [3, 3, 3, 2, 2]


def test_group_relative_by_hand():
    # Centred: −2, −1, 3 | 1, −1. Variances with Bessel: (4 + 1 + 9) / 2 = 7 | (1 + 1) / 1 = 2.
    centred = [-2.0, -1.0, 3.0, 1.0, -1.0]
    assert group_relative(REWARDS, GROUP, "none").tolist() == centred
    deviations = [math.sqrt(7) + 1e-4] * 3 + [math.sqrt(2) + 1e-4] * 2
    wanted = [c / d for c, d in zip(centred, deviations, strict=True)]
    assert group_relative(REWARDS, GROUP).tolist() == pytest.approx(wanted, rel=1e-6)
    # The batch's mean is 3 too, so its variance with Bessel is (14 + 2) / 4 = 4.
    wanted = [c / (2 + 1e-4) for c in centred]
    assert group_relative(REWARDS, GROUP, "batch").tolist() == pytest.approx(wanted, rel=1e-6)


def test_leave_one_out_by_hand():
    # 1 − (2 + 6)/2 = −3, 2 − (1 + 6)/2 = −1.5, 6 − (1 + 2)/2 = 4.5 | 4 − 2 = 2, 2 − 4 = −2.
    assert leave_one_out(REWARDS, GROUP).tolist() == pytest.approx([-3, -1.5, 4.5, 2, -2], abs=1e-6)


def test_baseline_is_the_mean_of_the_batch_or_what_is_passed():
    assert baseline(REWARDS).tolist() == pytest.approx([-2, -1, 3, 1, -1])
    assert baseline(REWARDS, 2.0).tolist() == [-1, 0, 4, 2, 0]
    # 0 is a baseline like any other, not the lack of one.
    assert baseline(REWARDS, 0.0).tolist() == REWARDS.tolist()


def test_gae_by_hand():
    # One response of three tokens, score 1 on the last; γ = 0.5, λ = 0.5, so γλ = 0.25.
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.4, 0.2, 0.6]])
    # δ_2 = 1 − 0.6 = 0.4 (no successor); δ_1 = 0.5 · 0.6 − 0.2 = 0.1; δ_0 = 0.5 · 0.2 − 0.4 = −0.3.
    # A_2 = 0.4; A_1 = 0.1 + 0.25 · 0.4 = 0.2; A_0 = −0.3 + 0.25 · 0.2 = −0.25. Returns: A + V.
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    assert advantages.flatten().tolist() == pytest.approx([-0.25, 0.2, 0.4])
    assert returns.flatten().tolist() == pytest.approx([0.15, 0.4, 1.0])


@given(token_level(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_the_sum_of_its_definition(batch, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, each response by itself, without a recursion."""
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(mask.sum(-1).tolist()):
        r, v = rewards[b, :length].tolist(), [*values[b, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        wanted = [sum((gamma * lam) ** n * delta[t + n] for n in range(length - t)) for t in range(length)]
        assert advantages[b, :length].tolist() == pytest.approx(wanted, abs=1e-9)
        assert returns[b, :length].tolist() == pytest.approx([a + v[t] for t, a in enumerate(wanted)], abs=1e-9)
        assert advantages[b, length:].eq(0).all() and returns[b, length:].eq(0).all()


@given(token_level())
def test_gae_with_lambda_one_returns_what_was_still_to_come(batch):
    """λ = γ = 1: the return is the sum of rewards from here on, whatever the value head said."""
    rewards, values, mask = batch
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    wanted = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    assert torch.allclose(returns, wanted, atol=1e-9)


def test_whiten_by_hand():
    # Counted: 1, 2, 6. Mean 3, variance (4 + 1 + 9) / 3 = 14/3.
    values = torch.tensor([[1.0, 2.0], [6.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    scale = math.sqrt(14 / 3)
    assert whiten(values, mask).flatten().tolist() == pytest.approx([-2 / scale, -1 / scale, 3 / scale, 0], rel=1e-6)


@given(token_level())
def test_whitened_advantages_have_mean_0_and_variance_1(batch):
    values, _, mask = batch
    out = whiten(values, mask)[mask]
    if len(values[mask].unique()) > 1:
        assert float(out.mean()) == pytest.approx(0, abs=1e-9)
        assert float(out.var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    else:
        assert out.abs().le(1e-9).all()


def test_token_rewards_by_hand():
    # β = 0.1. First response, two tokens: −0.1 · (−1 + 2) = −0.1; −0.1 · (−2 + 1) = 0.1, with the score 0.1 + 3 = 3.1.
    # Second, one token: −0.1 · (−1 + 1) + 5 = 5.
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -7.0]])
    reference = torch.tensor([[-2.0, -1.0], [-1.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    out = token_rewards(torch.tensor([3.0, 5.0]), logprobs, reference, mask, 0.1)
    assert out.flatten().tolist() == pytest.approx([-0.1, 3.1, 5.0, 0.0])
    without = token_rewards(torch.tensor([3.0, 5.0]), logprobs, None, mask, 0.1)
    assert without.flatten().tolist() == [0, 3, 5, 0]


@given(grouped(), st.integers(-1000, 1000), st.sampled_from(SCALES))
def test_shifting_the_rewards_of_a_group_changes_no_advantage(batch, shift, scale):
    rewards, group = batch
    shifted = rewards + shift * (group == group.max())
    assert torch.allclose(leave_one_out(rewards, group), leave_one_out(shifted, group), atol=1e-9)
    if scale != "batch":  # whose deviation does see the shift
        assert torch.allclose(group_relative(rewards, group, scale), group_relative(shifted, group, scale), atol=1e-9)
    assert torch.allclose(
        group_relative(rewards, group, scale), group_relative(rewards + shift, group, scale), atol=1e-9
    )


@given(grouped(), st.randoms(use_true_random=False))
def test_order_and_numbering_of_groups_change_no_advantage(batch, rng):
    rewards, group = batch
    order = torch.tensor(rng.sample(range(len(group)), len(group)))
    for advantage in (group_relative, leave_one_out):
        moved = advantage(rewards[order], 3 * group[order] + 2)
        assert torch.allclose(moved, advantage(rewards, group)[order], atol=1e-12)


@given(grouped(least=2))
def test_leave_one_out_is_the_centred_reward_stretched(batch):
    rewards, group = batch
    mean, sizes = group_mean(rewards, group)
    assert torch.allclose(leave_one_out(rewards, group), sizes / (sizes - 1) * (rewards - mean), atol=1e-9)
    others = [rewards[(group == group[i]) & (torch.arange(len(group)) != i)].mean() for i in range(len(group))]
    assert torch.allclose(leave_one_out(rewards, group), rewards - torch.stack(others), atol=1e-9)


@given(grouped())
def test_advantages_of_a_group_sum_to_zero(batch):
    rewards, group = batch
    for out in (leave_one_out(rewards, group), *(group_relative(rewards, group, scale) for scale in SCALES)):
        assert torch.zeros(int(group.max()) + 1, dtype=out.dtype).index_add(0, group, out).abs().max() < 1e-9


@given(grouped(least=2))
def test_group_scale_gives_deviation_one(batch):
    rewards, group = batch
    out = group_relative(rewards, group)
    for value in group.unique():
        deviation = float(rewards[group == value].std())
        assert float(out[group == value].std()) == pytest.approx(deviation / (deviation + 1e-4), abs=1e-9)


@pytest.mark.parametrize(
    "rewards",
    [[0.1] * 3, [1e6 + 0.1] * 7, [-3e-8] * 5, [0.3] * 6, [1 / 3] * 49],
    ids=["tenth", "large", "tiny", "three tenths", "many"],
)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero(rewards, scale):
    """In float32 the mean of equal numbers need not equal them: what is left must not be divided by itself."""
    rewards = torch.tensor(rewards)
    group = torch.zeros(len(rewards), dtype=torch.long)
    # A second group that differs, so that the batch's deviation is not 0.
    both, groups = torch.cat([rewards, torch.tensor([0.0, 1.0])]), torch.cat([group, torch.tensor([1, 1])])
    for values, index in ((rewards, group), (both, groups)):
        assert group_relative(values, index, scale)[: len(rewards)].eq(0).all()
        assert leave_one_out(values, index)[: len(rewards)].eq(0).all()


def test_rewards_that_are_equal_but_for_rounding_give_no_advantage():
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3 + 3e-8])
    assert rewards.unique().numel() > 1
    assert group_relative(rewards, torch.zeros(3, dtype=torch.long)).eq(0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_response_alone_in_its_group_gets_zero(count, scale):
    rewards, group = torch.tensor([5.0, -2.0, 0.25])[:count], torch.arange(count)
    assert group_relative(rewards, group, scale).tolist() == [0.0] * count
    assert leave_one_out(rewards, group).tolist() == [0.0] * count


def test_an_unknown_scale_is_named():
    with pytest.raises(UserError, match=r"unknown scale 'groups'; did you mean group\?"):
        group_relative(REWARDS, GROUP, "groups")


@pytest.mark.parametrize("padding", [0.0, -3.0, INF, -INF, NAN])
def test_padding_is_never_read(padding):
    """The second response has one token, the third none."""
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    clean = torch.tensor([[0.5, -1.0, 2.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    dirty = clean.masked_fill(~mask, padding)
    scores = torch.tensor([1.0, 2.0, 3.0])
    wanted = [*gae(clean, clean + 1, mask, 0.9, 0.8), whiten(clean, mask)]
    wanted.append(token_rewards(scores, clean, clean / 2, mask, 0.1))
    found = [*gae(dirty, dirty + 1, mask, 0.9, 0.8), whiten(dirty, mask)]
    found.append(token_rewards(scores, dirty, dirty / 2, mask, 0.1))
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
        assert other[~mask].eq(0).all()


def test_nothing_but_padding_gives_zeros():
    empty, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    for out in (
        *gae(empty, empty, mask, 1.0, 1.0),
        whiten(empty, mask),
        token_rewards(empty[:, 0], empty, empty, mask, 0.1),
    ):
        assert out.eq(0).all()


def test_one_token_is_its_own_outcome():
    one = torch.ones(1, 1, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), one, 0.3, 0.7)
    assert (float(advantages), float(returns)) == (1.5, 2.0)
    assert float(whiten(advantages, one)) == 0.0


def test_shapes_are_checked_wherever_the_tests_call():
    """A mask of another width would broadcast in silence; so would one value for a whole group."""
    wide = torch.ones(2, 3, dtype=torch.bool)
    for wrong in (
        lambda: whiten(torch.zeros(2, 1), wide),
        lambda: whiten(torch.zeros(2, 3), wide.float()),
        lambda: leave_one_out(torch.zeros(1), torch.tensor([0, 0])),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
