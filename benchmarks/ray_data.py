"""Throughput of `adhere score --engine ray`: two workers against one, and what a killed worker costs.

    python benchmarks/ray_data.py [--rows 1024] [--rounds 3]

A Llama (384 wide, 6 layers, random weights) scores prompts of 128 tokens with two responses of 32 each, float32 on CPU;
every worker has one torch thread. One worker and two take turns. Rows a second are counted from when every worker has
delivered its first part until the last ones are on their way, so that starting Ray's workers and loading the model are
left out; seconds in all stand beside. Medians over the rounds, the ratio is the median of neighbouring ones. Then one
of two workers is killed, and the lines are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from step import prompts, save_model

from adhere.cli import main as adhere
from adhere.integrations.ray import cluster
from adhere.shards import SUCCESS, ShardedRows

BATCH = 16


@dataclass
class Run:
    """Parts as they came back, each with the time, and seconds in all."""

    parts: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    killed: int = 0
    seconds: float = 0.0

    def rate(self, workers: int) -> float:
        """Rows a second while all workers were at work."""
        pids: set[int] = set()
        first = 0
        while len(pids) < workers:
            pids.add(self.parts[first][1]["pid"])
            first += 1
        busy = self.parts[first - 1 : len(self.parts) - workers]
        return sum(part["rows"] for _, part in busy[1:]) / (busy[-1][0] - busy[0][0])


def score(folder: Path, name: str, workers: int, kill_after: int | None = None) -> Run:
    """Score the rows by so many workers, of which the one that delivers the part `kill_after` is killed."""
    run = Run()
    add = ShardedRows.add

    def add_and_watch(self: ShardedRows, written: dict[str, Any]) -> None:
        add(self, written)
        run.parts.append((time.perf_counter(), written))
        if len(run.parts) == kill_after:
            run.killed = written["pid"]
            os.kill(run.killed, signal.SIGKILL)

    given = ["score", "--model", str(folder / "llama"), "--input", str(folder / "rows.jsonl"), "--device", "cpu"]
    given += ["--output", str(folder / name), "--batch-size", str(BATCH), "--engine", "ray", "--workers", str(workers)]
    began = time.perf_counter()
    ShardedRows.add = add_and_watch  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = adhere([*given, "--quiet"])
    finally:
        ShardedRows.add = add  # type: ignore[method-assign]
    assert code == 0, f"adhere score ended with {code}"
    run.seconds = time.perf_counter() - began
    return run


def lines(folder: Path) -> list[bytes]:
    return [line for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_bytes().splitlines()]


def measure(folder: Path, rounds: int) -> None:
    runs: dict[int, list[Run]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers in runs:
            runs[workers].append(score(folder, f"out-{workers}-{turn}", workers))
            print(f"# round {turn + 1}, {workers} of 2: {runs[workers][-1].rate(workers):.1f} rows/s", flush=True)
    print("\n| workers | rows/s | seconds in all |\n|---|---|---|")
    for workers, each in runs.items():
        rate = statistics.median(run.rate(workers) for run in each)
        print(f"| {workers} | {rate:.1f} | {statistics.median(run.seconds for run in each):.0f} |")
    ratio = statistics.median(two.rate(2) / one.rate(1) for one, two in zip(runs[1], runs[2], strict=True))
    print(f"\ntwo workers against one: {ratio:.2f}×")


def killed(folder: Path) -> None:
    run = score(folder, "out-killed", 2, kill_after=6)
    told = json.loads((folder / "out-killed" / SUCCESS).read_text())
    again = sum(part["attempts"] > 1 for _, part in run.parts)
    same = lines(folder / "out-killed") == lines(folder / "out-2-0")
    print(
        f"worker {run.killed} killed after 6 of {len(run.parts)} parts: {told['rows']} rows, {told['lines']} lines, "
        f"{again} begun again, {run.seconds:.0f} s; {'the same lines as' if same else 'NOT the lines of'} a quiet run"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="an even number")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # Ray would give one worker both cores
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, cluster(cores=2):
        folder = Path(place)
        save_model(folder / "llama")
        asked, said = prompts(128, options.rows // 2), prompts(32, options.rows)
        with (folder / "rows.jsonl").open("w") as file:
            for place, response in enumerate(said):
                file.write(json.dumps({"prompt": asked[place // 2], "response": response}) + "\n")
        measure(folder, options.rounds)
        killed(folder)


if __name__ == "__main__":
    main()
