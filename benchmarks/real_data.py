"""adhere on real data: `eval`, `train`, `eval` on bAbI; `score` on three sets of right and wrong responses.

    python benchmarks/real_model.py --data ../shared/data --output runs/real/base
    python benchmarks/real_data.py --data ../shared/data --base runs/real/base --output runs/real/study

Trains on bAbI prompts (`--prompts`: the rows that real_model.py held out, best; a row's answers are there only for
reward `exact`, the ceiling) and evaluates on its validation rows, or on `--part test`. `score` gives each
FairytaleQA, SQuAD and Self-Instruct row its own right response and the response of another row, and counts how often
the right one gets more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_model import response_of

from adhere.data import read_rows, write_jsonl
from adhere.measure.stats import bootstrap

PAIRED = {"fairytaleqa": "validation", "squad_xquad": "validation", "self_instruct": "train"}
"""Data set → the part whose responses are scored."""
LONGEST = 1800
"""Characters of a prompt and its response: what surely fits the base model's context."""
METRICS = ("exact_match", "f1", "consistency", "repetition", "length", "kl")


def adhere(*arguments: str | Path | int | float) -> dict[str, Any]:
    """Run an adhere command; its JSON document."""
    command = [sys.executable, "-m", "adhere", *map(str, arguments), "--json"]
    print("$ adhere", *map(str, arguments), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train_on_babi(options: argparse.Namespace, reward: str) -> dict[str, Any]:
    """Train with `reward`, and compare with the base model on validation rows."""
    run = options.output / reward
    trained = adhere(
        "train", "--model", options.base, "--prompts", options.prompts or options.data / "babi/train.jsonl",
        "--output", run,
        "--reward", reward, "--steps", options.steps, "--learning-rate", options.learning_rate,
        "--prompts-per-step", 16, "--max-new-tokens", 8, "--seed", options.seed,
    )  # fmt: skip
    found = adhere(
        "eval", "--model", run / "model", "--baseline", options.base,
        "--prompts", options.data / f"babi/{options.part}.jsonl", "--output", run / "eval",
        "--max-new-tokens", 8, "--batch-size", 64,
    )  # fmt: skip
    metrics = {name: result for name, result in found["metrics"].items() if name in METRICS}
    return {"steps": trained["steps"], "stopped": trained["stopped"], "metrics": metrics}


def score_pairs(options: argparse.Namespace, name: str, part: str) -> dict[str, Any]:
    """How often a row's right response is scored above that of another row, by signal; ties count half."""
    rows = [
        row
        for row in read_rows(options.data / name / f"{part}.jsonl")
        if (said := response_of(row)) and len(row.prompt) + len(said) <= LONGEST
    ][: options.pairs]
    pairs = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        pairs += [{"prompt": row.prompt, "response": response_of(which)} for which in (row, other)]
    given, scored = options.output / f"{name}.jsonl", options.output / f"{name}.scored.jsonl"
    write_jsonl(given, pairs)
    adhere("score", "--model", options.base, "--input", given, "--output", scored)
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    values = [{"reward": line["reward"], **line["signals"]} for line in lines]
    wins = {
        signal: bootstrap(
            [_win(a[signal], b[signal]) for a, b in zip(values[::2], values[1::2], strict=True)]
        ).to_json()
        for signal in values[0]
    }
    return {"pairs": len(rows), "right scored above another row's": wins}


def _win(right: float, wrong: float) -> float:
    return 0.5 if right == wrong else float(right > wrong)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", type=Path, required=True, help="model folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not hold them yet")
    parser.add_argument("--prompts", type=Path, help="rows to train on (default: bAbI's training rows)")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--rewards", nargs="*", default=["attention", "exact"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=150, help="rows of each set of pairs; 0 = none")
    options = parser.parse_args(arguments)
    if missing := [name for name in ("babi", *PAIRED) if not (options.data / name).is_dir()]:
        print(f"error: {options.data}: no {', '.join(missing)} there; give the folder with --data", file=sys.stderr)
        raise SystemExit(2)
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {reward: train_on_babi(options, reward) for reward in options.rewards}
    if options.pairs:
        found |= {name: score_pairs(options, name, part) for name, part in PAIRED.items()}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
