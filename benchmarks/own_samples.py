"""What mixtures of signals say of a model's own samples: those that hold the answer before those that do not.

    python benchmarks/own_samples.py --model MODEL --data ROWS.jsonl --output OUT.jsonl [--limit 46]

ROWS have `context`, `question` and `answers`; the first question of each passage is asked, "in one short sentence".
Eight samples each, at most 40 tokens, temperature 0.8. Beside them stand the accepted answer, answers to other
questions about the passage, and the passage and its first sentence, copied; of each kind is told how often the best is
worth more than every own sample. OUT gets every response with its signals. Pairs are counted before the gates;
intervals are 95 % bootstrap over questions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from adhere import Policy, Reward, score
from adhere.data import read_rows, rows_of, write_jsonl
from adhere.measure.metrics import contained
from adhere.measure.stats import Estimate, bootstrap
from adhere.model.settings import Sampling
from adhere.reward.named import NAMED
from adhere.text import sentences

ASK = "Answer the question in one short sentence."
DEFAULT = NAMED["attention"].weights
MIXTURES: dict[str, Mapping[str, float]] = {
    "attention": DEFAULT,
    "without agreement": {**DEFAULT, "agreement": 0.0},
    "three times agreement": {**DEFAULT, "agreement": 30.0},
    "three times agreement, without question_reliance": {**DEFAULT, "agreement": 30.0, "question_reliance": 0.0},
    **{f"{name} alone": {name: 1.0} for name in ("agreement", "support", "question_reliance", "coherence")},
}
SAMPLING = Sampling(max_new_tokens=40, temperature=0.8)
Response = dict[str, Any]


def responses(policy: Policy, questions: list[Response], row: Response, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that is said in answer to a question."""
    drawn = policy.sample(policy.encode([row["prompt"]]), 8, sampling=SAMPLING, seed=seed)
    yield from (("own", text) for text in drawn.responses if text.strip())
    yield "answer", row["answers"][0]
    yield from (("distractor", other["answers"][0]) for other in questions if other["answers"][0] not in row["answers"])
    yield "passage", row["context"]
    yield "sentence", row["context"][slice(*sentences(row["context"])[0])]


def scored(policy: Policy, data: Path, limit: int) -> Iterator[Response]:
    """Every response with its signals, and whether it is right: whether it holds an accepted answer."""
    reward = Reward.named("attention", policy)
    passages: dict[str, list[Response]] = defaultdict(list)
    for row in read_rows(data):
        passages[row.fields["context"]].append({**row.fields, "answers": list(row.answers)})
    for number, (context, questions) in enumerate(list(passages.items())[:limit]):
        asked = {"context": context, "question": questions[0]["question"], "instruction": ASK}
        (row,) = rows_of([asked])
        said = list(responses(policy, questions[1:], {**questions[0], "prompt": row.prompt}, number))
        found = score(policy, [{**asked, "response": text} for _, text in said], reward=reward)
        right = contained([text for _, text in said], [questions[0]["answers"]] * len(said))
        for (kind, text), one, held in zip(said, found, right, strict=True):
            yield {"question": number, "kind": kind, "text": text, "right": bool(held), "signals": one["signals"]}


def in_order(rows: list[Response], weights: Mapping[str, float]) -> list[float]:
    """Share of (right, wrong) pairs of own samples in order, of each question that has both; ties are half."""
    shares = []
    for group in _by_question(rows):
        values = [(mixed(one, weights), one["right"]) for one in group if one["kind"] == "own"]
        right, wrong = ([value for value, is_right in values if is_right == side] for side in (True, False))
        if right and wrong:
            shares.append(fmean((a > b) + (a == b) / 2 for a in right for b in wrong))
    return shares


def wins(rows: list[Response], weights: Mapping[str, float], kind: str) -> list[float]:
    """Of each question that has responses of a kind, whether the best is worth more than every own sample."""
    worth = []
    for group in _by_question(rows):
        best = max(mixed(one, weights) for one in group if one["kind"] == "own")
        if others := [mixed(one, weights) for one in group if one["kind"] == kind]:
            worth.append(float(max(others) > best))
    return worth


def mixed(one: Response, weights: Mapping[str, float]) -> float:
    return float(sum(weight * one["signals"][name] for name, weight in weights.items()))


def _by_question(rows: list[Response]) -> Iterator[list[Response]]:
    groups: dict[int, list[Response]] = defaultdict(list)
    for one in rows:
        groups[one["question"]].append(one)
    yield from groups.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model: folder or hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=46, help="passages")
    options = parser.parse_args()
    policy = Policy.load(options.model, dtype="float32", device="cpu")
    rows = list(scored(policy, options.data, options.limit))
    write_jsonl(options.output, rows)
    plain = in_order(rows, MIXTURES["without agreement"])
    if not plain:
        raise SystemExit("no question has both right and wrong samples: nothing to put in order")
    kinds = ("answer", "distractor", "sentence", "passage")
    print(
        "mixture",
        "pairs in order",
        "ahead of the one without agreement",
        *(f"{kind} wins" for kind in kinds),
        sep=" | ",
    )
    for name, weights in MIXTURES.items():
        shares = in_order(rows, weights)
        ahead = [mine - other for mine, other in zip(shares, plain, strict=True)]
        print(name, *map(_shown, (shares, ahead, *(wins(rows, weights, kind) for kind in kinds))), sep=" | ")


def _shown(values: list[float]) -> str:
    found: Estimate = bootstrap(values)
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] of {found.n}"


if __name__ == "__main__":
    main()
