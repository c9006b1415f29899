"""Throughput and latency of `adhere serve` under 1, 8 and 32 clients, against the same pairs scored offline.

    python benchmarks/serve.py [--pairs 256] [--rounds 3]

A request holds one prompt and one response; every client keeps one connection and asks again as soon as it has its
answer. Offline: `score_groups` on the same pairs in batches of 64, the batch size of the server, in a process of its
own. Model and clients have one core each (one torch thread). The two take turns; rates are medians over the rounds,
the ratio is the median of neighbouring ones, latencies are of all rounds together.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from step import prompts, save_model

from adhere.model.policy import Policy
from adhere.ranking import Group, score_groups
from adhere.reward.heads import load_heads, measure_on_answers, save_heads
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.serve.config import ServeConfig
from adhere.toy import make_rows, model_path

CLIENTS = (1, 8, 32)
Pairs = list[tuple[str, str]]


def pairs_of(name: str, count: int) -> Pairs:
    if name == "embedded":
        rows = make_rows("conflict", "train", count)
        return [(row["prompt"], row["answers"][0]) for row in rows]
    return list(zip(prompts(128, count), prompts(32, count), strict=True))


def measure_heads(model: Path, folder: Path, pairs: Pairs) -> None:
    policy = Policy.load(model, device="cpu")
    save_heads(folder, measure_on_answers(policy, policy.encode([prompt for prompt, _ in pairs[:32]])))


def offline(model: Path, heads: Path, pairs: Pairs, line: Any) -> None:
    """Scores all pairs whenever it is asked to, and says how many seconds that took."""
    torch.set_num_threads(1)
    policy = Policy.load(model, device="cpu")
    reward = Reward(config_of("attention"), policy, load_heads(heads))
    size = ServeConfig().batch_size
    groups = [Group(prompt, [response], [True]) for prompt, response in pairs]
    while line.recv():
        began = time.perf_counter()
        for first in range(0, len(groups), size):
            score_groups(reward, groups[first : first + size])
        line.send(time.perf_counter() - began)


@contextmanager
def server(model: Path, heads: Path) -> Iterator[str]:
    given = ["--model", str(model), "--heads", str(heads), "--port", "0", "--device", "cpu", "--json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "adhere", "serve", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert running.stdout is not None
    try:
        yield json.loads("".join(iter(running.stdout.readline, "}\n")) + "}")["url"]
    finally:
        running.terminate()
        running.wait()


def load(url: str, bodies: list[bytes], clients: int) -> tuple[float, list[float]]:
    """Seconds until all requests are answered by so many clients, and the seconds of each."""
    address = urlsplit(url).netloc
    seconds: list[float] = []
    waiting = iter(bodies)
    lock = threading.Lock()

    def client() -> None:
        line = http.client.HTTPConnection(address, timeout=120)
        while True:
            with lock:
                body = next(waiting, None)
            if body is None:
                return line.close()
            began = time.perf_counter()
            line.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
            with line.getresponse() as reply:
                answer = reply.read()
            seconds.append(time.perf_counter() - began)
            assert reply.status == 200, answer

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, seconds


def measure(name: str, model: Path, count: int, rounds: int, folder: Path) -> None:
    pairs = pairs_of(name, count)
    heads = folder / f"heads-{name}"
    heads.mkdir()
    measure_heads(model, heads, pairs)
    bodies = [json.dumps({"items": [{"prompt": p, "response": r}]}).encode() for p, r in pairs]
    line, other = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=offline, args=(model, heads, pairs, other))
    worker.start()
    alone: list[float] = []
    served: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    latency: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    with server(model, heads) as url:
        for turn in range(rounds + 1):
            for clients in CLIENTS:
                few = bodies if clients > 1 else bodies[: max(16, count // 8)]
                took, each = load(url, few, clients)
                line.send(True)
                batch = line.recv()
                if turn:  # the first round warms both up
                    served[clients].append(len(few) / took)
                    latency[clients] += each
                    alone.append(count / batch)
    line.send(False)
    worker.join()
    print(f"\n{name}: {statistics.median(alone):.0f} pairs/s offline, batches of {ServeConfig().batch_size}\n")
    print("| clients | requests/s | of offline | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|")
    for place, clients in enumerate(CLIENTS):
        ratio = statistics.median(s / a for s, a in zip(served[clients], alone[place :: len(CLIENTS)], strict=True))
        cuts = statistics.quantiles(latency[clients], n=100)
        times = " | ".join(f"{1000 * cuts[n - 1]:.0f}" for n in (50, 95, 99))
        print(f"| {clients} | {statistics.median(served[clients]):.0f} | {ratio:.0%} | {times} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder / "llama")
        measure("Llama 384-d, 128 + 32 tokens", folder / "llama", options.pairs, options.rounds, folder)
        measure("embedded", model_path("causal"), options.pairs, options.rounds, folder)


if __name__ == "__main__":
    main()
