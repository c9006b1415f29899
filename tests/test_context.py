"""What does not fit a model's context is refused by name, wherever a response or a prompt comes from: beyond its
positions a network computes numbers all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adhere.cli import main
from adhere.data import Row
from adhere.errors import TooLong, UserError
from adhere.measure.evaluate import evaluate
from adhere.measure.settings import EvalConfig
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.ranking import check_given, score_rows
from adhere.reward.named import RewardConfig
from adhere.reward.reward import Reward
from tests.families import save

CONTEXT = 128
PROMPT, LONG = "w1 w2 w3 .", "w5 " * CONTEXT
TOLD = rf"prompt and a response of 1\d\d tokens do not fit the model's context of {CONTEXT}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return Policy.load(model, device="cpu")


@pytest.fixture(scope="module")
def reward(policy: Policy) -> Reward:
    return Reward(RewardConfig({"coherence": 1.0}, normalise="none"), policy)


ROWS = [Row(PROMPT, response="w4", where="rows.jsonl:1"), Row("w1 ?", response=LONG, where="rows.jsonl:2")]
WAYS: dict[str, tuple[Callable[[Policy, Reward], Any], str]] = {
    "score_rows": (lambda _, reward: score_rows(reward, ROWS), r"rows\.jsonl:2"),
    "check_given": (lambda policy, _: check_given(policy, ROWS), r"rows\.jsonl:2"),
    "Reward.score": (lambda _, reward: reward.score([PROMPT, PROMPT], ["w4", LONG]), "response 2"),
    "Reward.score, ids": (lambda _, reward: reward.score([PROMPT], [[5] * CONTEXT]), "response 1"),
    "read": (lambda policy, _: policy.read([PROMPT, PROMPT], ["w4", LONG]), "response 2"),
    "respond": (lambda policy, _: policy.respond(policy.encode([PROMPT]), [LONG], torch.tensor([0])), "response 1"),
    "follow-up": (
        lambda policy, _: evaluate(policy, [Row(PROMPT, fields={"follow_up": LONG}, where="rows.jsonl:1")]),
        r"rows\.jsonl:1, its follow_up",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_response_longer_than_the_context_is_refused_by_name(way: str, policy: Policy, reward: Reward) -> None:
    call, where = WAYS[way]
    with pytest.raises(TooLong, match=rf"^{where}: {TOLD}; shorten the response or the prompt"):
        call(policy, reward)


def test_what_just_fits_is_read(policy: Policy, reward: Reward) -> None:
    room = policy.response_room(policy.encode([PROMPT]))
    assert room is not None
    count = int(room)
    assert torch.isfinite(reward.score([PROMPT], [[5] * count]).reward).all()
    with pytest.raises(TooLong):
        reward.score([PROMPT], [[5] * (count + 1)])


def test_another_prompt_of_the_batch_may_be_too_long_for_a_response(policy: Policy) -> None:
    contrast = Reward(RewardConfig({"contrast": 1.0}, normalise="none"), policy)
    long = "w7 " * (CONTEXT - 10) + "."
    with pytest.raises(TooLong, match=r"do not fit the model's context"):
        contrast.score([PROMPT, long], ["w5 " * 20, "w4"])


def test_drawing_past_the_context_is_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match=rf"^prompt 1: prompt and {CONTEXT} new tokens do not fit the model's context"):
        policy.sample(policy.encode([PROMPT]), sampling=Sampling(max_new_tokens=CONTEXT))
    config = EvalConfig(max_new_tokens=64)
    for fields, where in (({}, "x:1"), ({"paraphrases": ["w5 " * 100]}, "x:1, its paraphrase")):
        prompt = PROMPT if fields else "w5 " * 100
        with pytest.raises(UserError, match=f"^{where}: prompt and 64 new tokens do not fit the model's context"):
            evaluate(policy, [Row(prompt, fields=fields, where="x:1")], config)


@pytest.mark.parametrize("command", ["score", "calibrate", "eval"])
def test_commands_write_nothing_then(command: str, tmp_path: Path, capsys: Any) -> None:
    given, long = tmp_path / "rows.jsonl", "garden " * 600
    rows = [
        {"prompt": f"where is {n} ?", "response": long, "chosen": long, "rejected": "garden", "follow_up": long}
        for n in range(5)
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = {"score": "--input", "calibrate": "--pairs", "eval": "--prompts"}
    out = tmp_path / ("out" if command == "eval" else "out.jsonl")
    line = [command, "--model", "toy-causal", asks[command], str(given), "--output", str(out), "--device", "cpu"]
    line += ["--max-new-tokens", "8"] if command == "eval" else []
    assert main(line) == 2
    assert f"{given}:1" in (told := capsys.readouterr().err) and "do not fit the model's context of 512" in told
    assert not out.exists() or not (out / "results.json").exists()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("prior", 7, "`prior` is a number"),
        ("prior", ["w1"], "`prior` is a list"),
        ("follow_up", {"text": "w1"}, "`follow_up` is"),
        ("paraphrases", "w1 ?", "`paraphrases` is text"),
        ("paraphrases", ["w1 ?", 3], "`paraphrases` 2 is a number"),
        ("paraphrases", ["w1 ?", " "], "`paraphrases` 2 is empty"),
    ],
)
def test_a_field_that_evaluate_reads_is_of_its_type(
    field: str, value: object, told: str, tmp_path: Path, capsys: Any
) -> None:
    given = tmp_path / "rows.jsonl"
    rows = [{"prompt": "w1 ?"}, {"prompt": "w2 ?", field: value}, {"prompt": "w3 ?", field: None}]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "--model", "toy-causal", "--prompts", str(given), "--output", str(tmp_path / "out")]) == 2
    assert f"{given}:2: {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
