"""Within a group: normalising and gating by hand and as properties; one response, no spread, all gated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adhere.reward.group import GATE_MARGIN, gate, group_normalise
from adhere.reward.named import NAMED, RewardConfig
from adhere.reward.reward import combine

GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])


def test_signals_are_normalised_within_their_group():
    # Group 0: mean 2, deviation √(((−1)² + 0 + 1²) / 3) = 0.8165. Group 1: no spread. Group 2: one response.
    z = group_normalise(torch.tensor([1.0, 2.0, 3.0, 0.1, 0.1, 9.0]), GROUPS)
    assert z.tolist() == pytest.approx([-1.2247, 0, 1.2247, 0, 0, 0], abs=1e-4)


def test_responses_left_out_do_not_move_the_others():
    among = torch.tensor([True, False, True])
    z = group_normalise(torch.tensor([1.0, 500.0, 3.0]), torch.zeros(3, dtype=torch.long), among)
    assert z.tolist() == pytest.approx([-1, 498, 1])  # mean 2, deviation 1 of the two that count


ROW = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8)


@given(ROW, st.floats(-100, 100, width=32))
@settings(deadline=None)
def test_a_constant_added_to_a_group_changes_nothing_and_the_outcome_is_standard(values, shift):
    x = torch.tensor(values)
    group = torch.zeros(len(x), dtype=torch.long)
    spread = x.double().std(unbiased=False).item()
    assume(spread == 0 or spread > 1e-2)  # next to the floor, float32 addition decides
    z = group_normalise(x, group)
    torch.testing.assert_close(group_normalise(x + shift, group), z, atol=5e-3, rtol=0)
    assert z.mean().item() == pytest.approx(0, abs=1e-5)
    assert z.std(unbiased=False).item() == pytest.approx(float(spread > 0), abs=1e-5)


def test_a_gated_response_gets_the_minimum_of_its_group():
    passed = torch.tensor([True, True, False, True, False, False])
    reward = torch.tensor([2.0, -1.0, 5.0, 3.0, 0.5, 0.25])
    # Group 0: the minimum of 2 and −1. Group 1: 3 is the only one that passed, so a margin below it. Group 2: none.
    assert gate(reward, GROUPS, passed).tolist() == [2.0, -1.0, -1.0, 3.0, 3.0 - GATE_MARGIN, 0.25 - GATE_MARGIN]


@given(st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 2), st.booleans()), min_size=1, max_size=9))
@settings(deadline=None)
def test_a_gated_response_never_reaches_the_best_of_its_group_nor_beats_any(rows):
    rows.sort(key=lambda row: row[1])
    reward, group = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    passed = torch.tensor([r[2] for r in rows])
    out = gate(reward, group, passed)
    assert torch.equal(out[passed], reward[passed])
    for index in set(group.tolist()):
        inside, outside = out[(group == index) & passed], out[(group == index) & ~passed]
        if len(inside) and len(outside):
            assert outside.max() < inside.max() and outside.max() <= inside.min()
        assert len(set(outside.tolist())) <= 1


def test_the_reward_is_the_weighted_sum_of_normalised_signals_then_gated():
    values = {"coverage": torch.tensor([0.1, 0.3, 0.9]), "length": torch.tensor([4.0, 2.0, 90.0])}
    group, passed = torch.zeros(3, dtype=torch.long), torch.tensor([True, True, False])
    weights = {"coverage": 2.0, "length": 0.5}
    # Among the two that passed, coverage is −1, 1 and length 1, −1: −2 + 0.5 and 2 − 0.5; the third gets the minimum.
    assert combine(values, RewardConfig(weights), group, passed).tolist() == pytest.approx([-1.5, 1.5, -1.5])
    raw = combine(values, RewardConfig(weights, normalise="none"), group, torch.ones(3, dtype=torch.bool))
    assert raw.tolist() == pytest.approx([0.2 + 2, 0.6 + 1, 1.8 + 45])


@pytest.mark.parametrize("name", ["paper", "attention", "overlap", "length", "shuffled", "certainty"])
def test_one_response_to_a_prompt_and_equal_responses_give_equal_finite_rewards(name):
    config = NAMED[name]
    for rows in (1, 3):
        values = {signal: torch.full((rows,), 0.3) for signal in config.weights}
        group = torch.zeros(rows, dtype=torch.long)
        reward = combine(values, config, group, torch.ones(rows, dtype=torch.bool))
        assert reward.isfinite().all() and len(set(reward.tolist())) == 1
