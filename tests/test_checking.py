"""Answers checked: support by hand from read log-probs, sources, labels and their calibration, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from adhere.checking import area, calibration, check_rows
from adhere.cli import main
from adhere.data import rows_of
from adhere.errors import UserError
from adhere.measure.settings import CheckConfig
from adhere.model.policy import Policy
from adhere.reward.salience import token_classes
from adhere.reward.sources import context_sentences
from adhere.toy import model_path

STORY = "mary went to the garden . john is in the office ."
ROWS = [
    {"context": STORY, "question": "where is mary ?", "response": "garden", "supported": True},
    {"context": STORY, "question": "where is john ?", "response": "office . garden", "supported": True},
    {"context": STORY, "question": "where is john ?", "response": "yes", "supported": False},
    {"context": "emma has the bell .", "question": "where is emma ?", "response": "", "supported": False},
]


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy.load(model_path(request.param), device="cpu")


def test_support_is_the_share_of_probability_that_its_best_sentence_gives(policy: Policy) -> None:
    rows = rows_of(ROWS)
    checked = list(check_rows(policy, rows, CheckConfig(batch_size=3)))
    assert [len(one["sentences"]) for one in checked] == [1, 2, 1, 0] and checked[3]["faithfulness"] is None
    rollout = policy.paired([rows[0].prompt], ["garden"])
    parts = context_sentences(rollout.prompts, token_classes(policy.tokenizer))
    drops = policy.read(rollout, attention=False, spread=()).logprobs[:, None] - policy.read_without(rollout, parts)
    falls = drops[0, :, 0].tolist()  # of "garden", without its end
    told = checked[0]["sentences"][0]
    assert told["support"] == pytest.approx(1 - math.exp(-max(0.0, *falls)), abs=1e-4)
    assert told["supported"] == (told["support"] >= 0.35) and told["span"] == [0, 6]
    best = max(range(2), key=lambda n: falls[n])
    assert [source["drop"] for source in told["sources"]] == pytest.approx(
        sorted((fall for fall in falls if fall > 0), reverse=True), abs=1e-3
    )
    if told["sources"]:
        assert told["sources"][0]["text"] == ["mary went to the garden .", "john is in the office ."][best]
        start, end = told["sources"][0]["span"]
        assert STORY[start:end] == told["sources"][0]["text"]


def test_a_row_is_checked_alike_alone(policy: Policy) -> None:
    rows = rows_of(ROWS)
    together = list(check_rows(policy, rows))
    for row, one in zip(rows, together, strict=True):
        (alone,) = check_rows(policy, [row])
        assert alone["faithfulness"] == pytest.approx(one["faithfulness"], abs=1e-3)


def test_what_cannot_be_checked_is_named(policy: Policy) -> None:
    with pytest.raises(UserError, match="no context to check against"):
        list(check_rows(policy, rows_of([{"prompt": "where is mary ?", "response": "garden"}])))
    with pytest.raises(UserError, match="neither true nor false"):
        calibration([{"faithfulness": 1.0}], rows_of([{**ROWS[0], "supported": "yes"}]))


def test_calibration_by_hand() -> None:
    """Scores 0.9 0.4 | 0.5 0.1, the first two supported: three of four pairs in order. The best cut takes 0.9 alone or
    all from 0.4 on, each right on ¾; the first of equals counts."""
    rows = rows_of([ROWS[0], ROWS[0], ROWS[2], ROWS[2], {**ROWS[0], "supported": None}])
    checked = [{"faithfulness": value, "logprob": -1.0} for value in (0.9, 0.4, 0.5, 0.1, 0.7)]
    found = calibration(checked, rows)
    assert found is not None and (found.rows, found.supported) == (4, 2)
    assert found.areas["faithfulness"].area == 0.75 and found.areas["logprob"].area == 0.5
    assert found.areas["overlap"].area == 1.0  # "garden" is in its story, "yes" is not
    assert (found.threshold, found.accuracy) == (0.4, 0.75)
    assert [one["supported"] for one in found.curve] == [0.0, 1.0, 0.0, 1.0]
    assert calibration(checked[:2], rows[:2]) is None


def test_area_against_brute_force() -> None:
    generator = np.random.default_rng(3)
    scores, labels = generator.integers(0, 5, 40).astype(float), generator.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    found = area(scores, labels)
    assert found.area == pytest.approx(np.mean(pairs)) and found.low <= found.area <= found.high


def test_the_command_writes_every_row_and_tells_what_is_unsupported(tmp_path: Path, capsys) -> None:
    given, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["check", "--model", "toy-causal", "--input", str(given), "--device", "cpu"]
    assert main([*arguments, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "unsupported" in shown and "area under ROC" in shown and "calibration" in shown
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response"] for row in written] == [row["response"] for row in ROWS]
    assert all(0 <= one["support"] <= 1 for row in written for one in row["sentences"])
    assert main([*arguments, "--output", str(tmp_path / "two"), "--limit", "2"]) == 0
    first = [json.loads(line) for line in (tmp_path / "two").read_text().splitlines()]
    assert [one["faithfulness"] for one in first] == pytest.approx(
        [one["faithfulness"] for one in written[:2]], abs=1e-3
    )
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "where is mary ?", "response": "garden"}\n')
    assert main(["check", "--model", "toy-causal", "--input", str(bare), "--output", str(tmp_path / "new")]) == 2
    assert f"{bare}:1: has no context" in capsys.readouterr().err
    assert main([*arguments, "--output", str(out)]) == 2  # never overwritten
    assert main([*arguments, "--output", str(tmp_path / "new"), "--threshold", "2"]) == 2
    assert not (tmp_path / "new").exists() and "threshold is 2.0" in capsys.readouterr().err
