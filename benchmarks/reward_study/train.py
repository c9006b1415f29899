"""Judge rewards and algorithms by training the embedded models: exact match on fresh stories before and after.

    python benchmarks/reward_study/train.py --rewards attention exact overlap --seeds 0 1 2
    python benchmarks/reward_study/train.py --rewards exact --algorithms ppo reinforce rloo grpo dpo

    python benchmarks/reward_study/train.py --rewards attention --steps 500 --measure-every 50
    python benchmarks/reward_study/train.py --rewards attention --steps 60 --rounds 4

Prompts are `agree` and `conflict` training stories, without their answers (but for reward `exact`). Prints a table:
greedy exact match and the share of samples that are right, averaged over seeds prompt by prompt, with the paired
bootstrap 95 % interval over prompts; then `attention` against every other reward of the run. A round starts from the
model of the round before, which is its new reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from candidates import CANDIDATES

from adhere.data import Row
from adhere.learn.settings import DPO, Algorithm, TrainConfig
from adhere.learn.train import train
from adhere.measure.stats import Estimate, paired_bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.toy import make_rows, model_path

SPLITS = ("agree", "conflict")
SAMPLES = 8
RESPONSE_TOKENS = 8
ALGORITHMS: dict[str, Callable[[], Algorithm]] = {cls.name: cls for cls in get_args(Algorithm)}
FRESH = {"validation": 7, "test": 23}
"""Seed of the fresh stories of each part."""
MEASURES = ("conflict greedy", "conflict sampled", "agree greedy", "agree sampled")


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    kind: str
    algorithm: str
    reward: str
    seed: int
    steps: int
    learning_rate: float
    kl_coef: float
    part: str
    prompts: int
    rounds: int = 1
    measure_every: int = 0
    num_samples: int = 8


def measured(policy: Policy, run: Run) -> dict[str, list[float]]:
    """For each fresh story of each split: 1 where the greedy answer is right, the share of samples that are right, and
    the length of the greedy answer in tokens."""
    found = {}
    for split in SPLITS:
        rows = make_rows(split, run.part, run.prompts, seed=FRESH[run.part])
        prompts = policy.encode([row["prompt"] for row in rows])
        for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", SAMPLES, 1.0)):
            sampling = Sampling(temperature=temperature, max_new_tokens=RESPONSE_TOKENS)
            rollout = policy.sample(prompts, samples, sampling=sampling)
            right = [text.strip() == rows[i // samples]["answers"][0] for i, text in enumerate(rollout.responses)]
            found[f"{split} {name}"] = [statistics.fmean(right[i : i + samples]) for i in range(0, len(right), samples)]
            if name == "greedy":
                found[f"{split} length"] = rollout.lengths.float().tolist()
    return found


def algorithm_of(run: Run) -> Algorithm:
    """The algorithm that a run names, with its KL coefficient where it takes one."""
    made = ALGORITHMS[run.algorithm]()
    return made if isinstance(made, DPO) else replace(made, kl_coef=run.kl_coef)


def perform(run: Run) -> tuple[Run, dict[str, Any]]:
    """Train, and measure before and after."""
    torch.set_num_threads(1)
    policy = Policy.load(model_path(run.kind), device="cpu")
    answers = CANDIDATES[run.reward] == "exact"
    rows = [
        Row(prompt=row["prompt"], answers=tuple(row["answers"]) if answers else ())
        for split in SPLITS
        for row in make_rows(split, "train", 1500, seed=7)
    ]
    before = measured(policy, run)
    history: list[dict[str, float]] = []
    path: list[dict[str, float]] = []
    trained = None

    def note(row: dict[str, float]) -> None:
        history.append(dict(row))
        if run.measure_every and len(history) % run.measure_every == 0:
            path.append({"step": len(history), "kl": row["kl"], **means(measured(policy, run))})

    for number in range(run.rounds):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                model=str(model_path(run.kind)),
                prompts="",
                output=folder,
                reward=CANDIDATES[run.reward],
                algorithm=algorithm_of(run),
                steps=run.steps,
                prompts_per_step=32,
                num_samples=run.num_samples,
                sampling=Sampling(max_new_tokens=RESPONSE_TOKENS),
                learning_rate=run.learning_rate,
                seed=run.rounds * run.seed + number,
                save_every=run.steps,
                device="cpu",
            )
            trained = train(config, policy, rows, Path(folder), on_step=note)
    assert trained is not None, "no round"
    last = history[-5:]
    return run, {
        "stopped": trained.stopped,
        "steps_done": len(history),
        "mean_reward": [statistics.fmean(row["reward"] for row in rows) for rows in (history[:5], last)],
        "kl": statistics.fmean(row["kl"] for row in last),
        "curve": [round(row["reward"], 4) for row in history],
        "path": path,
        "before": before,
        "after": measured(policy, run),
    }


def means(found: dict[str, list[float]]) -> dict[str, float]:
    """Averages over stories."""
    return {name: round(statistics.fmean(values), 4) for name, values in found.items()}


def earlier(line: str) -> tuple[Run, dict[str, Any]]:
    """A run as `--output` wrote it."""
    row = json.loads(line)
    names = [field.name for field in fields(Run) if field.name in row]
    return Run(**{name: row[name] for name in names}), {name: row[name] for name in row if name not in names}


def table(results: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    """One row a model, algorithm and reward: figures averaged over seeds."""
    lines = [
        "| model | algorithm | reward | conflict greedy | conflict sampled | agree greedy | agree sampled | length"
        " | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((run.kind, run.algorithm, run.reward) for run, _ in results)
    for key in keys:
        mine = [found for run, found in results if (run.kind, run.algorithm, run.reward) == key]
        cells = [change(mine, name) for name in MEASURES]
        lengths = [[statistics.fmean(found[when]["conflict length"]) for found in mine] for when in ("before", "after")]
        cells.append(f"{statistics.fmean(lengths[0]):.2f} → {statistics.fmean(lengths[1]):.2f}")
        stops = sum(found["stopped"] is not None for found in mine)
        cells.append(f"{statistics.fmean(f['kl'] for f in mine):.2f}" + (f" ({stops} stopped)" if stops else ""))
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def change(found: Sequence[dict[str, Any]], name: str) -> str:
    """Before → after, and the difference with its interval, each prompt averaged over seeds."""
    before, after = over_seeds(found, "before", name), over_seeds(found, "after", name)
    return f"{statistics.fmean(before):.3f} → {statistics.fmean(after):.3f}: {shown(paired_bootstrap(after, before))}"


def against(results: Sequence[tuple[Run, dict[str, Any]]], mine: str = "attention") -> str:
    """What `mine` has over each other reward after training, prompt by prompt."""
    lines = [f"| model | `{mine}` less | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 2) + "|"]
    for kind in dict.fromkeys(run.kind for run, _ in results):
        by_reward: dict[str, list[dict[str, Any]]] = {}
        for run, found in results:
            if run.kind == kind:
                by_reward.setdefault(run.reward, []).append(found)
        for reward in by_reward:
            if reward != mine and mine in by_reward:
                gaps = [
                    shown(paired_bootstrap(*(over_seeds(by_reward[name], "after", measure) for name in (mine, reward))))
                    for measure in MEASURES
                ]
                lines.append(f"| {kind} | {reward} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def over_seeds(found: Sequence[dict[str, Any]], when: str, name: str) -> list[float]:
    """Each story's figure, averaged over the runs."""
    return [statistics.fmean(values) for values in zip(*(f[when][name] for f in found), strict=True)]


