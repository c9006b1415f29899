"""Seconds a step of TRL's GRPOTrainer with attune's reward: TRL samples, or attune does through `rollout_func`.

    python benchmarks/trl_rollout.py [--threads 2] [--steps 3]

Model, prompts and shapes of benchmarks/step.py, K = 8. Two rewards of the same signal, mean attention to the prompt: of
the frozen start, and of the policy in training, which attune reads while it samples, so that scoring takes no forward.
The ways take turns, a step each; ratios are medians of neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from step import SAMPLES, SHAPES, Step, prompts, save_model, stepper

WAYS = {f"{scorer}, {who} samples": (scorer, who) for scorer in ("reference", "policy") for who in ("trl", "attune")}


def step_of(model: Path, run: Path, shape: tuple[int, int, int], scorer: str, who: str) -> Step:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from attune import Policy
    from attune.integrations.trl import AttentionReward

    length, response, count = shape
    policy = Policy.load(model, device="cpu")
    reward = AttentionReward(policy, {"weights": {"lookback": 1.0}, "normalise": "none", "scorer": scorer}, name=scorer)
    config = GRPOConfig(
        output_dir=str(run), per_device_train_batch_size=count * SAMPLES, num_generations=SAMPLES, beta=0.04,
        max_completion_length=response, learning_rate=1e-6, max_steps=1000, use_cpu=True, report_to=[], bf16=False,
        save_strategy="no", logging_steps=10_000, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(length, 64)}),
        rollout_func=reward.rollout if who == "attune" else None,
    )
    return stepper(trainer)


def seconds(shape: tuple[int, int, int], steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model)
        ways = {name: step_of(model, Path(folder, name), shape, *how) for name, how in WAYS.items()}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(steps + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if step:  # the first step warms up
                    taken[name].append(time.perf_counter() - start)
    found = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    for scorer in ("reference", "policy"):
        pairs = zip(taken[f"{scorer}, trl samples"], taken[f"{scorer}, attune samples"], strict=True)
        found[f"{scorer}: trl / attune"] = round(statistics.median(theirs / ours for theirs, ours in pairs), 2)
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
