"""Bootstrap and permutation test: against enumeration, scipy and a simulation of coverage; edges and errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from adhere.errors import UserError
from adhere.measure import stats
from adhere.measure.stats import Estimate, bootstrap, holm, paired_bootstrap, permutation_test

numbers = st.floats(-100, 100, allow_subnormal=False)


def test_the_interval_of_two_prompts_is_worked_by_hand() -> None:
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4. At level 0.4 the quantiles 0.3 and 0.7
    # both fall on the middle half; at 0.95 they fall on 0 and 1.
    assert bootstrap([0.0, 1.0], level=0.4) == Estimate(0.5, 0.5, 0.5, 2)
    assert bootstrap([0.0, 1.0], level=0.95) == Estimate(0.5, 0.0, 1.0, 2)


def test_the_interval_agrees_with_enumeration_of_all_resamples() -> None:
    values = [0.0, 0.3, 1.0, 2.5, 2.6]
    means = [float(np.mean(draw)) for draw in itertools.product(values, repeat=5)]  # all 3,125, equally likely
    low, high = np.quantile(means, [0.1, 0.9])
    figure = bootstrap(values, seed=1, resamples=60_000, level=0.8)
    assert figure.mean == pytest.approx(1.28)
    # Means lie about 0.01 apart here; the sampling error of a quantile is of that size.
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.02)


def test_the_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    ours = bootstrap(values.tolist(), seed=3, resamples=20_000, level=0.9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_ninety_five_percent_intervals_hold_the_truth_ninety_five_times_in_a_hundred() -> None:
    generator = np.random.default_rng(7)
    held = 0
    for trial in range(400):
        figure = bootstrap(generator.normal(2.0, 3.0, size=60).tolist(), seed=trial, resamples=400)
        held += figure.low <= 2.0 <= figure.high
    # The percentile interval of 60 prompts covers a little under 0.95; three standard errors of 400 trials are 0.033.
    assert 0.90 <= held / 400 <= 0.98


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    generator = np.random.default_rng(5)
    difficulty = generator.normal(0, 10, size=100)
    a = difficulty + 1 + generator.normal(0, 0.1, size=100)
    paired = paired_bootstrap(a.tolist(), difficulty.tolist())
    alone = bootstrap(a.tolist())
    assert 0.9 < paired.low < paired.mean < paired.high < 1.1
    assert alone.high - alone.low > 3.0


@settings(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), numbers, st.integers(0, 5))
def test_the_mean_lies_in_the_interval_and_a_shift_moves_all_three(
    values: list[float], shift: float, seed: int
) -> None:
    figure = bootstrap(values, seed=seed, resamples=2_000)
    slack = 1e-9 * (1 + max(abs(v) for v in values))
    assert min(values) - slack <= figure.low <= figure.high <= max(values) + slack
    moved = bootstrap([v + shift for v in values], seed=seed, resamples=2_000)
    expected = (figure.mean + shift, figure.low + shift, figure.high + shift)
    assert (moved.mean, moved.low, moved.high) == pytest.approx(expected, abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_exchanging_the_sides_turns_the_difference_and_keeps_p(pairs: list[tuple[float, float]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    there, back = paired_bootstrap(a, b, resamples=1_000), paired_bootstrap(b, a, resamples=1_000)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)
    p = permutation_test(a, b, resamples=500)
    assert 0 < p <= 1
    assert p == permutation_test(b, a, resamples=500)


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    whole = bootstrap(values, resamples=1_000), permutation_test(values, [0.0] * 50, resamples=1_000)
    monkeypatch.setattr(stats, "CHUNK", 50 * 8)  # 125 full chunks: the same stream of draws, cut elsewhere
    assert (bootstrap(values, resamples=1_000), permutation_test(values, [0.0] * 50, resamples=1_000)) == whole
    monkeypatch.setattr(stats, "CHUNK", 1)  # less than one resample: still one at a time
    assert bootstrap(values, resamples=300).n == 50
    assert stats._chunks(1_000, 7) == [(i, i + 1) for i in range(1_000)]
    monkeypatch.setattr(stats, "CHUNK", 30)
    assert stats._chunks(7, 10) == [(0, 3), (3, 6), (6, 7)]


def test_p_is_worked_by_hand() -> None:
    # d = (1, 2): sums 3, 1, −1, −3; two of four reach |3|.
    assert permutation_test([1.0, 2.0], [0.0, 0.0]) == 0.5
    # d = (3, −1, −2): |Σd| = 0, every pattern reaches it.
    assert permutation_test([3.0, 0.0, 0.0], [0.0, 1.0, 2.0]) == 1.0
    # Ties leave p alone: d = (1, 1, 1, 0, 0) has 2 of 8 patterns of the three that count.
    assert permutation_test([1.0, 1.0, 1.0, 5.0, 5.0], [0.0, 0.0, 0.0, 5.0, 5.0]) == 0.25
    assert permutation_test([0.5] * 4, [0.5] * 4) == 1.0
    # … and so does any number of them: still 2 of 8, counted and not drawn.
    assert permutation_test([1.0] * 3 + [5.0] * 97, [0.0] * 3 + [5.0] * 97) == 0.25


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_agrees_with_enumeration(differences: list[int]) -> None:
    # Tenths: sums that are equal on paper differ in the last bit, and must still count as reached.
    d = [x / 10 for x in differences]
    reached = [
        abs(sum(s * x for s, x in zip(signs, differences, strict=True))) >= abs(sum(differences))
        for signs in itertools.product([-1, 1], repeat=len(d))
    ]
    assert permutation_test(d, [0.0] * len(d)) == pytest.approx(np.mean(reached), abs=1e-12)


def test_drawn_patterns_agree_with_scipy() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(0.25, 1.0, size=60)
    b = np.zeros(60)
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(3),
    ).pvalue
    assert permutation_test(a.tolist(), b.tolist(), seed=1, resamples=20_000) == pytest.approx(theirs, abs=0.012)


def test_drawn_p_is_never_zero_and_has_the_correction() -> None:
    # 15 equal differences: one pattern in 16,384 reaches the sum, so 99 draws (this seed) reach it never.
    assert permutation_test([1.0] * 15, [0.0] * 15, seed=0, resamples=99) == 1 / 100


def test_p_is_uniform_where_nothing_differs() -> None:
    generator = np.random.default_rng(11)
    small = [
        permutation_test(generator.normal(size=20).tolist(), [0.0] * 20, seed=i, resamples=200) for i in range(400)
    ]
    # 0.05 is the size; three standard errors of 400 trials are 0.033.
    assert 0.015 <= float(np.mean(np.asarray(small) <= 0.05)) <= 0.085


def test_one_prompt_gives_a_point_and_says_so() -> None:
    assert bootstrap([0.25]) == Estimate(0.25, 0.25, 0.25, 1)
    assert bootstrap([0.25]).to_json() == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 1}
    assert permutation_test([1.0], [0.0]) == 1.0


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bootstrap([]), "at least one prompt"),
        (lambda: bootstrap([0.0, float("nan")]), r"values\[1\] is nan"),
        (lambda: bootstrap([1.0], resamples=0), "resamples is 0"),
        (lambda: bootstrap([1.0], level=95), "level is 95"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), "2 values against 1"),
        (lambda: permutation_test([1.0], [float("inf")]), r"b\[0\] is inf"),
        (lambda: permutation_test([1.0], [0.0], resamples=0), "resamples is 0"),
    ],
)
def test_what_cannot_be_computed_is_said(call: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()  # type: ignore[operator]


def test_holm_is_the_hand_worked_case() -> None:
    # Sorted: 0.01·3, 0.03·2, 0.04·1 → 0.03, 0.06, max(0.06, 0.04).
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.4]) == [0.4] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_keeps_the_order_and_lowers_nothing(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    assert [adjusted[place] for place in order] == sorted(adjusted)


def test_clusters_are_drawn_whole() -> None:
    """Two clusters, means 0 and 1 but of unequal size: a draw is one of (0, 0), (0, 1), (1, 1), so a mean is 0,
    3 · 1 / 4, or 1; over values drawn one by one it would seldom be 0 or 1."""
    found = bootstrap([0.0, 1.0, 1.0, 1.0], clusters=["a", "b", "b", "b"])
    assert (found.mean, found.low, found.high, found.n) == (0.75, 0.0, 1.0, 4)
    values = [0.1 * n for n in range(20)]
    assert bootstrap(values, clusters=range(20)) == bootstrap(values)
    wide, narrow = bootstrap(values, clusters=[n // 5 for n in range(20)]), bootstrap(values)
    assert wide.high - wide.low > narrow.high - narrow.low
    with pytest.raises(UserError, match="2 values in 1 clusters"):
        bootstrap([1.0, 2.0], clusters=["a"])
