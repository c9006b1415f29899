"""What capturing attention costs: a reading with capture against the same reading without, beside eager attention.

    python benchmarks/capture.py [--threads 2] [--rounds 7]

All three are run in turn within each round, so a drifting machine moves them together; figures are medians of the
per-round ratios. Peak memory is the largest resident set above the loaded model, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from memory import peak_mb
from transformers import LlamaConfig, LlamaForCausalLM

from adhere.model.accumulate import WeightedMap
from adhere.model.capture import capture

SHAPES = ((512, 64), (512, 256))
MEMORY_SHAPE = (2048, 256)
BATCH = 4


def build() -> LlamaForCausalLM:
    """Llama, 512 wide, 8 layers, 8 heads: the model of the design's measurements."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plain(model: LlamaForCausalLM, ids: torch.Tensor, prompt: int) -> None:
    model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt)


@torch.no_grad()
def captured(model: LlamaForCausalLM, ids: torch.Tensor, prompt: int) -> None:
    rows = slice(prompt - 1, ids.shape[1] - 1)
    keep = WeightedMap((len(ids), rows.stop - rows.start, prompt), ids.device)
    with capture(model, rows, slice(0, prompt), [keep]):
        plain(model, ids, prompt)
    keep.result()


@torch.no_grad()
def eager(model: LlamaForCausalLM, ids: torch.Tensor, prompt: int) -> None:
    model.set_attn_implementation("eager")
    out = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt, output_attentions=True)
    torch.stack(out.attentions)[..., prompt - 1 : -1, :prompt].mean((0, 2))
    model.set_attn_implementation("sdpa")


WAYS: dict[str, Callable[[LlamaForCausalLM, torch.Tensor, int], None]] = {
    "plain": plain,
    "capture": captured,
    "eager": eager,
}


def ratios(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median over rounds of each way's seconds divided by plain's of the same round."""
    model = build()
    ids = torch.randint(0, 4096, (BATCH, sum(shape)))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_ in range(rounds + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(model, ids, shape[0])
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)) for name in WAYS
    } | {"plain_seconds": statistics.median(seconds["plain"])}


def peak_memory(name: str, threads: int) -> float:
    """MB of resident memory that one reading at `MEMORY_SHAPE` (batch of one) adds at its peak, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, threads))


def _peak(name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model = build()
    WAYS[name](model, torch.randint(0, 4096, (1, 32)), 16)
    ids = torch.randint(0, 4096, (1, sum(MEMORY_SHAPE)))
    return peak_mb(lambda: WAYS[name](model, ids, MEMORY_SHAPE[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {
        "time_ratio_to_plain": {f"{p}/{r}": ratios((p, r), options.rounds) for p, r in SHAPES},
        "peak_memory_mb_2048/256": {name: peak_memory(name, options.threads) for name in WAYS},
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