def shown(gain: Estimate) -> str:
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--algorithms", nargs="*", default=["grpo"])
    parser.add_argument("--rewards", nargs="*", default=["attention", "exact"], help="names in candidates.py")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--kl-coef", type=float, default=0.04)
    parser.add_argument("--num-samples", type=int, default=8, help="responses to each prompt in training")
    parser.add_argument("--prompts", type=int, default=1000, help="fresh stories of each split")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--rounds", type=int, default=1, help="each with the model of the last one as its reference")
    parser.add_argument("--measure-every", type=int, default=0, help="steps between measurements on the way")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--add", nargs="*", type=Path, default=[], help="files of earlier runs, to stand beside these")
    parser.add_argument("--output", type=Path, help="JSON Lines file for the figures of each run")
    options = parser.parse_args()
    runs = [
        Run(kind, algorithm, reward, seed, options.steps, options.learning_rate, options.kl_coef, options.part,
            options.prompts, options.rounds, options.measure_every, options.num_samples)
        for reward, algorithm, seed, kind in product(
            options.rewards, options.algorithms, options.seeds, options.kinds
        )
    ]  # fmt: skip
    results = [earlier(line) for path in options.add for line in path.read_text().splitlines()]
    # Processes are spawned: a fork would copy the threads' locks of a library that has already started some.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for run, found in pool.map(perform, runs):
            results.append((run, found))
            print(f"{run.kind} {run.algorithm} {run.reward} seed {run.seed} done", file=sys.stderr, flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps({**vars(run), **found}) + "\n")
    print(f"{table(results)}\n\n{against(results)}")
    for run, found in results:
        for row in found["path"]:
            print(run.kind, run.reward, *(f"{name} {value:.3f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
