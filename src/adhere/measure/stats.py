"""Intervals and tests over prompts: percentile bootstrap, paired bootstrap, paired permutation test.

The unit is the prompt, always: responses of one prompt are averaged before they come here. Nothing is assumed of the
distribution but that prompts are exchangeable. Where many p-values stand together, `holm` adjusts them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adhere.errors import UserError

Floats = NDArray[np.float64]

# Elements drawn at a time: 16 MB of indices and as much of values, whatever the number of prompts.
CHUNK = 2_000_000
# 2^14 sign patterns cost less than the Monte Carlo run that would replace them.
EXACT_UP_TO = 14


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval."""

    mean: float
    low: float
    high: float
    n: int
    """Prompts that the mean is taken over."""

    def to_json(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def bootstrap(
    values: Sequence[float],
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of `values` [n] (one a prompt) with its percentile bootstrap interval.

    Draw n values with replacement, `resamples` times; the interval runs from the (1 − level)/2 to the
    (1 + level)/2 quantile of the means (Efron & Tibshirani 1993, section 13.3). With fewer than about twenty
    prompts it is too narrow, and with one it is a point: `n` comes along so that nobody overlooks it.

    `clusters` [n]: values with the same mark depend on each other (questions on one passage), so whole clusters are
    drawn, and each mean is over the values in them (Davison & Hinkley 1997, section 3.8).

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0, n=3)

    Raises `UserError`: no values, a value that is not finite, `resamples` < 1, `level` outside (0, 1), or another
    number of clusters.
    """
    sample = _finite(values, "values")
    _check_resamples(resamples)
    if not 0 < level < 1:
        raise UserError(f"level is {level}", fix="set it in (0, 1), for example 0.95")
    if clusters is not None and len(clusters) != len(sample):
        raise UserError(f"{len(sample)} values in {len(clusters)} clusters", fix="name the cluster of each value")
    sums, counts = _by_cluster(sample, clusters)
    size, generator = len(sums), np.random.default_rng(seed)
    means = np.empty(resamples)
    for start, stop in _chunks(resamples, size):
        draws = generator.integers(0, size, size=(stop - start, size), dtype=np.int32)
        means[start:stop] = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sample.mean()), float(low), float(high), len(sample))


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Estimate:
    """Mean of a − b with its interval, prompts drawn as pairs: `a[i]` and `b[i]` [n] belong to the same prompt.

    What the prompts have in common (some are hard for both) cancels, so it is far narrower than two separate intervals.

    Raises `UserError` as `bootstrap` does, and for unequal lengths.
    """
    return bootstrap(_differences(a, b).tolist(), seed, resamples, level)


def permutation_test(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided p-value of "a and b [n] are exchangeable within each prompt", by flipping signs of the differences.

        p = share of sign patterns s ∈ {−1, 1}^n with |Σ s_i d_i| ≥ |Σ d_i|,   d = a − b

    Prompts without a difference cannot change the sum under any flip and are left out first; up to 14 that remain,
    all patterns are counted and p is exact. Beyond, `resamples` patterns are drawn and p = (1 + hits) /
    (1 + resamples), which never is 0 and keeps the test valid (Phipson & Smyth 2010, eq. 2).

    >>> permutation_test([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])  # 2 of the 8 patterns are as far out
    0.25

    Raises `UserError`: no values, unequal lengths, a value that is not finite, `resamples` < 1.
    """
    differences = _differences(a, b)
    _check_resamples(resamples)
    differences = differences[differences != 0]
    size = len(differences)
    if size == 0:
        return 1.0
    # Sums of the same numbers in another order differ in the last bits, and a tie has to count as a tie.
    bar = abs(float(differences.sum())) - 1e-12 * float(np.abs(differences).sum())
    if size <= EXACT_UP_TO:
        patterns = np.arange(2**size)[:, None] >> np.arange(size) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ differences) >= bar))
    generator, hits = np.random.default_rng(seed), 0
    for start, stop in _chunks(resamples, size):
        signs = 2.0 * generator.integers(0, 2, size=(stop - start, size), dtype=np.int8) - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ differences) >= bar))
    return (1 + hits) / (1 + resamples)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, each at least itself, at most 1 (Holm 1979).

    Sorted, p_(i) becomes max over j ≤ i of (m − j + 1) p_(j). Rejecting those below α keeps the chance of any false
    rejection below α, whatever depends on what.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def _by_cluster(sample: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """The sum and the number of the values of each cluster; without clusters, each value is one."""
    if clusters is None:
        return sample, np.ones_like(sample)
    places = {mark: place for place, mark in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[mark] for mark in clusters])
    return np.bincount(index, sample).astype(np.float64), np.bincount(index).astype(np.float64)


def _chunks(resamples: int, size: int) -> list[tuple[int, int]]:
    """Spans that cover `resamples`, each of at most `CHUNK` elements (and of at least one resample)."""
    step = max(1, CHUNK // size)
    return [(start, min(start + step, resamples)) for start in range(0, resamples, step)]


def _differences(a: Sequence[float], b: Sequence[float]) -> Floats:
    if len(a) != len(b):
        raise UserError(f"{len(a)} values against {len(b)}", fix="pair them: one of each for the same prompt")
    return _finite(a, "a") - _finite(b, "b")


def _finite(values: Sequence[float], name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"{name} has shape {array.shape}", fix="give one number a prompt, and at least one prompt")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{name}[{place}] is {array[place]}", fix="leave prompts without a figure out")
    return array


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UserError(f"resamples is {resamples}", fix="set it to 1 or above, for example 10000")
