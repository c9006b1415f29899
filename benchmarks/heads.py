"""Copy heads by copying: how long they take, whether a model's own answers find the same, and how to weigh them.

    python benchmarks/heads.py --models MODEL … [--data ../shared/data] [--questions 60]

For each model: seconds of a measurement and whether a second one is the same to the bit; the correlation over heads
with scores from the model's own answers; and, for each way to weigh heads, on validation questions of English XQuAD:
evidence hit (the sentence that the right answer was read from holds that answer), and the share of questions whose
right answer gets more grounding, and more agreement, than the answer to another question about the passage.
Embedded models are measured on `conflict` stories, against what the habit would say. 95 % bootstrap over questions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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
from adhere.reward.sources import cite
from adhere.text import contains_answer
from adhere.toy import make_rows

WEIGHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "all heads alike": lambda scores: torch.ones_like(scores),
    "∝ score": lambda scores: scores,
    "∝ score²": lambda scores: scores**2,
    "best head": lambda scores: _top(scores, 1),
    "best 4": lambda scores: _top(scores, 4),
    "best 8": lambda scores: _top(scores, 8),
}
SIGNALS = ("grounding", "agreement")


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


def told(policy: Policy, weights: Tensor, row: Row, right: str, wrong: str) -> dict[str, float]:
    """Of one question: whether the right answer gets more `grounding` and more `agreement` than the wrong one (½ for a
    tie), and whether the sentence that it was read from holds it."""
    reward = Reward(
        RewardConfig(dict.fromkeys(SIGNALS, 0.0), normalise="none"), policy, weights_as_heads(policy, weights)
    )
    scores = reward.score([row.prompt] * 2, [right, wrong])
    found = {}
    for name in SIGNALS:
        good, bad = scores.signals[name].tolist()
        found[name] = 0.5 if good == bad else float(good > bad)
    assert scores.reading is not None
    cited = cite(scores.reading, policy.tokenizer)[0]
    if cited and cited[0].sources:
        found["evidence hit"] = float(contains_answer(cited[0].sources[0].text, [right]))
    return found


def weights_as_heads(policy: Policy, scores: Tensor) -> CopyHeads:
    """Heads weighed otherwise: `CopyHeads.weights` is ∝ its scores."""
    return CopyHeads(scores, "copying", 1, 0.0, policy.fingerprint())


def study(model: str, data: Path, count: int, answers: int) -> dict[str, Any]:
    policy = Policy.load(model, device="cpu")
    items = questions(data, model, count)
    found: dict[str, Any] = {"model": model, "questions": len(items)}
    began = time.perf_counter()
    try:
        heads = measure_by_copying(policy)
        found["seconds"] = round(time.perf_counter() - began, 1)
        found["twice the same"] = torch.equal(heads.scores, measure_by_copying(policy).scores)
        if answers:
            began = time.perf_counter()
            own = measure_on_answers(policy, policy.encode([row.prompt for row, *_ in items[:answers]]))
            found["seconds on answers"] = round(time.perf_counter() - began, 1)
            both = torch.stack([heads.scores.flatten(), own.scores.flatten()])
            found["correlation with answers"] = round(float(torch.corrcoef(both)[0, 1]), 3)
    except UserError as error:
        found["copying"] = str(error)
        heads = copy_heads(policy)
    found["method"], found["top"] = heads.method, [[f"{n}.{h}", round(s, 2)] for n, h, s in heads.top(8)]
    for name, weigh in WEIGHINGS.items():
        values: dict[str, list[float]] = {}
        for row, right, wrong in items:
            for what, value in told(policy, weigh(heads.scores), row, right, wrong).items():
                values.setdefault(what, []).append(value)
        found[name] = {what: bootstrap(value).to_json() for what, value in values.items()}
        print(model, name, {what: round(value["mean"], 3) for what, value in found[name].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--models", nargs="+", required=True, help="model folders, toy-causal, toy-encdec")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--answers", type=int, default=32, help="questions that the model answers itself; 0 = none")
    options = parser.parse_args()
    print(
        json.dumps(
            [study(model, options.data, options.questions, options.answers) for model in options.models], indent=2
        )
    )


if __name__ == "__main__":
    main()
