"""When the reward fails: the cases of docs/study/limits.md, each with a figure.

    python benchmarks/reward_study/limits.py [--prompts 200] [--real runs/real/base --data ../shared/data]

On validation stories of the embedded models. *Own samples*: the share of (right, wrong) pairs of a prompt's eight
samples in order, 0.5 = chance. *Against*: the share of prompts where the right answer gets more than the other, ties
half. With `--real`, a model of real text reads an article and tells its beginning, said simply by a teacher, from the
same copied.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from candidates import changed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adhere.data import Columns, Row, read_rows
from adhere.errors import UserError
from adhere.measure.audit import audit
from adhere.measure.settings import AuditConfig
from adhere.measure.stats import Estimate, bootstrap
from adhere.model.policy import Policy
from adhere.reward.heads import measure_on_answers
from adhere.reward.reward import Reward
from adhere.reward.salience import TokenClass, attended, classes_of
from adhere.toy import make_rows, model_path

REWARDS = {
    "attention": "attention",
    "coherence": changed({"overlap": 0, "comprehensiveness": 0}),
    "overlap": "overlap",
    "attention, overlap 0": changed({"overlap": 0}),
}


def stories(split: str, kinds: Sequence[str], count: int) -> list[Row]:
    rows = [row for row in make_rows(split, "validation", 20 * count, seed=31) if row["kind"] in kinds][:count]
    return [Row(prompt=row["prompt"], answers=tuple(row["answers"]), fields=row) for row in rows]


def rewards_of(policy: Policy) -> dict[str, Reward]:
    """The rewards of the table."""
    return {name: Reward.resolve(spec, policy) for name, spec in REWARDS.items()}


def own_samples(policy: Policy, rewards: dict[str, Reward], rows: list[Row]) -> dict[str, Estimate | None]:
    """Share of right and wrong pairs in order, by reward."""
    verdicts = audit(policy, rows, rewards, AuditConfig(max_new_tokens=8, batch_size=50))
    return {name: verdict.ranking.get("all") for name, verdict in verdicts.items()}


def two_answers(rewards: dict[str, Reward], rows: Sequence[tuple[str, str, str]]) -> dict[str, Estimate | None]:
    """Share of (prompt, right, other) where the right answer gets more, by reward."""
    found: dict[str, Estimate | None] = {}
    for name, reward in rewards.items():
        wins = []
        for first in range(0, len(rows), 32):
            part = rows[first : first + 32]
            scores = reward.score(
                [prompt for prompt, *_ in part for _ in range(2)], [text for _, *both in part for text in both]
            ).reward.view(-1, 2)
            wins += [0.5 if a == b else float(a > b) for a, b in scores.tolist()]
        found[name] = bootstrap(wins) if wins else None
    return found


def copied(row: Row) -> str | None:
    """The place that the story names for the person who is asked about; None where it names none."""
    story, _, question = str(row.prompt).rpartition(" . ")
    for word in question.split():
        if said := re.findall(rf"\b{word} (?:is in|\w+ to) the (\w+)", story):
            return str(said[-1])
    return None


def sinks(policy: Policy, rows: list[Row]) -> str:
    """Where the attention goes that is no content, and what is taken away of the context."""
    reward = Reward.named("attention", policy)
    prompts = policy.encode([row.prompt for row in rows])
    evidence = reward.evidence(policy.sample(prompts, 1, seed=0), policy)
    reading = evidence.reading
    assert reading.attention is not None and reading.copy_attention is not None
    content = classes_of(prompts.ids, reward.classes) == TokenClass.CONTENT
    first = prompts.mask.int().argmax(-1)
    mean = (reading.attention * reading.response_mask[..., None]).sum(1) / reading.response_mask.sum(-1, keepdim=True)
    at_first = mean.gather(1, first[:, None]).mean() / mean.sum(-1).mean()
    aside = (mean * ~content).sum(-1).mean() / mean.sum(-1).mean()
    taken = attended(reading, reading.copy_attention, reward.classes, reward.config.ablate)
    others = (prompts.mask & ~content).sum() / prompts.mask.sum()
    return (
        f"attention on the first token {at_first:.2f}, on tokens that are no content {aside:.2f} (of the prompt "
        f"{others:.2f}); of what is taken away {(taken & content).sum() / taken.sum():.2f} is content"
    )


def without_story(rows: list[Row]) -> list[Row]:
    """The questions alone, which the model can only answer from what it was taught."""
    return [replace(row, prompt=str(row.prompt).rpartition(" . ")[2]) for row in rows]


def refusal(policy: Policy, rows: list[Row]) -> str:
    """What a user is told whose prompts these are."""
    try:
        measure_on_answers(policy, policy.encode([row.prompt for row in rows]))
    except UserError as error:
        return str(error)
    return "not refused"


def untrained(rows: list[Row]) -> str:
    """What happens with a model that has learned nothing."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(model_path("causal"))
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy = Policy.load(folder, device="cpu")
        heads = refusal(policy, rows)
        if heads != "not refused":
            return heads
        verdict = audit(policy, rows, {"": Reward.named("attention", policy)}, AuditConfig(max_new_tokens=8))[""]
        return verdict.explain(AuditConfig().max_hack_rate)


