"""Peak resident memory (Linux): of a piece of work in this process, and of reading, sampling and learning with a model.

    python benchmarks/memory.py --model MODEL [--prompt 256 --response 48 --prompts 2 --samples 8]

The weights are float32, with adapters of rank 16; prompts and responses are as many tokens as it says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
    options = parser.parse_args()
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
