"""Judge rewards without training: does a reward put right before wrong, by split and kind, and what can it be gamed by?

    python benchmarks/reward_study/rank.py [--rewards attention paper …] [--prompts 200] [--part validation]

One row a reward: share of (right, wrong) pairs of a prompt's own samples in the right order (0.5 = chance), and how
often the worst degenerate family beats the best own sample. Then the nested comparison: a logistic regression on pairs
that knows overlap, coherence, contrast and majority, and the same with the signals that read attention.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from candidates import CANDIDATES
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from adhere.data import Row
from adhere.measure.audit import Verdict, audit
from adhere.measure.settings import AuditConfig
from adhere.measure.stats import Estimate, bootstrap, paired_bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.named import RewardConfig
from adhere.reward.reward import Reward
from adhere.text import is_answer
from adhere.toy import make_rows, model_path

SPLITS = ("agree", "conflict", "novel")
RIVALS = ("overlap", "coherence", "contrast", "majority")
ATTENTIVE = ("comprehensiveness", "grounding", "coverage", "focus")
SAMPLES = 8


def stories(part: str, count: int) -> list[Row]:
    """`count` stories of each split."""
    return [
        Row(prompt=row["prompt"], answers=tuple(row["answers"]), fields=row)
        for split in SPLITS
        for row in make_rows(split, part, count, seed=11)
    ]


def line(name: str, verdict: Verdict) -> str:
    """A row of the table."""
    family, rate = verdict.worst()
    ranks = " | ".join(_shown(verdict.ranking.get(split)) for split in SPLITS)
    return f"| {name} | {ranks} | {family}, {rate:.0%} |"


def by_kind(verdicts: dict[str, Verdict]) -> str:
    """A table of kinds against rewards."""
    kinds = [name for name in next(iter(verdicts.values())).ranking if name not in ("all", *SPLITS)]
    rows = [f"| kind | {' | '.join(verdicts)} |", "|---" * (len(verdicts) + 1) + "|"]
    for kind in sorted(kinds):
        rows.append(f"| {kind} | " + " | ".join(f"{v.ranking[kind].mean:.2f}" for v in verdicts.values()) + " |")
    return "\n".join(rows)


def nested(policy: Policy, rows: Sequence[Row]) -> dict[str, tuple[Estimate, Estimate, Estimate]]:
    """By split and kind: share of pairs ordered rightly by the controls, with attention too, and the difference.

    Cross-validated by prompt (see `fitted`); a figure is over prompts.
    """
    names = (*RIVALS, *ATTENTIVE)
    reward = Reward(RewardConfig(dict.fromkeys(names, 1.0), normalise="none", renormalise=True), policy)
    pairs, owner = [], []
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        prompts = policy.encode([row.prompt for row in part], [row.answers for row in part])
        rollout = policy.sample(prompts, SAMPLES, sampling=Sampling(max_new_tokens=8), seed=start)
        values = torch.stack(list(reward(rollout).signals.values()), 1).numpy()
        for place, row in enumerate(part):
            mine = range(place * SAMPLES, (place + 1) * SAMPLES)
            right = [n for n in mine if is_answer(rollout.responses[n], row.answers)]
            for good in right:
                for bad in set(mine) - set(right):
                    pairs.append(values[good] - values[bad])
                    owner.append(start + place)
    x, groups = np.asarray(pairs), np.asarray(owner)
    hits = {size: fitted(x[:, :size], groups) for size in (len(RIVALS), len(names))}
    out = {}
    for name in ("all", *SPLITS, *sorted({str(row.fields["kind"]) for row in rows})):
        chosen = [
            g for g in np.unique(groups) if name == "all" or name in (rows[g].fields["split"], rows[g].fields["kind"])
        ]
        without, full = ([float(found[groups == g].mean()) for g in chosen] for found in hits.values())
        if chosen:
            out[name] = (bootstrap(without), bootstrap(full), paired_bootstrap(full, without))
    return out


def fitted(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each pair (right less wrong, [pairs, features]) 1 where a logistic regression puts it in order, 0.5 in a tie.

    Cross-validated in five folds of `groups` ([pairs], the prompt of each): no pair is judged by weights that saw its
    prompt.
    """
    found = np.zeros(len(x))
    for train, test in GroupKFold(5, shuffle=True, random_state=0).split(x, groups=groups):
        # A pair and its mirror image: no intercept, and a prompt with many pairs weighs as much as one with few.
        scale = StandardScaler(with_mean=False).fit(x[train])
        known = scale.transform(x[train])
        weight = 1.0 / np.bincount(groups)[groups[train]]
        both, label = np.concatenate([known, -known]), np.repeat([1, 0], len(known))
        model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, label, np.tile(weight, 2))
        margin = model.decision_function(scale.transform(x[test]))
        found[test] = np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)
    return found


def _shown(figure: Estimate | None) -> str:
    return "–" if figure is None else f"{figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--rewards", nargs="*", default=list(CANDIDATES), help="names in candidates.py")
    parser.add_argument("--prompts", type=int, default=200, help="stories of each split")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for kind in options.kinds:
        policy = Policy.load(model_path(kind), device="cpu")
        rows = stories(options.part, options.prompts)
        rewards = {name: Reward.resolve(CANDIDATES[name], policy) for name in options.rewards}
        verdicts = audit(policy, rows, rewards, AuditConfig(max_new_tokens=8, batch_size=50))
        print(f"\n{kind}\n\n| reward | {' | '.join(SPLITS)} | worst family |\n|---|---|---|---|---|")
        print("\n".join(line(name, verdict) for name, verdict in verdicts.items()))
        print("\n" + by_kind(verdicts))
        print("\n| stories | controls | controls and attention | difference |\n|---|---|---|---|")
        for name, figures in nested(policy, rows).items():
            print(f"| {name} | " + " | ".join(map(_shown, figures)) + " |", flush=True)
        found[kind] = {name: verdict.to_json() for name, verdict in verdicts.items()}
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