def articles(data: Path, count: int) -> list[tuple[str, str, str]]:
    """(prompt, the beginning as a teacher simplified it, the beginning copied) of OneStopEnglish articles."""
    texts: dict[str, dict[str, str]] = {}
    for row in read_rows(data / "onestop_english/train.jsonl", Columns(prompt_field="text")):
        texts.setdefault(row.fields["title"], {})[row.fields["level"]] = " ".join(row.fields["text"].split())
    found = []
    for levels in texts.values():
        if {"advanced", "elementary"} <= set(levels):
            passage, simple, same = (
                " ".join(re.split(r"(?<=[.!?]) ", levels[level])[:sentences])
                for level, sentences in (("advanced", 5), ("elementary", 2), ("advanced", 2))
            )
            if simple not in passage and len(passage) < 1500:
                found.append((f"{passage}\n\nSay the beginning in simple words.\n", simple, same))
    return found[:count]


def shown(figures: dict[str, Estimate | None]) -> str:
    return " | ".join("–" if f is None else f"{f.mean:.2f} [{f.low:.2f}, {f.high:.2f}]" for f in figures.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--prompts", type=int, default=200, help="stories of each case")
    parser.add_argument("--real", help="folder of a model of real text (benchmarks/real_model.py)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    options = parser.parse_args()
    if options.real and not (options.data / "onestop_english").is_dir():
        print(f"error: {options.data}: no onestop_english there; give the folder with --data", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    heading = f"\n| case | {' | '.join(REWARDS)} |\n{'|---' * (len(REWARDS) + 1)}|"
    for kind in options.kinds:
        policy = Policy.load(model_path(kind), device="cpu")
        print(f"\n{kind}\n{heading}")
        extractive = stories("agree", ["extractive"], options.prompts)
        rewards, asked = rewards_of(policy), without_story(extractive)
        print(f"| no story, own samples | {shown(own_samples(policy, rewards, asked))} |", flush=True)
        for name in ("count", "yesno", "twohop", "unanswerable"):
            rows = stories("conflict", [name], options.prompts)
            print(f"| {name}, own samples | {shown(own_samples(policy, rewards, rows))} |", flush=True)
        for name, text in (("synonym", "the word itself"), ("category", "the place itself")):
            both = [(row, copied(row)) for row in stories("conflict", [name], options.prompts)]
            pairs = [(str(row.prompt), row.answers[0], other) for row, other in both if other]
            print(f"| {name} against {text} | {shown(two_answers(rewards, pairs))} |", flush=True)
        print(f"\nno story, heads not known: {refusal(policy, asked)}")
        print(f"\n{sinks(policy, stories('conflict', ['extractive'], options.prompts))}", flush=True)
    print(f"\nuntrained: {untrained(stories('conflict', ['extractive'], 50))}")
    if options.real:
        pairs, reader = articles(options.data, options.prompts), Policy.load(options.real)
        rewards = rewards_of(reader)
        print(f"\nreal text\n{heading}")
        print(f"| said simply against copied ({len(pairs)}) | {shown(two_answers(rewards, pairs))} |")


if __name__ == "__main__":
    main()
