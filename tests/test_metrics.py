"""Metrics: hand-worked cases with their arithmetic, edges (empty, one token, K = 1, no answers), and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adhere.errors import UserError
from adhere.measure import metrics
from adhere.measure.metrics import METRICS

phrase = st.lists(st.sampled_from(["red", "blue", "car", "bus", "moon", "2"]), max_size=8).map(" ".join)


def test_content_words_are_those_that_are_no_function_words() -> None:
    assert metrics.content_words("Where is the 2nd café? 東京.") == ["2nd", "café", "東", "京"]


def test_exact_match_looks_past_case_articles_and_punctuation() -> None:
    responses = ["The Kitchen.", "the garden", "kitchen garden", "", "x"]
    answers = [["kitchen"], ["hall", "Garden!"], ["kitchen"], ["kitchen"], []]
    assert metrics.exact_match(responses, answers) == [1.0, 1.0, 0.0, 0.0, None]


def test_exact_match_and_faithfulness_look_past_marks_of_any_script() -> None:
    assert metrics.exact_match(["花园。", "“Paris”", "3.14"], [["花园"], ["Paris"], ["314"]]) == [1.0, 1.0, 0.0]
    assert metrics.faithfulness(["它’s"], [["它's"]], ["3.14"]) == [1.0]


def test_f1_counts_characters_where_there_are_no_blanks() -> None:
    # 在花园里 has 4 characters, 花园 2, both shared: 2·2/6 (MLQA's mixed segmentation).
    assert metrics.f1(["在花园里。"], [["花园"]]) == [pytest.approx(4 / 6)]
    assert metrics.f1(["สวน"], [["ในสวน"]]) == [pytest.approx(2 * 3 / 8)]


def test_f1_takes_the_nearest_answer() -> None:
    # "red car" with "red bus": 1 word of 2 and 2: 2·1/4. With "red car park": 2 of 2 and 3: 2·2/5 = 0.8, the nearer.
    assert metrics.f1(["the red car", "red car"], [["red bus"], ["red bus", "red car park"]]) == [0.5, 0.8]
    # Counted words: "a b b" and "b b b" share two b's, 2·2/6. ("a" alone would be an article.)
    assert metrics.f1(["c b b"], [["b b b"]]) == [pytest.approx(4 / 6)]
    assert metrics.f1(["", "", "x"], [["x"], [""], []]) == [0.0, 1.0, None]


def test_rouge_l_follows_the_order_of_words() -> None:
    # Lin 2004, section 3: against "police killed the gunman", "police kill the gunman" keeps 3 of 4 in order (0.75),
    # "the gunman kill police" 2 (0.5).
    references = [["police killed the gunman"]] * 2
    assert metrics.rouge_l(["police kill the gunman", "the gunman kill police"], references) == [0.75, 0.5]
    assert metrics.rouge_l(["a b", "", "a"], [["c", "a x b y"], ["a"], []]) == [pytest.approx(2 * 2 / 6), 0.0, None]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_rouge_l_agrees_with_the_table_of_common_subsequences(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(first) + len(second)) if first and second else 0.0
    assert metrics.rouge_l([" ".join(first)], [[" ".join(second)]]) == [pytest.approx(expected)]


def test_rouge_l_reads_words_of_every_script() -> None:
    # In rouge_score's own tokenizer both are empty.
    assert metrics.rouge_l(["москва река"], [["москва"]]) == [pytest.approx(2 / 3)]


def test_faithfulness_counts_only_responses_that_took_a_side_in_a_conflict() -> None:
    #            right     prior   neither  no conflict  no prior  no answers
    responses = ["garden", "Hall.", "attic", "hall",     "garden", "hall"]  # fmt: skip
    answers = [["garden"], ["garden"], ["garden"], ["hall"], ["garden"], []]
    priors = ["hall", "hall", "hall", "the hall", None, "hall"]
    assert metrics.faithfulness(responses, answers, priors) == [1.0, 0.0, None, None, None, None]
    assert metrics.prior_rate(responses, answers, priors) == [0.0, 1.0, 0.0, None, None, None]


def test_relevance_words_is_the_cosine_of_content_words() -> None:
    # Prompt: red ×2, car ×1; response: red ×1, bus ×1: 2·1 / (√5 · √2) = 2/√10.
    assert metrics.relevance_words(["The red, RED car"], ["a red bus"]) == [pytest.approx(2 / 10**0.5)]
    assert metrics.relevance_words(["red car", "the of", "red"], ["Car red!", "red", ""]) == [
        pytest.approx(1.0),
        0.0,
        0.0,
    ]


def test_overlap_asks_how_much_of_the_response_is_in_the_prompt() -> None:
    # "blue" is not in the prompt, "car" twice is: 2/3; function words do not count.
    assert metrics.overlap(["is the car red?"], ["the car is blue, car"]) == [pytest.approx(2 / 3)]
    assert metrics.overlap(["car", "car"], ["", "the"]) == [0.0, 0.0]


def test_consistency_is_the_mean_over_pairs() -> None:
    # Pairs of ("red car", "red bus", "red car"): 0.5, 1, 0.5.
    assert metrics.consistency([["red car", "red bus", "red car"], ["x", "y"], ["x"], []]) == [
        pytest.approx(2 / 3), 0.0, None, None,
    ]  # fmt: skip


@given(st.lists(phrase, min_size=2, max_size=6))
def test_consistency_counts_every_pair_though_texts_repeat(samples: list[str]) -> None:
    group = samples * 2
    pairs = [metrics.token_f1(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
    assert metrics.consistency([group])[0] == pytest.approx(sum(pairs) / len(pairs))


def test_repetition_is_the_share_of_two_grams_seen_before() -> None:
    # a b a b a: ab ba ab ba → 2 of 4 are new; "the the the the": 1 of 3.
    assert metrics.repetition([list("ababa"), ["the"] * 4, ["a"], []]) == [0.5, pytest.approx(2 / 3), 0.0, 0.0]
    assert metrics.repetition([list("abcab")], n=3) == [0.0]
    assert metrics.repetition([[7, 8, 7, 8]], n=1) == [0.5]  # token ids serve as well


def test_distinct_pools_the_samples_of_a_prompt() -> None:
    # "a b" and "a c": words a b a c → 3 of 4; 2-grams ab, ac → 2 of 2, and none runs across samples.
    groups = [[["a", "b"], ["a", "c"]], [["a"], []], [[], []]]
    assert metrics.distinct(groups, 1) == [0.75, 1.0, None]
    assert metrics.distinct(groups, 2) == [1.0, None, None]


def test_length_counts_tokens() -> None:
    assert metrics.length([["a", "b"], []]) == [2.0, 0.0]


def test_kl_sums_over_the_response() -> None:
    # (−1 + 2) + (−0.5 + 0.25) = 0.75; padding is 0 in both.
    assert metrics.kl([[-1.0, -0.5, 0.0], [-2.0, 0.0, 0.0]], [[-2.0, -0.25, 0.0], [-1.5, 0.0, 0.0]]) == [0.75, -0.5]


@given(phrase, phrase)
def test_pair_figures_are_symmetric_and_whole_on_equal_texts(first: str, second: str) -> None:
    assert metrics.token_f1(first, second) == metrics.token_f1(second, first)
    assert metrics.token_f1(first, first) == 1.0
    assert metrics.relevance_words([first], [second]) == [pytest.approx(metrics.relevance_words([second], [first])[0])]
    assert 0 <= metrics.relevance_words([first], [second])[0] <= 1
    assert metrics.relevance_words([first], [first])[0] == pytest.approx(1.0 if first else 0.0)


@given(st.lists(phrase, min_size=2, max_size=5), st.randoms())
def test_the_order_of_samples_does_not_matter(samples: list[str], random: object) -> None:
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert metrics.consistency([samples])[0] == pytest.approx(metrics.consistency([shuffled])[0])
    tokens = [s.split() for s in samples]
    mixed = [s.split() for s in shuffled]
    assert metrics.distinct([tokens], 2) == metrics.distinct([mixed], 2)


@given(phrase, st.lists(phrase, min_size=1, max_size=3))
def test_an_exact_match_has_full_f1(response: str, answers: list[str]) -> None:
    exact, overlap = metrics.exact_match([response], [answers])[0], metrics.f1([response], [answers])[0]
    assert exact is not None and overlap is not None
    assert exact <= overlap <= 1


def test_unequal_lengths_are_refused_with_both() -> None:
    with pytest.raises(UserError, match="2 entries against 1"):
        metrics.exact_match(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="1 entries against 2"):
        metrics.faithfulness(["a"], [["a"]], ["b", "c"])


def test_every_metric_says_which_way_is_better() -> None:
    assert {m.better for m in METRICS.values()} == {-1, 0, 1}
    assert METRICS["exact_match"].better == 1 and METRICS["repetition"].better == METRICS["prior_rate"].better == -1
    assert len({m.label for m in METRICS.values()}) == len(METRICS)
