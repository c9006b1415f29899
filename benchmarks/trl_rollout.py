"""Seconds a step of TRL's GRPOTrainer with adhere's reward: TRL samples, or adhere does through `rollout_func`.

    python benchmarks/trl_rollout.py [--threads 2] [--steps 3]

Model, prompts and shapes of benchmarks/step.py, K = 8. Two rewards of the same signal, mean attention to the prompt: of
the frozen start, and of the policy in training, which adhere reads while it samples, so that scoring takes no forward.
The ways take turns, a step each; ratios are medians of neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from step import SHAPES, Step, grpo_config, in_turns, prompts, ratio, save_model, stepper

WAYS = {f"{scorer}, {who} samples": (scorer, who) for scorer in ("reference", "policy") for who in ("trl", "adhere")}


def step_of(model: Path, run: Path, shape: tuple[int, int, int], scorer: str, who: str) -> Step:
    from datasets import Dataset
    from trl import GRPOTrainer

    from adhere import Policy
    from adhere.integrations.trl import AttentionReward

    policy = Policy.load(model, device="cpu")
    reward = AttentionReward(policy, {"weights": {"lookback": 1.0}, "normalise": "none", "scorer": scorer}, name=scorer)
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=reward,
        args=grpo_config(run, shape),
        train_dataset=Dataset.from_dict({"prompt": prompts(shape[0], 64)}),
        rollout_func=reward.rollout if who == "adhere" else None,
    )
    return stepper(trainer)


def seconds(shape: tuple[int, int, int], steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model)
        ways = {name: step_of(model, Path(folder, name), shape, *how) for name, how in WAYS.items()}
        taken = in_turns(ways, steps)
    found = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    for scorer in ("reference", "policy"):
        found[f"{scorer}: trl / adhere"] = ratio(taken[f"{scorer}, trl samples"], taken[f"{scorer}, adhere samples"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, help="one shape only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: seconds(shape, options.steps) for name, shape in SHAPES.items() if options.shape in (None, name)}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
