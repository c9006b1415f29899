"""Train a real model on real passages, one arm after another, and say what it learned to say.

    python benchmarks/real_training/run.py --data ../shared/data --model MODEL --output runs/probe --example
    python benchmarks/real_training/run.py --data ../shared/data --model MODEL --output runs/lora --lora --steps 40 \
        --learning-rate 1e-4 --max-new-tokens 40 --instruction "Answer the question in one short sentence." \
        --arms none attention contained shuffled

Prompts are questions of AdversarialQA's training part on passages of at most 110 words, without their answers (the arms
`exact` and `contained` alone read those). With `--example` an earlier turn shows a question and its answer, 1921, which
a reward that does not read the question comes to prefer; without it, the question said again. `adhere compare` does the
work, so that a run goes on where it was stopped; exact match, F1, answer contained and their differences are in
OUTPUT/compare/compare.html. This adds, step by step, how many responses are the example's answer, the question, or one
text for all prompts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as parquet
import torch

from adhere.compare.settings import folder_name
from adhere.data import read_rows, write_jsonl
from adhere.files import to_json
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
    parser.add_argument("--part", choices=("validation", "test"), default="validation", help="of XQuAD, to evaluate on")
    parser.add_argument("--evaluated", type=int, default=60, help="questions to evaluate on")
    parser.add_argument("--longest", type=int, default=LONGEST, help="words of a passage to evaluate on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    source, fresh = options.data / "adversarialqa/train.jsonl", options.data / f"squad_xquad/{options.part}.jsonl"
    if missing := [str(path) for path in (source, fresh) if not path.is_file()]:
        print(f"error: no {', '.join(missing)}; give the folder of the data sets with --data", file=sys.stderr)
        raise SystemExit(2)
    asked, labels = (options.instruction, options.example), not set(LABELLED).isdisjoint(options.arms)
    prepared(source, options.output / "prompts.jsonl", *asked, limit=1000, answers=labels)
    prepared(
        fresh,
        options.output / "evaluation.jsonl",
        *asked,
        limit=options.evaluated,
        answers=True,
        longest=options.longest,
    )
    written = options.output / "plan.yaml"
    written.write_text(to_json(plan(options, options.arms), indent=1), encoding="utf-8")
    command = ["compare", str(written), "--output", str(options.output / "compare"), "--jobs", str(options.jobs)]
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run([sys.executable, "-m", "adhere", *command], env={**os.environ, "PYTHONPATH": here})
    if found.returncode:
        raise SystemExit(found.returncode)
    for name in options.arms:
        for seed in options.seeds if name != "none" else ():
            run = options.output / "compare" / folder_name(options.model) / folder_name(name) / f"seed-{seed}"
            print(f"\n{name}, seed {seed}\n\n{table(run)}")


if __name__ == "__main__":
    main()
