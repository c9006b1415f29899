"""The whole story on an embedded model, offline: train on prompts without answers, then look at fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adhere.data import Row, write_jsonl
from adhere.files import atomic_write, to_json
from adhere.learn.settings import TrainConfig
from adhere.learn.train import Metrics, Trained, train
from adhere.measure.evaluate import Evaluation, evaluate
from adhere.measure.settings import EvalConfig
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.report.card import write_card
from adhere.report.page import write_report
from adhere.toy import Split, make_rows

SPLITS: tuple[Split, ...] = ("agree", "conflict", "novel")
TRAIN_PROMPTS = 1000
RESPONSE_TOKENS = 8


def demo_config(model: str, run: Path, steps: int, seed: int) -> TrainConfig:
    """The settings of the demo: the default reward, without any answers."""
    return TrainConfig(
        model=model,
        prompts=str(run / "prompts.jsonl"),
        output=str(run),
        steps=steps,
        seed=seed,
        sampling=Sampling(max_new_tokens=RESPONSE_TOKENS),
        prompts_per_step=32,
        learning_rate=2e-4,
        save_every=max(1, steps),
        device="cpu",
    )


def run_demo(
    model: str, run: Path, *, steps: int, eval_prompts: int, seed: int, on_step: Callable[[Metrics], None]
) -> tuple[Trained, Evaluation]:
    """Write training prompts (no answers in them), train, evaluate on fresh prompts before and after, write it."""
    config = demo_config(model, run, steps, seed)
    prompts = [{"prompt": row["prompt"]} for split in SPLITS for row in make_rows(split, "train", TRAIN_PROMPTS, seed)]
    write_jsonl(run / "prompts.jsonl", prompts)
    policy = Policy.load(model, device="cpu")
    before = policy.reference()
    trained = train(config, policy, [Row(prompt=row["prompt"]) for row in prompts], run, on_step=on_step)
    fresh = [
        Row(prompt=row["prompt"], answers=tuple(row["answers"]), fields=row)
        for split in SPLITS
        for row in make_rows(split, "validation", eval_prompts, seed)
    ]
    options = EvalConfig(max_new_tokens=RESPONSE_TOKENS, batch_size=64, seed=seed)
    evaluation = evaluate(policy, fresh, options, baseline=before)
    atomic_write(run / "results.json", to_json(evaluation.to_json(), indent=2))
    write_report(run)
    write_card(run)
    return trained, evaluation
