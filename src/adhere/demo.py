"""The whole story on an embedded model, offline: train on prompts without answers, then look at fresh ones."""

from __future__ import annotations

from pathlib import Path

from adhere.api import evaluate, train
from adhere.data import write_jsonl
from adhere.files import atomic_write, to_json
from adhere.learn.train import OnStep, Trained
from adhere.measure.changed import FILE, inspect_changed
from adhere.measure.evaluate import Evaluation
from adhere.model.policy import Policy
from adhere.progress import Progress
from adhere.report.card import write_card
from adhere.report.page import write_report
from adhere.reward.heads import FILE_NAME, load_heads
from adhere.toy import Split, make_rows

SPLITS: tuple[Split, ...] = ("agree", "conflict", "novel")
TRAIN_PROMPTS = 1000
RESPONSE_TOKENS = 8


def run_demo(
    model: str, run: Path, *, steps: int, eval_prompts: int, seed: int, on_step: OnStep, progress: Progress
) -> tuple[Trained, Evaluation]:
    """Write training prompts (no answers in them), train, evaluate on fresh prompts before and after, write it."""
    stories = [row for split in SPLITS for row in make_rows(split, "train", TRAIN_PROMPTS, seed)]
    write_jsonl(run / "prompts.jsonl", [{"prompt": row["prompt"]} for row in stories])
    policy = Policy.load(model, device="cpu", progress=progress)
    trained = train(
        policy,
        run / "prompts.jsonl",
        output=run,
        on_step=on_step,
        steps=steps,
        prompts_per_step=32,
        learning_rate=2e-4,
        max_new_tokens=RESPONSE_TOKENS,
        save_every=max(1, steps),
        seed=seed,
    )
    fresh = [row for split in SPLITS for row in make_rows(split, "validation", eval_prompts, seed)]
    before = Policy.load(model, device="cpu")  # now, when the copy that training read with is gone
    evaluation = evaluate(policy, fresh, baseline=before, max_new_tokens=RESPONSE_TOKENS, batch_size=64, seed=seed)
    atomic_write(run / "results.json", to_json(evaluation.to_json(), indent=2))
    heads = load_heads(run) if (run / FILE_NAME).is_file() else None
    if changed := inspect_changed(evaluation, policy, before, heads):
        atomic_write(run / FILE, to_json(changed))
    write_report(run)
    write_card(run)
    return trained, evaluation
