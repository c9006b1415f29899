"""Rivals and controls: overlap, length, random, shuffled attention, majority, exact, by hand and as properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from adhere.errors import UserError
from adhere.reward import controls, signals
from adhere.reward.signals import NO_WORD
from adhere.types import Role
from tests.test_signals import evidence_of, padded, reads


def test_overlap_is_the_share_of_content_tokens_that_the_prompt_has():
    # Content tokens 5, 9 and 6 of the first response; 5 and 6 are in the prompt. The second has 9 alone.
    content = [[True, False, True, True], [True, False, False, False]]
    evidence = evidence_of([[5, 6], [5, 6]], [[5, 6, 9, 6], [9, 5, -1, -1]], content=content)
    assert controls.overlap(evidence).tolist() == pytest.approx([2 / 3, 0])


def test_overlap_counts_the_words_that_count():
    evidence = evidence_of([[5, 6]], [[5, 6]])
    assert controls.overlap(replace(evidence, prompt_words=torch.tensor([[NO_WORD, 7]]))).item() == pytest.approx(1 / 2)


def test_length_is_the_number_of_tokens_whatever_the_batch():
    assert controls.length(evidence_of([[5], [5]], [[1, 2, 3], [1, -1, -1]])).tolist() == [3, 1]


def test_random_depends_on_the_text_alone():
    one = controls.random(evidence_of([[5], [5], [6]], [[1, 2], [2, 1], [1, 2]]))
    again = controls.random(evidence_of([[5]], [[1, 2]]))
    assert one[0] == again[0]
    assert len(set(one.tolist())) == 3
    assert controls.random(evidence_of([[5]], [[1, 2]]), seed=1)[0] != again[0]


def test_random_is_uniform():
    draws = controls.random(evidence_of([[5]] * 2000, [[i, i] for i in range(2000)]))
    assert draws.min() >= 0 and draws.max() < 1
    # Standard error of the mean is 0.29 / √2000 = 0.0065, of the variance about 0.0017.
    assert draws.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert draws.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_shuffled_moves_every_token_of_the_user_and_nothing_else():
    evidence = evidence_of([[-1, 5, 6, 7, 8]], [[1, 2]], [[[0.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.4, 0.1, 0.2, 0.05]]])
    prompts = evidence.reading.rollout.prompts
    roles = torch.tensor([[Role.PADDING, Role.TEMPLATE, Role.USER, Role.USER, Role.USER]])
    rollout = replace(evidence.reading.rollout, prompts=replace(prompts, roles=roles))
    evidence = replace(evidence, reading=replace(evidence.reading, rollout=rollout))
    before, after = evidence.reading.attention, controls.shuffled(evidence.reading).attention
    assert torch.equal(after[..., :2], before[..., :2])
    assert (after[..., 2:] != before[..., 2:]).all()
    assert torch.equal(after.sort(-1).values, before.sort(-1).values)
    # One permutation for all rows: the rows' columns stay together.
    columns = {tuple(c) for c in before[0].T.tolist()}
    assert {tuple(c) for c in after[0].T.tolist()} == columns
    assert torch.equal(controls.shuffled(evidence.reading).copy_attention, after)


def test_of_two_tokens_each_gets_the_others_attention():
    evidence = evidence_of([[i, i + 1] for i in range(20)], [[1]] * 20, [[[0.2, 0.8]]] * 20)
    torch.testing.assert_close(controls.shuffled(evidence.reading).attention, torch.tensor([[[0.8, 0.2]]] * 20))


def test_responses_to_one_prompt_are_shuffled_alike_and_in_any_company():
    rows = [[0.1, 0.2, 0.3, 0.4]]
    alone = evidence_of([[5, 6, 7, 8]], [[1]], [rows])
    group = evidence_of([[4, 3, 2, 1], [5, 6, 7, 8]], [[1], [1], [2]], [rows] * 3, index=[0, 1, 1])
    moved = controls.shuffled(group.reading).attention
    assert torch.equal(moved[1], moved[2])
    assert torch.equal(moved[1], controls.shuffled(alone.reading).attention[0])


@given(reads())
@settings(max_examples=30, deadline=None)
def test_shuffling_keeps_what_does_not_depend_on_where(evidence):
    for signal in (signals.lookback, signals.coherence, signals.repetition):
        torch.testing.assert_close(
            signal(replace(evidence, reading=controls.shuffled(evidence.reading))), signal(evidence)
        )


@given(reads())
@settings(max_examples=30, deadline=None)
def test_padding_changes_no_rival(evidence):
    wide = padded(evidence, 2, 3, 4)
    for control in (controls.overlap, controls.length, controls.random):
        torch.testing.assert_close(control(wide), control(evidence))
    torch.testing.assert_close(
        controls.shuffled(wide.reading).attention[:, : evidence.content.shape[1], 2:-3],
        controls.shuffled(evidence.reading).attention,
    )


@pytest.mark.parametrize(
    ("texts", "votes"),
    [
        (["The garden.", "garden", "kitchen"], [1, 1, 0]),  # equal once normalised
        (["a b", "c d", "e f"], [1, 0, 0]),  # a tie goes to the first
        (["x", "kitchen", "kitchen"], [0, 1, 1]),
        (["厨房", "花园。", "花园"], [0, 1, 1]),  # in any script
        (["5", "-5", "−5"], [0, 1, 1]),
        (["", " ", "kitchen"], [0, 0, 1]),  # silence has no vote
        (["", "", ""], [0, 0, 0]),
    ],
)
def test_majority_rewards_the_groups_most_common_answer(texts, votes):
    evidence = evidence_of([[5]], [[1]] * 3, texts=texts, index=[0, 0, 0])
    assert controls.majority(evidence).tolist() == votes


def test_majority_votes_within_a_group():
    evidence = evidence_of([[5], [6]], [[1]] * 4, texts=["a1", "b1", "b1", "b1"], index=[0, 0, 1, 1])
    assert controls.majority(evidence).tolist() == [1, 0, 1, 1]


def test_exact_accepts_any_of_the_answers_once_normalised():
    texts = ["The Garden!", "kitchen", "", "A", "“Café”", "3.14"]
    known = [["garden", "yard"], ["hall"], ["a"], ["a", "B"], ["cafe\u0301"], ["314"]]
    evidence = evidence_of([[5]] * 6, [[1]] * 6, texts=texts, answers=known)
    assert controls.exact(evidence).tolist() == [1, 0, 0, 1, 1, 0]


def test_exact_without_answers_names_them():
    evidence = evidence_of([[5], [6]], [[1]] * 2, texts=["a", "b"], answers=[["a"], []])
    with pytest.raises(UserError, match=r"`answers`, and 1 of 2 prompts have none .*\[6\]"):
        controls.exact(evidence)
