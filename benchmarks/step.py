"""Seconds a training step and peak memory: adhere against TRL's GRPOTrainer with the attention reward users write.

    python benchmarks/step.py [--threads 2] [--steps 3]

Same model (Llama, 384 wide, 6 layers, 6/3 heads, vocabulary 4096, random weights), same prompts, K = 8, float32, KL to
the frozen start, and the same reward: mean attention of response tokens to the prompt in the frozen start. TRL's reward
function runs that model with `output_attentions=True`; adhere reads it once. The two take turns, a step each, and
the ratio is the median of neighbouring steps. Peak memory (Linux) is of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import peak_mb
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {"512/64": (512, 64, 2), "64/64": (64, 64, 4)}
"""Prompt length, response length, prompts a step."""
SAMPLES = 8
VOCAB = 4096


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def prompts(length: int, count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (count, length), generator=generator)
    return [" ".join(f"w{i}" for i in row.tolist()) for row in ids]


Step = Callable[[], None]


def adhere_step(model: Path, run: Path, shape: tuple[int, int, int]) -> Step:
    """A function that takes the next training step of adhere."""
    from adhere.data import Row
    from adhere.learn.settings import TrainConfig
    from adhere.learn.train import Trainer
    from adhere.model.policy import Policy
    from adhere.model.settings import Sampling

    length, response, count = shape
    config = TrainConfig(
        model=str(model),
        prompts="",
        output=str(run),
        reward={"weights": {"lookback": 1.0}, "normalise": "none"},
        steps=1000,
        prompts_per_step=count,
        num_samples=SAMPLES,
        sampling=Sampling(max_new_tokens=response),
        learning_rate=1e-6,
        save_every=1000,
    )
    rows = [Row(prompt=text) for text in prompts(length, 64)]
    trainer = Trainer(config, Policy.load(model, device="cpu"), rows, run)

    def step() -> None:
        trainer.step()

    return step


def trl_step(model: Path, run: Path, shape: tuple[int, int, int]) -> Step:
    """A function that takes the next training step of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    length, response, _ = shape
    network = LlamaForCausalLM.from_pretrained(model)
    scorer = LlamaForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def attention_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        given = tokenizer(prompts, return_tensors="pt")["input_ids"]
        answers = torch.tensor([ids + [0] * (response - len(ids)) for ids in completion_ids])
        out = scorer(torch.cat([given, answers], dim=1), output_attentions=True, use_cache=False)
        maps = torch.stack(out.attentions).mean((0, 2))
        return maps[:, length - 1 : -1, :length].sum(-1).mean(-1).tolist()

    trainer = GRPOTrainer(
        model=network,
        reward_funcs=attention_reward,
        args=grpo_config(run, shape),
        train_dataset=Dataset.from_dict({"prompt": prompts(length, 64)}),
        processing_class=tokenizer,
    )
    return stepper(trainer)


def grpo_config(run: Path, shape: tuple[int, int, int]) -> Any:
    """TRL's options for what adhere's run does."""
    from trl import GRPOConfig

    _, response, count = shape
    return GRPOConfig(
        output_dir=str(run), per_device_train_batch_size=count * SAMPLES, num_generations=SAMPLES, beta=0.04,
        max_completion_length=response, learning_rate=1e-6, max_steps=1000, use_cpu=True, report_to=[], bf16=False,
        save_strategy="no", logging_steps=10_000, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip


def stepper(trainer: Any) -> Step:
    """Drive `trainer.train()` one optimiser step at a time: it runs in a thread that waits between steps."""
    import threading

    from transformers import TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    trainer.add_callback(Turns())
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return step


SIDES = {"adhere": adhere_step, "trl": trl_step}


def seconds(shape: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """Median seconds a step of each side, and the median ratio of neighbouring steps."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model)
        taken = in_turns({name: side(model, Path(folder, name), shape) for name, side in SIDES.items()}, steps)
    return {
        **{f"{name}_seconds": round(statistics.median(values), 2) for name, values in taken.items()},
        "trl_over_adhere": ratio(taken["trl"], taken["adhere"]),
    }


def in_turns(ways: Mapping[str, Step], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each way, a step each at a time; one more before them warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if step:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of neighbouring steps."""
    return round(statistics.median(theirs / ours for theirs, ours in zip(slow, fast, strict=True)), 2)


def peak_memory(name: str, shape: tuple[int, int, int], threads: int) -> float:
    """MB that two steps add at their peak to the resident memory of a process that has everything loaded."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, shape, threads))


def _peak(name: str, shape: tuple[int, int, int], threads: int) -> float:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"))
        way = SIDES[name](Path(folder, "model"), Path(folder, "run"), shape)
        return peak_mb(lambda: (way(), way()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, help="one shape only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for label, shape in SHAPES.items():
        if options.shape in (None, label):
            memory = {f"{name}_peak_mb": peak_memory(name, shape, options.threads) for name in SIDES}
            results[label] = seconds(shape, options.steps) | memory
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
