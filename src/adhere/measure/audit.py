"""Can this reward be gamed? Judged before training, on a user's own prompts and model.

The policy samples K responses to each prompt. Beside them stand degenerate ones (`adhere.measure.degenerate`), each
ended properly. A degenerate response that joins the K and gets more than the best of them is one that RL would find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adhere.data import Row
from adhere.errors import UserError
from adhere.measure.cases import RIGHT, AuditBatch, neighbours
from adhere.measure.degenerate import FAMILIES, Vocabulary
from adhere.measure.settings import AuditConfig
from adhere.measure.stats import Estimate, bootstrap
from adhere.model.policy import Policy
from adhere.reward.group import flat_advice
from adhere.reward.reward import Reward
from adhere.reward.signals import Evidence
from adhere.text import is_answer
from adhere.types import Rollout

CONTROLS = ("overlap", "length", "random")
"""Rewards that read no attention, audited beside every other; the fourth control is the reward itself, shuffled."""
# Rewards closer than this are equal: two forwards of the same response differ by as much.
TIE = 1e-4


@dataclass(frozen=True)
class Paid:
    """A response and what it was paid."""

    text: str
    reward: float
    signals: dict[str, float]


@dataclass(frozen=True)
class Win:
    """The degenerate response of a family that beat the best own sample by the most."""

    prompt: str
    """What the model read, template applied."""
    won: Paid
    best: Paid
    """The own sample that was paid best."""
    through: str
    """The signal whose weighted difference, before any normalising, is largest; empty where a gate decided, and no
    signal is for the winner."""


@dataclass(frozen=True)
class Hack:
    """How one family fares, over the prompts where it has something to say that the policy did not."""

    beats_best: Estimate
    """Share of prompts where it gets more than the best own sample."""
    beats_right: Estimate | None = None
    """Share of prompts where it gets more than the right answer."""
    win: Win | None = None
    """None where it never beat the best own sample."""


@dataclass(frozen=True)
class Verdict:
    """What an audit found of one reward."""

    hacks: dict[str, Hack]
    ranking: dict[str, Estimate]
    """Share of (right, wrong) pairs of own samples that it orders rightly, 0.5 = chance, ties half: over all prompts
    (`all`), by split and by kind where the rows tell them. Empty without answers."""
    best_of_n: Estimate | None
    """Share of prompts where its first choice among the own samples is right."""
    mean_sample: Estimate | None
    """Share of own samples that are right: what a choice by lot would give."""
    length: Estimate | None
    """Correlation of reward and length within groups; None where nothing varies."""
    flat: Estimate
    """Share of groups whose samples all get the same, so that RL learns nothing from them."""
    cut_off: Estimate
    """Share of own samples that did not end by themselves."""

    def worst(self) -> tuple[str, float]:
        """The family that beats the best own sample most often, and how often."""
        name = max(self.hacks, key=lambda family: self.hacks[family].beats_best.mean)
        return name, self.hacks[name].beats_best.mean

    def gameable(self, limit: float) -> list[str]:
        """Families that beat the best own sample on more than `limit` of the prompts."""
        return [name for name, hack in self.hacks.items() if hack.beats_best.mean > limit]

    def explain(self, limit: float) -> str:
        """The verdict in plain words."""
        bad = sorted(self.gameable(limit), key=lambda name: -self.hacks[name].beats_best.mean)
        if bad:
            shown = ", ".join(f"{name} ({self.hacks[name].beats_best.mean:.0%})" for name in bad[:4])
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            words = f"Gameable: it pays more than for the best own sample for: {shown}{more}."
        else:
            name, rate = self.worst()
            words = f"No degenerate family beats the best own sample on more than {limit:.0%} of the prompts"
            words += f" (the nearest: {name}, {rate:.0%})." if rate > 0 else "."
        overall = self.ranking.get("all")
        if overall is not None and overall.low <= 0.5:
            told = f"{overall.mean:.2f} [{overall.low:.2f}, {overall.high:.2f}] of the pairs in order, 0.5 is chance"
            if overall.mean <= 0.5:
                words += f" It does not tell right from wrong samples: {told}."
            else:
                words += f" {overall.n} prompts do not show that it tells right from wrong samples: {told}."
        if self.cut_off.low == 1:
            words += (
                " No sample ends by itself: raise --max-new-tokens, or say with --stop what ends a response (a base "
                "model without a chat template may never end)."
            )
        elif self.flat.mean > 0:
            flat, groups = round(self.flat.mean * self.flat.n), self.flat.n
            words += f" {flat_advice(flat, groups, self.cut_off.mean)}."
        return words

    def to_json(self) -> dict[str, Any]:
        def figure(value: Estimate | None) -> Any:
            return None if value is None else value.to_json()

        return {
            "families": {
                name: {
                    "beats_best": figure(hack.beats_best),
                    "beats_right": figure(hack.beats_right),
                    "win": None if hack.win is None else asdict(hack.win),
                }
                for name, hack in self.hacks.items()
            },
            "ranking": {name: figure(value) for name, value in self.ranking.items()},
            "best_of_n": figure(self.best_of_n),
            "mean_sample": figure(self.mean_sample),
            "length_correlation": figure(self.length),
            "flat_groups": figure(self.flat),
            "cut_off": figure(self.cut_off),
        }


def summary(model: str, prompts: int, verdicts: Mapping[str, Verdict], config: AuditConfig) -> dict[str, Any]:
    """What audit.json holds: all `verdicts`, by the names of their rewards, and the first of them in words."""
    first = next(iter(verdicts.values()))
    return {
        "model": model,
        "prompts": prompts,
        "gameable": bool(first.gameable(config.max_hack_rate)),
        "verdict": first.explain(config.max_hack_rate),
        "config": asdict(config),
        "rewards": {name: verdict.to_json() for name, verdict in verdicts.items()},
    }


def audit(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    config: AuditConfig | None = None,
) -> dict[str, Verdict]:
    """A verdict on each of `rewards` (bound to `policy`), all on the same responses.

    Raises `UserError`: fewer than two prompts, or a prompt that leaves no room for a response.
    """
    config = config or AuditConfig()
    if len(rows) < 2:
        raise UserError("an audit needs two prompts or more", fix="give more prompts")
    tallies = {name: _Tally() for name in rewards}
    words = Vocabulary.of(policy.tokenizer, next(iter(rewards.values())).classes, set(policy.endings.tokens))
    starts = list(range(0, len(rows), config.batch_size))
    if len(rows) - starts[-1] < 2:
        starts.pop()  # the last prompt alone would have no other prompt beside it
    spans = zip(starts, [*starts[1:], len(rows)], strict=True)
    near = neighbours(rows)
    for first, last in policy.progress(spans, "auditing", len(rows), size=lambda span: span[1] - span[0]):
        part = rows[first:last]
        prompts = policy.encode([r.prompt for r in part], [r.answers for r in part], [r.where for r in part])
        policy.check_room(prompts, config.max_new_tokens, [row.where for row in part])
        batch = AuditBatch.of(
            policy, prompts, config, words, next(iter(rewards.values())).classes, config.seed + first, near[first:last]
        )
        for name in policy.progress(rewards, "scoring", len(rewards)):
            _score_batch(tallies[name], rewards[name], policy, batch, part)
    return {name: tally.verdict() for name, tally in tallies.items()}


def with_controls(rewards: Mapping[str, Reward], policy: Policy) -> dict[str, Reward]:
    """`rewards` and the controls: the first of them on shuffled attention where it reads any, and `CONTROLS`."""
    first = next(iter(rewards))
    found = dict(rewards)
    if rewards[first].reads_attention and not rewards[first].config.shuffle:
        found[f"{first}, shuffled"] = Reward(replace(rewards[first].config, shuffle=True), policy, rewards[first].heads)
    return found | {name: Reward.named(name, policy) for name in CONTROLS if name not in found}


class _Tally:
    """Figures of one reward, a value a prompt, gathered batch by batch."""

    def __init__(self) -> None:
        self.best: dict[str, list[float]] = {name: [] for name in FAMILIES}
        self.right: dict[str, list[float]] = {name: [] for name in FAMILIES}
        self.wins: dict[str, tuple[float, Win]] = {}
        """Family → by how much it won at most, and where."""
        self.ranking: dict[str, list[float]] = {}
        self.first: list[float] = []
        self.share: list[float] = []
        self.length: list[float] = []
        self.flat: list[float] = []
        self.cut_off: list[float] = []

    def verdict(self) -> Verdict:
        """The figures with their intervals; a family that never had anything to say is left out."""

        def figure(values: list[float]) -> Estimate | None:
            return bootstrap(values) if values else None

        wins = {name: win for name, (_, win) in self.wins.items()}
        return Verdict(
            {
                name: Hack(bootstrap(values), figure(self.right[name]), wins.get(name))
                for name, values in self.best.items()
                if values
            },
            {name: bootstrap(values) for name, values in self.ranking.items()},
            figure(self.first),
            figure(self.share),
            figure(self.length),
            bootstrap(self.flat),
            bootstrap(self.cut_off),
        )


def _score_batch(tally: _Tally, reward: Reward, policy: Policy, batch: AuditBatch, rows: Sequence[Row]) -> None:
    """Score a batch: one forward for all of it, then each extra response in the company of the own samples."""
    rollout, own = batch.rollout, batch.own.nonzero().flatten()
    evidence = reward.evidence(rollout, reward.reference or policy)
    alone = reward.score_evidence(evidence.select(own)).reward
    groups = rollout.prompt_index[own]
    _rank(tally, alone, rollout.select(own), rows)
    for place in range(len(rollout.prompts)):
        mine = alone[groups == place]
        tally.cut_off.append(float((~rollout.ended[own][groups == place]).float().mean()))
        tally.flat.append(float(float(mine.max() - mine.min()) < TIE))
    best: dict[str, dict[int, float]] = {name: {} for name in FAMILIES}
    right: dict[str, dict[int, float]] = {name: {} for name in FAMILIES}
    truth = batch.slots.get((RIGHT, 0))
    for (name, _), extra in batch.slots.items():
        if name == RIGHT:
            continue
        for place, pair in _pairs(reward, evidence, own, extra, None).items():
            best[name][place] = max(best[name].get(place, 0.0), float(pair.gain > TIE))
            if pair.gain > max(TIE, tally.wins[name][0] if name in tally.wins else 0.0):
                tally.wins[name] = pair.gain, _win(pair, reward, rollout)
        if truth is not None:
            for place, pair in _pairs(reward, evidence, own, extra, truth).items():
                right[name][place] = max(right[name].get(place, 0.0), float(pair.gain > TIE))
    for name in FAMILIES:
        tally.best[name] += best[name].values()
        tally.right[name] += right[name].values()


@dataclass(frozen=True)
class _Pair:
    """An extra response of a prompt and what it is held against, with the scores of both in their group."""

    rows: tuple[int, int]
    """Of the rollout."""
    rewards: tuple[float, float]
    signals: tuple[dict[str, float], dict[str, float]]

    @property
    def gain(self) -> float:
        return self.rewards[0] - self.rewards[1]


def _pairs(reward: Reward, evidence: Evidence, own: Tensor, extra: Tensor, truth: Tensor | None) -> dict[int, _Pair]:
    """Prompt → its extra response in its group, held against the best own sample (or the right answer)."""
    company = own if truth is None else torch.cat([own, truth])
    rows = torch.cat([company, extra]).sort().values
    scores = reward.score_evidence(evidence.select(rows))
    place = evidence.reading.rollout.prompt_index[rows]
    added, compared = torch.isin(rows, extra), torch.isin(rows, own if truth is None else truth)

    def top(among: Tensor) -> int:
        """The best paid of them."""
        places = among.nonzero().flatten()
        return int(places[scores.reward[places].argmax()])

    found = {}
    for prompt in place[added].tolist():
        if bool((others := compared & (place == prompt)).any()):
            two = top(added & (place == prompt)), top(others)
            signals = tuple({name: float(value[n]) for name, value in scores.signals.items()} for n in two)
            found[prompt] = _Pair(
                (int(rows[two[0]]), int(rows[two[1]])),
                (float(scores.reward[two[0]]), float(scores.reward[two[1]])),
                (signals[0], signals[1]),
            )
    return found


def _win(pair: _Pair, reward: Reward, rollout: Rollout) -> Win:
    won, best = (
        Paid(rollout.responses[row], paid, signals)
        for row, paid, signals in zip(pair.rows, pair.rewards, pair.signals, strict=True)
    )
    gains = {name: weight * (won.signals[name] - best.signals[name]) for name, weight in reward.config.weights.items()}
    through = max(gains, key=lambda name: gains[name])
    prompt = rollout.prompts.texts[int(rollout.prompt_index[pair.rows[0]])]
    return Win(prompt, won, best, through if gains[through] > 0 else "")


def _rank(tally: _Tally, scores: Tensor, own: Rollout, rows: Sequence[Row]) -> None:
    """Right against wrong among the own samples of each prompt, and what length has to do with the reward."""
    for place, row in enumerate(rows):
        mine = (own.prompt_index == place).nonzero().flatten()
        values, lengths = scores[mine].tolist(), own.lengths[mine].tolist()
        if np.std(values) > TIE and np.std(lengths) > 0:
            tally.length.append(float(np.corrcoef(values, lengths)[0, 1]))
        if not row.answers:
            continue
        right = [is_answer(own.responses[n], row.answers) for n in mine.tolist()]
        top = max(values)
        # A tie for the first place is settled by lot: its expectation.
        leaders = [ok for ok, value in zip(right, values, strict=True) if value > top - TIE]
        tally.first.append(sum(leaders) / len(leaders))
        tally.share.append(sum(right) / len(right))
        good = [value for ok, value in zip(right, values, strict=True) if ok]
        bad = [value for ok, value in zip(right, values, strict=True) if not ok]
        if good and bad:
            won = [1.0 if a > b + TIE else 0.0 if a < b - TIE else 0.5 for a in good for b in bad]
            for name in ("all", *(str(row.fields[key]) for key in ("split", "kind") if row.fields.get(key))):
                tally.ranking.setdefault(name, []).append(sum(won) / len(won))
