"""The degenerate families on a hand-made case: each says what its name promises, whatever the prompt."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adhere.measure.degenerate import FAMILIES, TRUNCATIONS, Case, Vocabulary
from adhere.reward.salience import token_classes
from tests.families import tokenizer

WORDS = Vocabulary(
    frozenset(range(10, 90)), (1, 2, 3), (95, 96), {**dict.fromkeys(range(10, 80), "LATIN"), 85: "GREEK"}
)
CASE = Case(
    prompt=[10, 1, 11, 4, 12, 1, 13, 4, 2, 12, 5],
    question=[2, 12],
    sentence=[10, 1, 11, 4],
    sample=[13, 1, 14],
    logprobs=[-0.1, -0.2, -3.0],
    other=[20],
    ungrounded=[21, 22],
    distractors=[[11], [12, 4]],
    examples=[[30]],
)


def said(name: str, case: Case = CASE, seed: int = 0) -> list[list[int]]:
    return FAMILIES[name](case, WORDS, random.Random(seed))


def test_what_each_family_says_by_hand() -> None:
    assert said("empty") == [[]]
    assert said("truncated") == [[13], [13, 1]]
    assert said("one token repeated") == [[13] * 6]
    assert said("n-gram loop") == [[13, 1, 14] * 3]
    assert said("prompt copied") == [CASE.prompt]
    assert said("first sentence copied") == [[10, 1, 11, 4]]
    assert said("keywords stuffed") == [[10, 11, 13, 12]]  # 12 stands twice, so it comes last
    assert said("question echoed") == [[2, 12]]
    assert said("another prompt's answer") == [[20]]
    assert said("another question's answer") == [[11], [12, 4]]
    assert said("an example's answer") == [[30]]
    assert said("unsupported addition") == [[13, 1, 14, 20]]
    assert said("risky token dropped") == [[13, 1]]
    assert said("fluent, ungrounded") == [[21, 22]]
    assert said("another script") == [[85, 85, 85]]


def test_the_random_families_keep_to_their_material() -> None:
    for seed in range(20):
        assert set(said("function words", seed=seed)[0]) <= {1, 2}
        assert set(said("template tokens", seed=seed)[0]) <= {95, 96}
        (span,) = said("random span copied", seed=seed)
        assert any(CASE.prompt[i : i + len(span)] == span for i in range(len(CASE.prompt)))
        (padded,) = said("padded", seed=seed)
        assert padded[:3] == CASE.sample and set(padded[3:]) <= {10, 11, 12, 13} and len(padded) >= 7
        (swapped,) = said("entity swapped", seed=seed)
        assert swapped[0] in {10, 11, 12} and swapped[1:] == [1, 14]
        assert sorted(said("words shuffled", seed=seed)[0]) == sorted(CASE.sample)


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
def test_any_case_can_be_answered(name: str, data: st.DataObject) -> None:
    """No family fails on an odd prompt or sample, all its tokens come from somewhere, and a seed names what it says."""
    ids = st.lists(st.integers(1, 96), max_size=12)
    sample = data.draw(ids)
    case = Case(
        data.draw(ids.filter(len)), data.draw(ids), data.draw(ids), sample, [-1.0] * len(sample), data.draw(ids),
        data.draw(ids),
    )  # fmt: skip
    found = said(name, case)
    assert found == said(name, case)
    known = {*case.prompt, *case.question, *case.sentence, *sample, *case.other, *case.ungrounded, 1, 2, 3, 85, 95, 96}
    assert all(set(response) <= known for response in found)
    assert len(found) <= TRUNCATIONS


def test_a_long_sample_is_cut_at_evenly_spread_points() -> None:
    case = Case([10], [], [], list(range(10, 50)), [-1.0] * 40, [], [])
    cuts = [len(response) for response in said("truncated", case)]
    assert cuts[0] == 1 and len(cuts) <= TRUNCATIONS and len({b - a for a, b in itertools.pairwise(cuts)}) == 1


def test_a_vocabulary_is_read_from_a_tokenizer() -> None:
    known = tokenizer()
    words = Vocabulary.of(known, token_classes(known), {known.eos_token_id})
    assert known.eos_token_id not in words.special and known.pad_token_id not in words.special
    assert known.bos_token_id in words.special
    assert {known.convert_tokens_to_ids(word) for word in ("w1", "w2")} <= words.content
    assert known.convert_tokens_to_ids("the") in words.function
    assert set(words.script.values()) == {"LATIN"}
