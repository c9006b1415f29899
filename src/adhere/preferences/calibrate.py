"""The hybrid: a few human preferences adjust the weights of the signals, and of single heads.

A pair's features are the differences, chosen less rejected, of every signal and (with enough pairs) of every head's
attention to the prompt. A regularised logistic regression on them starts from the default reward, not from nothing: its
margin is one more feature, which the penalty hardly touches, so that with few labels the result is near the default and
moves away from it as the labels say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from adhere.data import Row
from adhere.errors import UserError
from adhere.files import atomic_write
from adhere.measure.stats import Estimate, bootstrap, paired_bootstrap
from adhere.model.policy import Policy
from adhere.prompt import prompt_key
from adhere.reward.heads import CopyHeads
from adhere.reward.named import CALIBRATION_FORMAT, NAMED, RewardConfig
from adhere.reward.reward import Reward
from adhere.row_pairs import sound_pairs

Floats = NDArray[np.float64]
SIGNALS = (
    "coherence",
    "comprehensiveness",
    "reliance",
    "overlap",
    "grounding",
    "coverage",
    "soft_coverage",
    "focus",
    "certainty",
    "entropy",
    "repetition",
)
"""What is weighted: every signal that needs neither answers nor other responses. Not `length`: people often like the
longer one, and a reward that learned this teaches to ramble; it is reported beside, as a control."""
BASE = "attention"
STRENGTHS = (0.003, 0.03, 0.3)
"""Inverse penalties of the regression that cross-validation chooses from."""
TRUST = 10.0
"""How much lighter the penalty is on the margin of the default reward."""
LEAST_SPREAD = 1e-3
"""A feature whose differences are smaller, in its own unit, gets no weight: it would be a huge one, on rounding."""
HEADS_FROM = 100
"""Pairs from which single heads are tried: they are many, and a few pairs fit any of them."""
FOLDS = 5
BATCH = 32


@dataclass(frozen=True)
class Features:
    """What is known of n pairs: differences, chosen less rejected."""

    names: tuple[str, ...]
    """Signals, then heads as "layer.head"."""
    values: Floats
    """[n, F]."""
    base: Floats
    """[n]: margin of the default reward."""
    length: Floats
    """[n]: difference in length, a control that is given no weight."""
    prompts: tuple[str, ...]
    """The prompt of each pair; pairs of one prompt are never on both sides of a cross-validation."""


@dataclass(frozen=True)
class Calibration:
    """Weights in the units of the signals, and how well they do on pairs that they were not fitted to.

    A figure is a mean over prompts (of the mean over the pairs of each): pairs of one prompt resemble each other, and
    counted one by one they would make the intervals too narrow.
    """

    weights: dict[str, float]
    heads: dict[str, float]
    made_for: str
    pairs: int
    accuracy: Estimate
    """Cross-validated share of pairs in order."""
    uncalibrated: Estimate
    """The same of the default reward."""
    gain: Estimate
    """Their difference, prompt by prompt."""
    longer: Estimate
    """Share of pairs whose longer response is the chosen one: far from ½, length alone explains many labels."""

    @property
    def verdict(self) -> str:
        """Whether it was worth the labels, in words."""
        figures = (
            f"{self.accuracy.mean:.2f} of the pairs in order, the uncalibrated reward {self.uncalibrated.mean:.2f}"
        )
        ends = f"difference {self.gain.mean:+.2f} [{self.gain.low:+.2f}, {self.gain.high:+.2f}]"
        if self.gain.low > 0:
            return f"Better than the uncalibrated reward: {figures}; {ends}."
        if self.gain.high < 0:
            return f"Worse than the uncalibrated reward: {figures}; {ends}. Use `{BASE}`."
        return f"{self.pairs} pairs are too few to tell it from the uncalibrated reward: {figures}; {ends}."

    @property
    def figures(self) -> dict[str, Estimate]:
        """The figures by the names that the file and `--json` give them."""
        return {
            "cross_validated": self.accuracy,
            "uncalibrated": self.uncalibrated,
            "difference": self.gain,
            "longer": self.longer,
        }

    def save(self, path: str | Path) -> None:
        """Write it as YAML that `--reward calibrated:PATH` reads."""
        document: dict[str, Any] = {
            "format": CALIBRATION_FORMAT,
            "verdict": self.verdict,
            "pairs": self.pairs,
            "accuracy": {name: figure.to_json() for name, figure in self.figures.items()},
            "reward": self.reward(),
        }
        atomic_write(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))

    def reward(self) -> dict[str, Any]:
        """The reward, as `RewardConfig` takes it."""
        config: dict[str, Any] = {
            "weights": {**self.weights, **({"heads": 1.0} if self.heads else {})},
            "normalise": "none",
            "gates": ["ended"],
            "renormalise": True,
            "made_for": self.made_for,
        }
        return {**config, "head_weights": self.heads} if self.heads else config


def calibrate(
    policy: Policy,
    rows: Sequence[Row],
    seed: int = 0,
    heads: CopyHeads | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Calibration:
    """Fit the weights to `rows` (prompt, chosen, rejected); pairs that teach nothing are left out, and `warn` is told
    (see `adhere.row_pairs`).

    Raises `UserError`: no scikit-learn; fewer than four pairs, or fewer than two prompts, that say anything.
    """
    if find_spec("sklearn") is None:
        raise UserError("calibration needs scikit-learn", fix="pip install 'adhere[calibrate]'")
    sound = sound_pairs(rows, warn)
    if len(sound) < 4 or len({prompt_key(row.prompt) for row in sound}) < 2:
        raise UserError(f"{len(sound)} pairs cannot be cross-validated", fix="give four or more, of several prompts")
    return fit_weights(features_of(policy, sound, heads), policy.kind, seed)


def features_of(policy: Policy, rows: Sequence[Row], heads: CopyHeads | None = None) -> Features:
    """Every feature of every pair; one forward, and one more for each ablated or shortened prompt."""
    read = dict.fromkeys((*SIGNALS, *NAMED[BASE].weights, "length", "heads"), 1.0)
    config = RewardConfig(read, normalise="none", renormalise=True)
    reward = Reward(config, policy, heads)
    default = Reward(NAMED[BASE], policy, reward.heads)
    names, values, base, length = list(SIGNALS), list[Floats](), list[Floats](), list[Floats]()
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    for batch in policy.progress(batches, "reading pairs", len(rows), size=len):
        texts = [str(text) for row in batch for text in (row.chosen, row.rejected)]
        both = [row for row in batch for _ in range(2)]
        rollout = policy.paired([row.prompt for row in both], texts, [row.where for row in both])
        evidence = reward.evidence(rollout, policy)
        found = reward.score_evidence(evidence).signals
        assert evidence.head_mass is not None
        mass = evidence.head_mass.flatten(1)
        layers, count = evidence.head_mass.shape[1:]
        names = [*SIGNALS, *(f"{layer}.{head}" for layer in range(layers) for head in range(count))]
        table = np.column_stack([*(found[name].cpu().numpy() for name in SIGNALS), mass.cpu().numpy()]).astype(float)
        values.append(table[::2] - table[1::2])
        scores = default.score_evidence(evidence).reward.cpu().numpy().astype(float)
        base.append(scores[::2] - scores[1::2])
        words = found["length"].cpu().numpy().astype(float)
        length.append(words[::2] - words[1::2])
    prompts = tuple(str(row.prompt) for row in rows)
    return Features(tuple(names), np.concatenate(values), np.concatenate(base), np.concatenate(length), prompts)


def fit_weights(features: Features, made_for: str, seed: int = 0) -> Calibration:
    """The weights, with the penalty and the feature set that cross-validation prefers; the accuracy that is reported is
    that of an outer cross-validation, in which every fold chooses anew."""
    from sklearn.model_selection import GroupKFold

    groups = np.unique(np.asarray(features.prompts), return_inverse=True)[1]
    folds = GroupKFold(min(FOLDS, len(set(groups.tolist()))), shuffle=True, random_state=seed)
    margins = np.zeros(len(groups))
    for known, fresh in folds.split(features.values, groups=groups):
        weights, scale = _chosen(features, known, groups[known], seed)
        margins[fresh] = features.values[fresh] @ weights + scale * features.base[fresh]
    weights, scale = _chosen(features, np.arange(len(groups)), groups, seed)
    default = NAMED[BASE].weights
    named = dict(zip(features.names, weights.tolist(), strict=True))
    own = {name: named[name] + scale * default.get(name, 0.0) for name in SIGNALS}
    heads = {name: weight for name, weight in named.items() if name not in SIGNALS and weight != 0.0}
    right, before, longer = (_by_prompt(_in_order(each), groups) for each in (margins, features.base, features.length))
    return Calibration(
        {name: weight for name, weight in own.items() if weight != 0.0},
        heads,
        made_for,
        len(groups),
        bootstrap(right),
        bootstrap(before),
        paired_bootstrap(right, before),
        bootstrap(longer),
    )


def _chosen(features: Features, places: NDArray[Any], groups: NDArray[Any], seed: int) -> tuple[Floats, float]:
    """Weights [F] and the scale of the default reward, fitted to the pairs at `places` with the options that a
    cross-validation among them prefers by log-loss."""
    from sklearn.model_selection import GroupKFold

    sizes = [len(SIGNALS), len(features.names)] if len(features.base) >= HEADS_FROM else [len(SIGNALS)]
    options = [(size, strength) for size in sizes for strength in STRENGTHS]
    if len(set(groups.tolist())) < FOLDS:
        return _regression(features, places, *options[0])
    losses = np.zeros(len(options))
    for known, fresh in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(places, groups=groups):
        for number, (size, strength) in enumerate(options):
            weights, scale = _regression(features, places[known], size, strength)
            margin = features.values[places[fresh]] @ weights + scale * features.base[places[fresh]]
            losses[number] += np.logaddexp(0.0, -margin).sum()
    return _regression(features, places, *options[int(losses.argmin())])


def _regression(features: Features, places: NDArray[Any], size: int, strength: float) -> tuple[Floats, float]:
    """Logistic regression of the first `size` features and the default margin, without intercept: [F], scalar."""
    from sklearn.linear_model import LogisticRegression

    table = np.column_stack([features.base, features.values[:, :size]])[places]
    spread = np.sqrt((table**2).mean(0))
    unit = np.where(spread > LEAST_SPREAD, spread, np.inf)
    unit[0] /= TRUST
    both = np.concatenate([table, -table]) / unit
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    found = model.fit(both, np.repeat([1, 0], len(table))).coef_[0] / unit
    weights = np.zeros(features.values.shape[1])
    weights[:size] = found[1:]
    return weights, float(found[0])


def _in_order(margins: Floats) -> Floats:
    """[n]: 1 where the chosen response is ahead, ½ for a tie."""
    return np.where(np.abs(margins) < 1e-9, 0.5, margins > 0)


def _by_prompt(values: Floats, groups: NDArray[Any]) -> list[float]:
    """Mean of the values [n] of each group."""
    means: list[float] = (np.bincount(groups, values) / np.bincount(groups)).tolist()
    return means
