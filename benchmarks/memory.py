"""Peak resident memory (Linux): of a piece of work in this process, and of reading, sampling and learning with a model.

    python benchmarks/memory.py --model MODEL [--prompt 256 --response 48 --prompts 2 --samples 8]
    python benchmarks/memory.py --model MODEL --commands ROWS.jsonl

The first measures pieces of work: weights in float32, adapters of rank 16, prompts and responses of as many tokens as
it says. The second runs the commands themselves on rows with `context`, `question` and `answers`, prompts of about as
many tokens, and tells the largest resident set of each (`Maximum resident set size` of `/usr/bin/time -v`) above that
of a process that imports torch and reads the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def peak_mb(work: Callable[[], object]) -> float:
    """MB that `work` adds at its peak to what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    work()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """A figure of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


WEIGHTS_ALONE = """
import sys, torch
from safetensors.torch import load_file
weights = load_file(sys.argv[1])
print(sum(float(w.float().sum()) for w in weights.values()))
"""
ROWS = 16
GAMEABLE = 3


def largest_mb(command: Sequence[str]) -> tuple[float, float]:
    """Largest resident set of a command, MB, and the seconds it took. Raises `SystemExit` where it fails.

    `adhere audit` exits with `GAMEABLE` where its work is done and the verdict is bad.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode not in (0, GAMEABLE):
            raise SystemExit(f"{' '.join(command)} exits with {process.returncode}:\n{said.read()[-3000:]}")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def rows_of(source: Path, model: str, tokens: int) -> list[dict[str, object]]:
    """`ROWS` rows whose prompts come nearest to `tokens` tokens, the context repeated where it is shorter by half."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row = {name: row[name] for name in ("context", "question", "answers")}
        length = len(tokenizer(f"{row['context']} {row['question']}")["input_ids"])
        row["context"] = " ".join([str(row["context"])] * max(1, round(tokens / length)))
        length = len(tokenizer(f"{row['context']} {row['question']}")["input_ids"])
        rows.append((abs(length - tokens), length, row))
    nearest = sorted(rows, key=lambda found: found[0])[:ROWS]
    print(f"prompts of {min(n for _, n, _ in nearest)} to {max(n for _, n, _ in nearest)} tokens, without the template")
    return [row for _, _, row in nearest]


def measure_commands(model: str, source: Path, options: argparse.Namespace) -> dict[str, float]:
    """MB of each command above those of the weights alone."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = rows_of(source, model, options.prompt)
        prompts, pairs = folder / "prompts.jsonl", folder / "pairs.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        answered = [{**row, "response": said} for row in rows for said in (row["answers"][0], "no")]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")
        tokens, samples = str(options.response), str(options.samples)
        given = ["--model", model, "--dtype", "float32"]
        drawn = [*given, "--prompts", prompts, "--num-samples", samples, "--max-new-tokens", tokens]
        train = ["train", *drawn, "--steps", "2", "--prompts-per-step", options.prompts]
        commands: dict[str, list[object]] = {
            "score": [
                "score",
                "--model",
                model,
                "--input",
                pairs,
                "--output",
                folder / "scores.jsonl",
                "--dtype",
                "float32",
            ],
            "rank": ["rank", *drawn, "--output", folder / "ranked.jsonl"],
            "audit": ["audit", *drawn, "--output", folder / "audit"],
            "train --lora": [*train, "--lora", "--output", folder / "lora"],
            "train": [*train, "--output", folder / "full"],
        }
        weights, _ = largest_mb([sys.executable, "-c", WEIGHTS_ALONE, str(Path(model) / "model.safetensors")])
        print(f"{'torch and the weights':<22}   {weights:7.0f} MB", flush=True)
        for label, command in commands.items():
            if options.only and label not in options.only:
                continue
            peak, seconds = largest_mb([sys.executable, "-m", "adhere", *map(str, command)])
            found[label] = round(peak - weights)
            print(f"{label:<22} + {found[label]:7.0f} MB   {seconds:6.0f} s", flush=True)
    return found


def main() -> None:
    """Tell the MB that each piece of work adds to the weights, and its seconds."""
    from adhere.learn.learner import Learner
    from adhere.model.policy import Policy
    from adhere.model.settings import Lora, Sampling
    from adhere.types import Rollout

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name, default in (("prompt", 256), ("response", 48), ("prompts", 2), ("samples", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--commands", type=Path, metavar="ROWS", help="measure the commands on these rows")
    parser.add_argument("--only", nargs="+", help="of the commands, these")
    options = parser.parse_args()
    if options.commands is not None:
        measure_commands(options.model, options.commands, options)
        return
    policy = Policy.load(options.model, dtype="float32", device="cpu", lora=Lora())
    prompts = policy.encode([" ".join(["word"] * options.prompt)] * options.prompts)
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.network.config.get_text_config().vocab_size
    size = options.prompts * options.samples
    response = torch.randint(10, vocabulary, (size, options.response), generator=generator)
    index = torch.arange(options.prompts).repeat_interleave(options.samples)
    given = Rollout(prompts, index, response, torch.ones_like(response).bool(), torch.ones(size).bool(), ("",) * size)
    learner = Learner(policy, value_head=False)
    sampling = Sampling(max_new_tokens=options.response)
    weights = sum(p.numel() * p.element_size() for p in policy.network.parameters()) / 2**20
    print(f"{options.model}: weights {weights:.0f} MB, vocabulary {vocabulary}, {size} x {options.response} tokens")
    # The lightest first: freed memory stays with the process, where the next piece finds it.
    for name, work in (
        ("sample", lambda: policy.sample(prompts, options.samples, sampling=sampling)),
        ("read log-probs alone", lambda: policy.read(given, attention=False, spread=())),
        ("read everything", lambda: policy.read(given)),
        ("learn (LoRA)", lambda: learner(given).logprobs.sum().backward()),
    ):
        start = time.perf_counter()
        peak = peak_mb(work)
        print(f"  {name:<22} + {peak:7.0f} MB   {time.perf_counter() - start:6.1f} s")


if __name__ == "__main__":
    main()
