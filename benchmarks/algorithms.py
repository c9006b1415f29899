"""Does every algorithm raise the reward it is given on both embedded models, and what does an exact reward buy?

    python benchmarks/algorithms.py [--steps 100] [--only causal/grpo …]

Reward `exact` (or another), prompts of the `conflict` and `agree` training stories. Printed for each run: mean reward
over the first and the last five steps, and on fresh validation stories, before and after: greedy exact match (`greedy`)
and the share of samples that are right (`sampled`: with reward `exact`, the reward itself), each with the paired
bootstrap 95 % interval of the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from attune.data import Row
from attune.learn.algorithms import ALGORITHMS
from attune.learn.settings import TrainConfig
from attune.learn.train import train
from attune.measure.stats import bootstrap, paired_bootstrap
from attune.model.policy import Policy
from attune.model.sampling import Sampling
from attune.world import make_rows, model_path

SPLITS = ("agree", "conflict")
SAMPLES = 8


def exact_match(policy: Policy, split: str, count: int) -> dict[str, list[float]]:
    """For each validation story of `split`: 1 where the greedy answer is right, and the share of samples that are."""
    rows = make_rows(split, "validation", count, seed=7)
    prompts = policy.encode([row["prompt"] for row in rows])
    found = {}
    for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", SAMPLES, 1.0)):
        said = policy.sample(prompts, samples, sampling=Sampling(temperature=temperature, max_new_tokens=8)).responses
        right = [text.strip() == rows[i // samples]["answers"][0] for i, text in enumerate(said)]
        found[name] = [statistics.fmean(right[i : i + samples]) for i in range(0, len(right), samples)]
    return found


def run(kind: str, algorithm: str, steps: int, count: int, reward: Any, rate: float) -> dict[str, object]:
    """One training run and its figures."""
    policy = Policy.load(model_path(kind), device="cpu")
    rows = [
        Row(prompt=row["prompt"], answers=tuple(row["answers"]))
        for split in SPLITS
        for row in make_rows(split, "train", 1500, seed=7)
    ]
    before = {split: exact_match(policy, split, count) for split in SPLITS}
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model_path(kind)),
            prompts="",
            output=folder,
            reward=reward,
            algorithm=ALGORITHMS[algorithm](),
            steps=steps,
            prompts_per_step=32,
            sampling=Sampling(max_new_tokens=8),
            learning_rate=rate,
            save_every=steps,
            device="cpu",
        )
        train(config, policy, rows, Path(folder), on_step=lambda metrics: rewards.append(metrics["reward"]))
    after = {split: exact_match(policy, split, count) for split in SPLITS}
    return {
        "reward_first_5": round(statistics.fmean(rewards[:5]), 3),
        "reward_last_5": round(statistics.fmean(rewards[-5:]), 3),
        **{
            f"{split} {name}": {
                "before": bootstrap(before[split][name]).to_json(),
                "after": bootstrap(after[split][name]).to_json(),
                "difference": paired_bootstrap(after[split][name], before[split][name]).to_json(),
            }
            for split in SPLITS
            for name in before[split]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1000, help="validation stories of each split")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="runs such as causal/grpo")
    parser.add_argument("--reward", default="exact", help='a reward\'s name, or JSON such as {"weights": {…}}')
    options = parser.parse_args()
    reward = json.loads(options.reward) if options.reward.startswith("{") else options.reward
    torch.set_num_threads(options.threads)
    for kind in ("causal", "encdec"):
        for algorithm in ALGORITHMS:
            name = f"{kind}/{algorithm}"
            if options.only is None or name in options.only:
                found = run(kind, algorithm, options.steps, options.prompts, reward, options.learning_rate)
                print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
