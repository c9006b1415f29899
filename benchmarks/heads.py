"""Copy heads by copying: how long they take, whether a model's own answers find the same, and how to weigh them.

    python benchmarks/heads.py --models MODEL … [--data ../shared/data] [--questions 60]

For each model: seconds of a measurement and whether a second one is the same to the bit; the correlation over heads
with scores from the model's own answers; and, for each way to weigh heads, on validation questions of English XQuAD:
evidence hit (the sentence that the right answer attended to most holds that answer), and the share of questions whose
right answer gets more grounding, and more comprehensiveness, than the answer to another question about the passage.
Embedded models are measured on `conflict` stories, against what the habit would say. 95 % bootstrap over questions.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adhere.data import Row, read_rows
from adhere.errors import UserError
from adhere.measure.stats import bootstrap
from adhere.model.policy import Policy
from adhere.reward.heads import CopyHeads, copy_heads, measure_by_copying, measure_on_answers
from adhere.reward.named import RewardConfig
from adhere.reward.reward import Reward
from adhere.toy import make_rows

WEIGHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "all heads alike": lambda scores: torch.ones_like(scores),
    "∝ score": lambda scores: scores,
    "∝ score²": lambda scores: scores**2,
    "best head": lambda scores: _top(scores, 1),
    "best 4": lambda scores: _top(scores, 4),
    "best 8": lambda scores: _top(scores, 8),
}
SENTENCE = re.compile(r"[^.!?]+[.!?]*")


def _top(scores: Tensor, count: int) -> Tensor:
    floor = scores.flatten().topk(count).values[-1]
    return torch.where(scores >= floor, scores, 0.0)


def questions(data: Path, model: str, count: int) -> list[tuple[Row, str, str]]:
    """(row, right answer, wrong answer): the wrong one answers another question about the same passage."""
    if model.startswith("toy"):
        stories = make_rows("conflict", "validation", count)
        return [(Row(s["prompt"], fields=s), s["answers"][0], s["prior"]) for s in stories]
    rows = read_rows(data / "squad_xquad" / "validation.jsonl")
    found = []
    for row in rows:
        others = [r.answers[0] for r in rows if r.fields["context"] == row.fields["context"]]
        others = [text for text in others if text not in row.answers]
        if others:
            found.append((row, row.answers[0], others[0]))
    return found[:count]


def holds(policy: Policy, heads: CopyHeads, items: list[tuple[Row, str, str]]) -> list[float]:
    """1 where the sentence of the prompt that the right answer attended to most holds that answer."""
    hits = []
    for row, right, _ in items:
        rollout = policy.paired([row.prompt], [right])
        reading = policy.read(rollout, copy_weights=heads.weights)
        assert reading.copy_attention is not None
        looked = reading.copy_attention[0].sum(0)
        text = rollout.prompts.texts[0]
        encoded = policy.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        offsets = encoded["offset_mapping"]
        looked = looked[rollout.prompts.mask[0]][-len(offsets) :]
        best, mass = "", -1.0
        for sentence in SENTENCE.finditer(text[: text.rfind(str(row.fields.get("question", "\n")))]):
            inside = [first < sentence.end() and last > sentence.start() for first, last in offsets]
            here = float(looked[torch.tensor(inside)].sum())
            if here > mass:
                best, mass = sentence.group(), here
        hits.append(float(right in best))
    return hits


def in_order(policy: Policy, signal: str, heads: CopyHeads, items: list[tuple[Row, str, str]]) -> list[float]:
    """1 where the right answer gets more of the signal than the wrong one, ½ for a tie."""
    reward = Reward(RewardConfig({signal: 1.0}, normalise="none", renormalise=True), policy, heads)
    prompts = [row.prompt for row, *_ in items for _ in range(2)]
    texts = [text for _, right, wrong in items for text in (right, wrong)]
    pairs = reward.score(prompts, texts).reward.view(-1, 2).tolist()
    return [0.5 if right == wrong else float(right > wrong) for right, wrong in pairs]


def study(model: str, data: Path, count: int) -> dict[str, Any]:
    policy = Policy.load(model, device="cpu")
    items = questions(data, model, count)
    found: dict[str, Any] = {"model": model, "questions": len(items)}
    began = time.perf_counter()
    try:
        heads = measure_by_copying(policy)
        found["seconds"] = round(time.perf_counter() - began, 1)
        found["twice the same"] = torch.equal(heads.scores, measure_by_copying(policy).scores)
        began = time.perf_counter()
        own = measure_on_answers(policy, policy.encode([row.prompt for row, *_ in items[:32]]))
        found["seconds on answers"] = round(time.perf_counter() - began, 1)
        both = torch.stack([heads.scores.flatten(), own.scores.flatten()])
        found["correlation with answers"] = round(float(torch.corrcoef(both)[0, 1]), 3)
    except UserError as error:
        found["copying"] = str(error)
        heads = copy_heads(policy)
    found["method"], found["top"] = heads.method, [[f"{n}.{h}", round(s, 2)] for n, h, s in heads.top(8)]
    for name, weigh in WEIGHINGS.items():
        weighed = replace(heads, scores=weigh(heads.scores))
        row = {signal: in_order(policy, signal, weighed, items) for signal in ("grounding", "comprehensiveness")}
        if not model.startswith("toy"):
            row["evidence hit"] = holds(policy, weighed, items)
        found[name] = {signal: bootstrap(values).to_json() for signal, values in row.items()}
        print(model, name, {k: round(v["mean"], 3) for k, v in found[name].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--models", nargs="+", required=True, help="model folders, toy-causal, toy-encdec")
    parser.add_argument("--questions", type=int, default=60)
    options = parser.parse_args()
    print(json.dumps([study(model, options.data, options.questions) for model in options.models], indent=2))


if __name__ == "__main__":
    main()
