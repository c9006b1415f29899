"""Train a real model on real passages, one arm after another, and say what it learned to say.

    python benchmarks/real_training/run.py --data ../shared/data --model MODEL --output runs/probe --example
    python benchmarks/real_training/run.py --data ../shared/data --model MODEL --output runs/lora --lora --steps 40 \
        --learning-rate 1e-4 --kl-coef 0.04 --max-new-tokens 40 --evaluated 100 --test 300 \
        --instruction "Answer the question in one short sentence." --arms attention contained none shuffled overlap

Prompts are questions of AdversarialQA's training part on passages of at most 110 words, without their answers (the arms
`exact` and `contained` alone read those). With `--example` an earlier turn shows a question and its answer, 1921, which
a reward that does not read the question comes to prefer; without it, the question said again. `adhere compare` does the
work, so that a run goes on where it was stopped; exact match, F1, answer contained and their differences are in
OUTPUT/compare/compare.html. This adds, step by step, how many responses are the example's answer, the question, or one
text for all prompts; and with `--test`, what each trained model answers to questions of the test part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as parquet
import torch

from adhere.compare.settings import folder_name
from adhere.data import read_rows, write_jsonl
from adhere.files import atomic_write, to_json
from adhere.measure import metrics
from adhere.measure.stats import bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.named import NAMED
from adhere.reward.signals import Evidence
from adhere.text import answer_words, contains_answer, normalise_answer

ASK = "{context}\n\nQuestion: {question}\nAnswer:"
EXAMPLE = (
    "The city museum opened in 1921. Before that, its paintings hung in the town hall.",
    "When did the museum open?",
    "1921",
)
"""A passage, a question and its answer, written for this purpose."""
VARIANTS = {
    "every-group": {**asdict(NAMED["attention"]), "learn_from": ()},
    "gated": {**asdict(NAMED["attention"]), "gates": ("ended", "said", "supported")},
    "contained": {"weights": {"run:contained": 1.0}, "normalise": "none", "gates": ("ended", "said")},
}
"""The default without `learn_from`, and with its gate on each response instead; and labels, for models that answer in
sentences, which `exact` never pays."""
LABELLED = ("exact", "contained")
LONGEST = 110
"""Words of a passage to train on."""
ANY_LENGTH = 1_000_000
TOGETHER = 16
"""Test questions answered at a time."""
SHOWN = (1, 5, 9, 13, 17)
"""Steps of the printed table, beside the last."""


def contained(evidence: Evidence) -> torch.Tensor:
    """Whether an accepted answer stands in each response: a reward with labels."""
    rollout = evidence.reading.rollout
    answers = [rollout.prompts.answers[group] for group in rollout.prompt_index.tolist()]
    hits = [float(contains_answer(text, known)) for text, known in zip(rollout.responses, answers, strict=True)]
    return torch.tensor(hits, device=rollout.prompt_index.device)


def prepared(
    source: Path, target: Path, instruction: str, example: bool, limit: int, answers: bool, longest: int = LONGEST
) -> None:
    """The first `limit` rows of `source` on passages of at most `longest` words, asked as above, `instruction` before
    the question."""
    ask = ASK.replace("Question:", f"{instruction}\n\nQuestion:") if instruction else ASK
    context, question, answer = EXAMPLE
    shown = ask.replace("{context}", context).replace("{question}", question)
    turns = [("user", shown), ("assistant", answer)] if example else []
    messages = [{"role": role, "content": text} for role, text in (*turns, ("user", ask))]
    names = ("context", "question", "answers") if answers else ("context", "question")
    rows = [row.fields for row in read_rows(source) if len(row.fields["context"].split()) <= longest]
    write_jsonl(target, [{**{name: row[name] for name in names}, "messages": messages} for row in rows[:limit]])


def plan(options: argparse.Namespace, rewards: Sequence[str]) -> dict[str, object]:
    """The comparison, as `adhere compare` reads it."""
    return {
        "models": [options.model],
        "seeds": options.seeds,
        "against": rewards[0],
        "audited": 0,
        "data": {
            "name": "files",
            "prompts": str(options.output / "prompts.jsonl"),
            "evaluation": str(options.output / "evaluation.jsonl"),
        },
        "train": {
            "steps": options.steps,
            "prompts_per_step": 4,
            "num_samples": 8,
            "sampling": {"max_new_tokens": options.max_new_tokens, "temperature": 0.9 if options.example else 0.8},
            "algorithm": {"name": "grpo", "kl_coef": options.kl_coef},
            "learning_rate": options.learning_rate,
            "dynamic_sampling": options.dynamic_sampling,
            **({"lora": {}} if options.lora else {}),
            "device": options.device,
        },
        "evaluation": {"num_samples": 1, "max_new_tokens": options.max_new_tokens},
        "arms": {name: {"reward": VARIANTS.get(name, name)} for name in rewards},
    }


def table(run: Path) -> str:
    """What the responses of a run became: of each step shown, counts among them and what those were paid."""
    lines = ["| step | example's answer | question again | most frequent text | reward | of the example's answer |"]
    lines.append("|---" * 6 + "|")
    steps = sorted((run / "completions").glob("step-*.parquet"))
    for number, file in enumerate(steps, 1):
        if number in SHOWN or number == len(steps):
            rows = parquet.read_table(file).to_pylist()
            said = [normalise_answer(row["completion"]) for row in rows]
            asked = [echoes(row["completion"], row["prompt"]) for row in rows]
            paid = [row["reward"] for row, text in zip(rows, said, strict=True) if text == EXAMPLE[2]]
            (text, count), *_ = Counter(said).most_common(1)
            cells = (
                f"{len(paid)}/{len(rows)}",
                f"{sum(asked)}/{len(rows)}",
                f"{text[:40]!r} {count}",
                f"{statistics.fmean(row['reward'] for row in rows):.2f}",
                f"{statistics.fmean(paid):.2f}" if paid else "–",
            )
            lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def echoes(response: str, prompt: str) -> bool:
    """Whether four fifths of the words of a response of three or more are words of the question."""
    question = prompt.rpartition("Question:")[2].partition("\nAnswer:")[0]
    found, asked = answer_words(response), set(answer_words(question))
    return len(found) >= 3 and sum(word in asked for word in found) >= 0.8 * len(found)


def tested(models: Mapping[str, str], options: argparse.Namespace) -> str:
    """What each model answers to the test questions: figures, and their differences to the first, question by question.
    The answers of a model are kept in OUTPUT/test."""
    rows = read_rows(options.output / "test.jsonl")
    lines = ["| model | exact match | F1 | answer contained | F1, gain | contained, gain |", "|---" * 6 + "|"]
    first: Mapping[str, Sequence[float | None]] | None = None
    for label, model in models.items():
        kept = options.output / "test" / f"{folder_name(label)}.json"
        if not kept.exists():
            policy = Policy.load(model, device=options.device)
            greedy = Sampling(temperature=0.0, max_new_tokens=options.max_new_tokens)
            said: list[str] = []
            for start in range(0, len(rows), TOGETHER):
                prompts = policy.encode([row.prompt for row in rows[start : start + TOGETHER]])
                said += policy.sample(prompts, sampling=greedy).responses
            atomic_write(kept, to_json(said, indent=1))
        said = json.loads(kept.read_text(encoding="utf-8"))
        known = [row.answers for row in rows]
        values = {name: getattr(metrics, name)(said, known) for name in ("exact_match", "f1", "contained")}
        first = first or values
        gains = [
            [after - before for after, before in zip(values[name], first[name], strict=True)]
            for name in ("f1", "contained")
        ]
        figures = [*(bootstrap(found) for found in values.values()), *(bootstrap(gain) for gain in gains)]
        cells = [f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in figures]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--model", required=True, help="folder or hub id of a chat model")
    parser.add_argument("--output", type=Path, required=True, help="gets the rows, the plan and the runs")
    parser.add_argument(
        "--arms",
        nargs="*",
        default=["attention", "attention-v1"],
        help="rewards by name, every-group, gated, contained, or none",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--example", action="store_true", help="show an example turn first")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="stands between passage and question")
    parser.add_argument("--lora", action="store_true", help="train adapters rather than all weights")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--dynamic-sampling", type=int, default=0)
    parser.add_argument("--evaluated", type=int, default=60, help="validation questions of XQuAD to evaluate on")
    parser.add_argument(
        "--test", type=int, default=0, metavar="N", help="then answer N of its test questions, greedily"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    source = options.data / "adversarialqa/train.jsonl"
    fresh, test = (options.data / f"squad_xquad/{part}.jsonl" for part in ("validation", "test"))
    if missing := [str(path) for path in (source, fresh, test) if not path.is_file()]:
        print(f"error: no {', '.join(missing)}; give the folder of the data sets with --data", file=sys.stderr)
        raise SystemExit(2)
    asked, labels = (options.instruction, options.example), not set(LABELLED).isdisjoint(options.arms)
    prepared(source, options.output / "prompts.jsonl", *asked, limit=1000, answers=labels)
    prepared(fresh, options.output / "evaluation.jsonl", *asked, limit=options.evaluated, answers=True)
    prepared(test, options.output / "test.jsonl", *asked, limit=options.test, answers=True, longest=ANY_LENGTH)
    written = options.output / "plan.yaml"
    written.write_text(to_json(plan(options, options.arms), indent=1), encoding="utf-8")
    command = ["compare", str(written), "--output", str(options.output / "compare"), "--jobs", str(options.jobs)]
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run([sys.executable, "-m", "adhere", *command], env={**os.environ, "PYTHONPATH": here})
    if found.returncode:
        raise SystemExit(found.returncode)
    runs = options.output / "compare" / folder_name(options.model)
    folders = {
        f"{name}, seed {seed}": runs / folder_name(name) / f"seed-{seed}"
        for name in options.arms
        for seed in (options.seeds if name != "none" else ())
    }
    for label, run in folders.items():
        print(f"\n{label}\n\n{table(run)}")
    if options.test:
        models = {"untrained": options.model, **{label: str(run / "model") for label, run in folders.items()}}
        print("\n" + tested(models, options))


if __name__ == "__main__":
    main()
