"""Best of n without labels: what a reward's choice among the model's own samples is worth, against its controls.

    python benchmarks/best_of_n.py [--models causal encdec] [--split conflict] [--prompts 500] [--seed 0]

Embedded models, test stories. Every arm chooses among the same samples of the same prompts; a figure is the exact match
of the choice with a 95 % bootstrap interval over prompts, a difference is paired. "A random sample" is the mean over a
prompt's samples (what choosing blindly gives), "any right" the best that a choice could be.
"""

from __future__ import annotations

import argparse

from adhere.data import Row
from adhere.measure.stats import bootstrap, paired_bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.ranking import Ranked, rank, sampled_candidates
from adhere.ranking_settings import RankConfig
from adhere.reward.named import RewardConfig, config_of
from adhere.reward.reward import Reward
from adhere.text import is_answer
from adhere.toy import make_rows, model_path

CONFIDENCE = RewardConfig({"coherence": 1.0}, normalise="none", gates=("ended",))
ARMS = {
    "`attention`": config_of("attention"),
    "log-prob": CONFIDENCE,
    "`overlap`": config_of("overlap"),
    "`shuffled`": config_of("shuffled"),
    "`majority`": config_of("majority"),
}


def right(ranked: Ranked) -> list[float]:
    """1 where a candidate is an accepted answer, best first."""
    return [float(is_answer(one["response"], ranked.row.answers)) for one in ranked.candidates]


def measure(policy: Policy, rows: list[Row], config: RankConfig) -> dict[str, list[float]]:
    """By arm, one figure a prompt."""
    found: dict[str, list[float]] = {}
    hits: list[list[float]] = []
    for name, spec in ARMS.items():
        reward = Reward(spec, policy)
        hits = [
            right(ranked)
            for batch in rank(reward, rows, config, sampled_candidates(policy, config))
            for ranked in batch
        ]
        found[name] = [one[0] for one in hits]
    found["a random sample"] = [sum(one) / len(one) for one in hits]
    found["any right"] = [max(one) for one in hits]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["causal", "encdec"], choices=("causal", "encdec"))
    parser.add_argument("--split", default="conflict", choices=("agree", "conflict", "novel"))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [
        Row(prompt=row["prompt"], answers=tuple(row["answers"]), fields=row)
        for row in make_rows(options.split, "test", options.prompts)
    ]
    config = RankConfig(
        num_samples=options.num_samples, batch_size=32, seed=options.seed, sampling=Sampling(max_new_tokens=8)
    )
    print(f"| model | best of {options.num_samples} by | exact match | `attention` minus it |\n|---|---|---|---|")
    for model in options.models:
        values = measure(Policy.load(model_path(model), device="cpu"), rows, config)
        for name, figures in values.items():
            own = bootstrap(figures)
            line = f"| {model} | {name} | {own.mean:.3f} [{own.low:.3f}, {own.high:.3f}] |"
            if name == next(iter(ARMS)):
                print(f"{line} |")
                continue
            gap = paired_bootstrap(values["`attention`"], figures)
            print(f"{line} {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] |")


if __name__ == "__main__":
    main()
