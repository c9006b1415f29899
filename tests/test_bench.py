"""The bench of faithfulness at work, on small models of both kinds: shared readings against single ones, records
against what `score` says, the command from rows to files, and all that it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import adhere
from adhere import Policy, Reward, RewardConfig, UserError
from adhere.cli import main
from adhere.data import Columns, rows_of
from adhere.faithfulness.readings import HEADS, read_together, score_together, top_sentences
from adhere.faithfulness.run import bench
from adhere.faithfulness.settings import CONTROLS, BenchConfig, reward_of, with_controls
from adhere.faithfulness.summary import summarise
from adhere.measure.batch_cache import BatchCache
from adhere.ranking import Group, read_groups
from adhere.reward.heads import copy_heads
from adhere.text import contains_answer, is_answer, sentences
from adhere.toy import model_path
from adhere.types import Reading

T = TypeVar("T")
TEMPLATE = "{context} {question} answer :"
PLACES = [
    ("mary", "garden", "john", "office"),
    ("anna", "library", "hugo", "beach"),
    ("nina", "kitchen", "carl", "market"),
]
ROWS: list[dict[str, Any]] = [
    {"context": f"{a} went to the {x} . {b} went to the {y} .", "question": f"where is {who} ?", "answers": [place]}
    for a, x, b, y in PLACES
    for who, place in ((a, x), (b, y))
]
CONFIG = BenchConfig(num_samples=4, max_new_tokens=8, temperature=1.0)
COLUMNS = Columns(template=TEMPLATE)


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy.load(model_path(request.param), device="cpu")


def made(policy: Policy, **more: RewardConfig) -> dict[str, Reward]:
    heads = copy_heads(policy)
    return {name: Reward(spec, policy, heads) for name, spec in with_controls(more).items()}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(data: Path, output: Path, *more: str, model: str = "toy-causal") -> list[str]:
    given = ["--num-samples", "4", "--max-new-tokens", "8", "--template", TEMPLATE, "--device", "cpu"]
    return ["bench", "--model", model, "--data", str(data), "--output", str(output), *given, *more]


def test_rewards_scored_together_get_what_each_gets_by_itself(policy: Policy) -> None:
    prompts = [row.prompt for row in rows_of(ROWS[:2], COLUMNS)]
    groups = [Group(prompts[n], said, [True] * len(said), ["garden"]) for n, said in
              ((0, ["garden", "office", ""]), (0, ["garden", "garden"]), (1, ["office", "the beach"]))]  # fmt: skip
    rollout = read_groups(policy, groups)
    narrow = {"grounding": 1.0, "comprehensiveness": 1.0}
    rewards = made(
        policy,
        exact=reward_of("exact"),
        v1=reward_of("attention-v1"),
        shuffled=reward_of("shuffled"),
        paper=reward_of("paper"),
        narrow=RewardConfig(narrow, ablate=0.5, normalise="group"),
        floored=RewardConfig({"overlap": 1.0}, normalise="none", logprob_floor=-5.0),
    )
    reading = read_together(policy, rollout, rewards, copy_heads(policy))
    # Two groups with one prompt: computed once, and the same numbers.
    alone = policy.read(rollout, copy_weights=copy_heads(policy).weights)
    for name in ("logprobs", "certainty", "attention", "copy_attention"):
        torch.testing.assert_close(getattr(reading, name), getattr(alone, name), atol=1e-5, rtol=1e-5)
    for name, found in score_together(policy, rewards, reading).items():
        torch.testing.assert_close(found, rewards[name](rollout).reward, atol=1e-4, rtol=1e-4, msg=name)


def test_the_sentence_looked_at_most_is_where_the_attention_is(policy: Policy) -> None:
    """All attention on one token: its sentence, whichever it is; on the question: none."""
    row = rows_of(ROWS[:1], COLUMNS)[0]
    rollout = read_groups(policy, [Group(row.prompt, ["garden", "office", ""], [True] * 3)])
    tokens = rollout.prompts.ids[0].tolist()

    def looked(word: str) -> list[tuple[int, int] | None]:
        (place,) = (n for n, token in enumerate(tokens) if policy.tokenizer.decode([token]).strip() == word)
        attention = torch.zeros(3, rollout.response_ids.shape[1], len(tokens))
        attention[..., place] = 1.0
        reading = Reading(rollout, torch.zeros_like(attention[..., 0]), attention=attention)
        classes = Reward(reward_of("overlap"), policy).classes
        return top_sentences(reading, "all heads", classes)

    first, second = sentences(ROWS[0]["context"])
    # The third response says nothing, and so looks at nothing.
    assert looked("garden") == [first, first, None] and looked("office") == [second, second, None]
    assert looked("?") == [None, None, None]


def test_records_hold_what_score_says_and_what_the_rows_know(policy: Policy) -> None:
    rewards = made(policy)
    rows = rows_of(ROWS, COLUMNS)
    found = bench(policy, rows, rewards, copy_heads(policy), CONFIG, columns=COLUMNS, limit=3)
    assert found.questions == 3
    assert set(found.cases) == {"unchanged", "swapped", "distractor", "unanswerable", "samples", "swapped-samples"}
    for record in found.records:
        about, candidates = record["bench"], record["candidates"]
        votes = "samples" in about["split"]
        assert candidates[0]["scores"].keys() == {"attention", *CONTROLS} - (set() if votes else {"majority"})
        texts = [candidate["response"] for candidate in candidates]
        if not votes:  # what was drawn may be cut off, which a text does not tell
            fields = {"context": record["context"], "question": record["question"], "answers": record["answers"]}
            scored = adhere.score(policy, [{**fields, "response": text} for text in texts], template=TEMPLATE)
            rewards_given = [candidate["scores"]["attention"] for candidate in candidates]
            assert rewards_given == pytest.approx([one["reward"] for one in scored], abs=1e-4)
        for candidate in candidates:
            if votes:
                assert candidate["right"] == contains_answer(candidate["response"], record["answers"])
                assert candidate["true"] == contains_answer(candidate["response"], ROWS[about["question"]]["answers"])
            if "evidence_hit" in candidate:
                assert candidate["evidence_hit"].keys() == HEADS.keys()
    again = summarise(json.loads(json.dumps(found.records)))
    assert again.to_json() == found.to_json()


def test_a_sample_is_right_as_the_option_says(policy: Policy) -> None:
    config = BenchConfig(splits=("samples",), num_samples=4, max_new_tokens=8, match="equal")
    found = bench(policy, rows_of(ROWS, COLUMNS), made(policy), copy_heads(policy), config, columns=COLUMNS)
    for record in found.records:
        for candidate in record["candidates"]:
            assert candidate["right"] == is_answer(candidate["response"], record["answers"])


def stopping(items: Iterable[T], title: str, *_: int, **__: Any) -> Iterator[T]:
    """A `Progress` that ends a bench after two batches, as Ctrl-C would."""
    for count, item in enumerate(items):
        if title == "benching" and count == 2:
            raise KeyboardInterrupt
        yield item


def test_what_is_benched_does_not_depend_on_where_it_stopped(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BenchConfig(num_samples=2, max_new_tokens=4, batch_size=2)
    heads, rewards, rows = copy_heads(policy), made(policy), rows_of(ROWS, COLUMNS)

    def run(cache: BatchCache | None) -> list[dict[str, Any]]:
        return list(bench(policy, rows, rewards, heads, config, columns=COLUMNS, cache=cache).records)

    cache = BatchCache.open(tmp_path / "out", {"a": 1}, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "progress", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(cache)
    cache = BatchCache.open(tmp_path / "out", {"a": 1}, resume=True)
    assert len(cache.batches) == 2
    assert run(cache) == run(None)


@pytest.mark.parametrize("model", ["toy-causal", "toy-encdec"])
def test_the_command_writes_figures_and_rows_that_rank_reads_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    more = ["--reward", "attention", "grounding", "--limit", "4", "--json"]
    assert main(arguments(data, output, *more, model=model)) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found == json.loads((output / "bench.json").read_text())
    assert found["questions"] == 4 and found["cases"]["distractor"] == 4
    assert found["pairs"]["distractor"].keys() == {"attention", "grounding", *CONTROLS} - {"majority"}
    assert found["pairs"]["distractor"]["overlap"]["mean"] == 0.5  # both places are in the story
    assert found["differences"]["grounding"]["swapped"].keys() >= {"attention", "overlap"}
    assert found["settings"]["rewards"]["grounding"]["weights"] == {"grounding": 1.0} and found["fingerprint"]
    assert "grounding: how far ahead" in captured.err
    assert [file.name for file in sorted(output.iterdir())] == ["bench.json", "rows.jsonl"]

    ranked = tmp_path / "ranked.jsonl"
    rank = ["rank", "--model", model, "--prompts", str(output / "rows.jsonl"), "--output", str(ranked), "--keep", "all"]
    assert main([*rank, "--template", TEMPLATE, "--reward", "attention", "--device", "cpu", "--quiet"]) == 0
    lines = [json.loads(line) for line in ranked.read_text().splitlines()]
    assert len(lines) == len((output / "rows.jsonl").read_text().splitlines())
    assert main(arguments(data, output)) == 2
    assert "already holds a bench" in capsys.readouterr().err


def test_a_table_fits_a_terminal_of_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert main(arguments(data, tmp_path / "out", "--reward", "comprehensiveness", "--quiet")) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_it_is_said_when_most_samples_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    more = ["--max-new-tokens", "1", "--splits", "samples", "--json"]
    assert main(arguments(data, tmp_path / "out", *more)) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cut_off"] == 1.0
    assert "warning: 100% of the samples were cut off" in captured.err


def refused(capsys: pytest.CaptureFixture[str], output: Path, *told: str) -> None:
    error = capsys.readouterr().err
    assert [words for words in told if words not in error] == [], error
    assert not output.exists()


def test_rows_that_cannot_be_benched_are_told_by_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    data = jsonl(tmp_path / "rows.jsonl", [{"question": "where is w1 ?", "answers": ["w2"]}, ROWS[0],
                                           {**ROWS[1], "answers": []}, {**ROWS[1], "context": " "}])  # fmt: skip
    plain = ["bench", "--model", "toy-causal", "--data", str(data), "--output", str(output)]
    assert main(plain) == 2
    refused(capsys, output, f"{data}:1: no `context`", f"{data}:3: no `answers`", f"{data}:4: no `context`")
    fixed = jsonl(tmp_path / "fixed.jsonl", [{**ROWS[0], "prompt": "where is mary ?"}])
    assert main(["bench", "--model", "toy-causal", "--data", str(fixed), "--output", str(output)]) == 2
    refused(capsys, output, f"{fixed}:1: the prompt does not change with `context`; put {{context}} where")
    many = jsonl(tmp_path / "many.jsonl", [{"question": "where ?", "answers": ["w2"]}] * 30)
    assert main(["bench", "--model", "toy-causal", "--data", str(many), "--output", str(output)]) == 2
    refused(capsys, output, f"{many}:20: no `context`", "… and 10 more")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--splits", "swaped"], "did you mean swapped"),
        (["--reward", "atention"], "did you mean attention"),
        (["--num-samples", "1"], "set it to 2 or above"),
        (["--max-new-tokens", "5000"], "do not fit the model's context"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_options_that_make_no_sense_write_nothing(
    more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "out", *more)) == 2
    refused(capsys, tmp_path / "out", told)


def test_in_python_rewards_have_names_and_forms_of_ones_own(policy: Policy) -> None:
    def brief(evidence: Any) -> torch.Tensor:
        return -evidence.reading.rollout.lengths.float()

    found = adhere.bench(policy, ROWS, rewards={"brief": brief, "mine": {"weights": {"overlap": 1.0}}},
                         limit=2, splits=["unchanged"], template=TEMPLATE)  # fmt: skip
    assert found.pairs["empty"]["brief"].mean == 0.0 and found.cases == {"unchanged": 2}
    assert set(found.pairs["empty"]) == {"brief", "mine", "attention", *CONTROLS} - {"majority"}
    with pytest.raises(UserError, match="row 1: no `context`"):
        adhere.bench(policy, ["where is mary ?"])
