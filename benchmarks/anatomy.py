"""Where the seconds of a training step go on a model of your own, beside what the machine allows, and beside TRL.

    python benchmarks/anatomy.py --model MODEL [--shapes 256/48/2 1024/64/1] [--threads 2] [--steps 3] [--trl]

A shape is prompt tokens / response tokens / prompts a step; eight samples each, all of full length, float32, KL to the
frozen start, the default reward. *Bound*: the tokens of each phase times two operations a weight, at the speed that
this machine multiplies matrices of the model's own shape with so many rows, measured beside the steps. What is no
product with weights (attention, sampling) is not in it. `--trl`: `GRPOTrainer` with a reward that costs nothing, taking
turns with adhere step by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step import SAMPLES, grpo_config, in_turns, ratio, stepper
from transformers import AutoModelForCausalLM, AutoTokenizer

Shape = tuple[int, int, int]
PHASES = ("sample", "score", "update")
FORWARDS = {"score": 2, "update": 3}
"""Forwards over prompts and responses: the default reward reads twice (once without the question), a backward pass
costs two. What is computed again in the backward pass is counted as overhead."""


def shape_of(text: str) -> Shape:
    length, response, count = (int(part) for part in text.split("/"))
    return length, response, count


def full_length(model: str, folder: Path, response: int) -> Path:
    """A copy of a model that ends no response before its `response` tokens."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.generation_config.min_new_tokens = response
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def adhere_steps(model: Path, run: Path, shape: Shape, found: list[dict[str, float]]) -> Any:
    """A function that takes a step of adhere and adds its metrics to `found`."""
    from adhere.data import Row
    from adhere.learn.settings import TrainConfig
    from adhere.learn.train import Trainer
    from adhere.model.policy import Policy
    from adhere.model.settings import Sampling

    length, response, count = shape
    sampling = Sampling(max_new_tokens=response)
    config = TrainConfig(
        model=str(model), prompts="", output=str(run), steps=1000, prompts_per_step=count, num_samples=SAMPLES,
        sampling=sampling, learning_rate=1e-6, save_every=1000,
    )  # fmt: skip
    rows = [Row(prompt=text) for text in prompts(length, 16)]
    trainer = Trainer(config, Policy.load(model, device="cpu", chat="off", train=True), rows, run)
    return lambda: found.append(trainer.step())


def prompts(length: int, count: int) -> list[str]:
    """Texts of about `length` tokens, all of one question after a context."""
    return [f"{'word ' * (length - 8)}. {'so ' * n}What is it?"[: 5 * length] for n in range(1, count + 1)]


def trl_steps(model: Path, run: Path, shape: Shape) -> Any:
    """A function that takes a step of TRL, whose reward is the length of the text."""
    from datasets import Dataset
    from trl import GRPOTrainer

    def free(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    options = grpo_config(run, shape)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=free,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": prompts(shape[0], 16)}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return stepper(trainer)


def speed(rows: int, width: int, inner: int) -> float:
    """Operations a second of [rows, width] @ [width, inner], the median of some."""
    left, right = torch.randn(rows, width), torch.randn(width, inner)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2.0 * rows * width * inner / statistics.median(times[2:])


def bounds(model: Path, shape: Shape) -> dict[str, float]:
    """Seconds of each phase if nothing but products with weights took any."""
    network = AutoModelForCausalLM.from_pretrained(model)
    config = network.config.get_text_config()
    weights = sum(p.numel() for p in network.parameters())
    length, response, count = shape
    tokens, samples = count * (length + SAMPLES * response), count * SAMPLES

    def taken(rows: int, times: float = 1) -> float:
        return 2 * times * rows * weights / speed(rows, config.hidden_size, config.intermediate_size)

    sample = taken(count * length) + taken(samples, response)
    return {"sample": sample, **{phase: taken(tokens, forwards) for phase, forwards in FORWARDS.items()}}


def anatomy(model: str, shape: Shape, steps: int, with_trl: bool) -> dict[str, Any]:
    """Median seconds of each phase, the bound beside it, and the ratio of the two."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = full_length(model, Path(name, "model"), shape[1])
        ways = {"adhere": adhere_steps(folder, Path(name, "adhere"), shape, found)}
        if with_trl:
            ways["trl"] = trl_steps(folder, Path(name, "trl"), shape)
        taken = in_turns(ways, steps)
        bound = bounds(folder, shape)
    told: dict[str, Any] = {}
    for phase in PHASES:
        median = statistics.median(one[f"seconds/{phase}"] for one in found[1:])
        told[phase] = {
            "seconds": round(median, 2),
            "bound": round(bound[phase], 2),
            "over_bound": round(median / bound[phase], 2),
        }
    told["step"] = round(statistics.median(taken["adhere"]), 2)
    if with_trl:
        told["trl_step"] = round(statistics.median(taken["trl"]), 2)
        told["trl_over_adhere"] = ratio(taken["trl"], taken["adhere"])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal model: folder or hub id")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(256, 48, 2), (1024, 64, 1)], metavar="P/R/N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="take turns with TRL")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        told = anatomy(options.model, shape, options.steps, options.trl)
        print(json.dumps({"shape": "/".join(map(str, shape)), **told}), flush=True)


if __name__ == "__main__":
    main()
