"""Ranking: candidates from the policy, from rows or from a server; what is written; killed and resumed; bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

import adhere
from adhere.cli import main
from adhere.data import Row, iter_rows, writable
from adhere.integrations import http
from adhere.model.policy import Policy
from adhere.ranking import Ranked, blank_between, rank, sampled_candidates
from adhere.ranking_settings import RankConfig
from adhere.resume import JOURNAL, GrowingRows
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import save, tokenizer
from tests.test_openai import choices, failing, serving, url

CAUSAL = model_path("causal")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def stories(tmp_path):
    return jsonl(tmp_path / "stories.jsonl", make_rows("conflict", "test", 10))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(prompts, output, *more, model=CAUSAL):
    given = ["--model", str(model), "--prompts", str(prompts), "--output", str(output), "--device", "cpu"]
    return main(["rank", *given, "--max-new-tokens", "6", *more])


def test_best_keeps_each_row_in_order_with_its_best_response(stories, tmp_path, capsys):
    for keep in ("best", "all"):
        assert run(stories, tmp_path / keep, "--keep", keep, "--num-samples", "4", "--batch-size", "3", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["prompts"] == told["lines"] == 10 and told["left_out"] == 0
    best, every = read(tmp_path / "best"), read(tmp_path / "all")
    for row, kept, ranked in zip(read(stories), best, every, strict=True):
        assert row.items() <= kept.items() and ranked["prompt"] == row["prompt"]
        rewards = [candidate["reward"] for candidate in ranked["candidates"]]
        assert len(rewards) == 4 and rewards == sorted(rewards, reverse=True)
        assert ranked["candidates"][0] == {name: kept[name] for name in ("response", "reward", "signals", "evidence")}
    assert told["means"]["best"] == pytest.approx(sum(row["reward"] for row in best) / 10)
    assert told["means"]["all candidates"] < told["means"]["best"]
    assert not list(tmp_path.glob("*.partial"))


def test_ranked_samples_are_the_policys_own_and_score_as_a_rollout_does(stories):
    policy = Policy.load(model_path("causal"), device="cpu")
    reward = Reward.resolve({"weights": {"coherence": 1.0}, "normalise": "none"}, policy)
    config = RankConfig(num_samples=3, batch_size=4)
    for batch in rank(reward, list(iter_rows(stories)), config, sampled_candidates(policy, config)):
        for ranked in batch:
            texts = [candidate["response"] for candidate in ranked.candidates]
            again = reward.score([ranked.row.prompt] * len(texts), texts).reward
            expected = torch.tensor([candidate["reward"] for candidate in ranked.candidates])
            torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_pairs_are_best_against_worst_and_what_is_left_out_is_said(stories, tmp_path, capsys):
    assert run(stories, tmp_path / "all", "--keep", "all") == 0
    assert run(stories, tmp_path / "pairs", "--keep", "pairs", "--margin", "1.0") == 0
    err = capsys.readouterr().err
    pairs, expected = read(tmp_path / "pairs"), []
    for ranked in read(tmp_path / "all"):
        best, worst = ranked["candidates"][0], ranked["candidates"][-1]
        margin = best["reward"] - worst["reward"]
        if margin >= 1.0:
            texts = {"chosen": f" {best['response']}", "rejected": f" {worst['response']}"}
            expected.append({"prompt": ranked["prompt"], **texts, "margin": margin})
    assert pairs == expected and 0 < len(pairs) < 10
    assert f"{len(pairs)} pairs; {10 - len(pairs)} prompts left out" in err


def candidate(text, reward):
    return {"response": text, "reward": reward, "signals": {}}


def pair(best, worst, margin=0.0, prompt="a ?"):
    return Ranked(Row(prompt), (candidate(*best), candidate(*worst))).pair(margin, lambda _prompt, _text: " ")


def test_a_pair_needs_a_margin_and_two_texts():
    assert pair(("x", 1.0), ("y", 0.5), 0.5) == {"prompt": "a ?", "chosen": " x", "rejected": " y", "margin": 0.5}
    assert pair(("x", 1.0), ("y", 0.5), 0.6) is None
    assert pair(("x", 1.0), ("y", 1.0)) is None
    assert pair(("x", 1.0), (" x", 0.0)) is None


def test_a_conversation_stays_one():
    prompt = [{"role": "user", "content": "a ?"}]
    found = pair(("x", 1.0), ("y", 0.0), prompt=prompt)
    assert found["prompt"] == prompt
    assert found["chosen"] == [{"role": "assistant", "content": "x"}]
    assert found["rejected"] == [{"role": "assistant", "content": "y"}]


@drawn(st.lists(st.tuples(st.text(max_size=3), st.floats(-5, 5)), min_size=1, max_size=6), st.floats(0, 3))
def test_a_pair_never_breaks_its_promise(found, margin):
    ranked = Ranked(Row("a"), tuple(candidate(*one) for one in sorted(found, key=lambda one: -one[1])))
    made = ranked.pair(margin, lambda _prompt, _text: "")
    if made is not None:
        rewards = {text: reward for text, reward in reversed(sorted(found, key=lambda one: -one[1]))}
        assert made["margin"] >= margin and made["margin"] > 0 and made["chosen"] != made["rejected"]
        assert rewards[made["chosen"]] == max(reward for _, reward in found)


def test_the_blank_makes_the_joint_text_read_as_it_was_scored():
    policy = Policy.load(model_path("causal"), device="cpu")
    between = blank_between(policy)
    assert between("where is mary ? answer :", "garden") == " "
    assert between("where is mary ? answer : ", "garden") == ""


def test_conversations_are_ranked_and_an_old_answer_makes_way(model, tmp_path):
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(model)
    turns = [{"role": "user", "content": "where is mary ?"}, {"role": "assistant", "content": "garden"}]
    rows = jsonl(tmp_path / "chat.jsonl", [{"messages": turns, "id": 7}])
    assert run(rows, tmp_path / "best", "--reward", "certainty", model=model) == 0
    kept = read(tmp_path / "best")[0]
    assert kept["messages"] == turns[:1] and kept["id"] == 7 and isinstance(kept["response"], str)
    assert run(rows, tmp_path / "pairs", "--reward", "certainty", "--keep", "pairs", model=model) == 0
    made = read(tmp_path / "pairs")[0]
    assert made["prompt"] == turns[:1] and made["chosen"][0].keys() == {"role", "content"}
    assert len(list(iter_rows(tmp_path / "best"))) == 1  # what was written can be read again


def test_candidates_of_the_rows_are_ranked_and_can_be_ranked_again(tmp_path):
    prompt = "mary went to the garden . john is in the office . where is mary ? answer :"
    rows = [
        {"prompt": prompt, "candidates": ["office", "garden", "kitchen"]},
        {"prompt": prompt, "candidates": ["yard"]},
    ]
    given = jsonl(tmp_path / "given.jsonl", rows)
    assert run(given, tmp_path / "all", "--keep", "all") == 0
    found = read(tmp_path / "all")
    assert found[0]["candidates"][0]["response"] == "garden"
    assert sorted(one["response"] for one in found[0]["candidates"]) == ["garden", "kitchen", "office"]
    assert [one["response"] for one in found[1]["candidates"]] == ["yard"]
    assert run(tmp_path / "all", tmp_path / "again", "--keep", "all") == 0
    assert read(tmp_path / "again") == found


def test_candidates_come_from_a_server_and_a_cut_one_did_not_end(tmp_path):
    rows = jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "where is mary ? answer :"}, {"prompt": "where is john ? answer :"}]
    )
    reward = tmp_path / "reward.yaml"
    reward.write_text("weights: {length: 1.0}\nnormalise: none\ngates: [ended]\n")
    with serving(choices) as server:
        more = ["--server", url(server), "--server-model", "m", "--num-samples", "3", "--reward", str(reward)]
        assert run(rows, tmp_path / "out", "--keep", "all", *more) == 0
    for row, ranked in zip(read(rows), read(tmp_path / "out"), strict=True):
        texts = {one["response"].split()[-1]: one for one in ranked["candidates"]}
        assert all(one["response"].startswith(row["prompt"]) for one in ranked["candidates"])
        # The one that was cut has no end token, and stands behind the gate.
        assert texts["1"]["signals"]["length"] == texts["0"]["signals"]["length"] - 1
        assert texts["1"]["reward"] < texts["0"]["reward"]


def test_a_server_that_fails_midway_leaves_what_a_resumed_run_goes_on_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"where is mary ? {word}"} for word in ("the", "in", "is")])
    more = ["--server-model", "m", "--num-samples", "2", "--reward", "length", "--batch-size", "1"]
    with serving(choices, choices, failing(500), choices) as server:
        address = ["--server", url(server)]
        assert run(rows, tmp_path / "out", *address, *more) == 1
        err = capsys.readouterr().err
        assert "HTTP 500" in err and "2 of 3 prompts are kept" in err and not (tmp_path / "out").exists()
        assert run(rows, tmp_path / "out", *address, *more, "--resume") == 0
    assert len(server.seen) == 4 and len(read(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    prompts = jsonl(tmp_path / "stories.jsonl", make_rows("conflict", "test", 160))
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = ["--keep", "pairs", "--margin", "0.5", "--batch-size", "4"]
    assert run(prompts, whole, *options, "--quiet") == 0
    given = ["--model", str(model_path("causal")), "--prompts", str(prompts), "--output", str(killed)]
    command = [sys.executable, "-m", "adhere", "rank", *given, "--device", "cpu", "--max-new-tokens", "6", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "killed.jsonl.partial" / JOURNAL

    def done():  # the last line may be half written
        lines = journal.read_text().splitlines()[1:-1] if journal.exists() else []
        return json.loads(lines[-1])["done"] if lines else 0

    try:
        while done() < 20:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not killed.exists() and done() < 156
    with (journal.parent / "rows.jsonl").open("ab") as file:
        file.write(b'{"prompt": "half a l')  # what a write cut short would leave
    assert run(prompts, killed, *options, "--quiet") == 2  # not silently begun anew
    assert run(prompts, killed, *options, "--quiet", "--resume") == 0
    assert killed.read_bytes() == whole.read_bytes() and not journal.parent.exists()


def interrupted(prompts, output, monkeypatch):
    """A run that meets Ctrl-C after its first batch."""
    add = GrowingRows.add

    def add_and_stop(self, rows, done, tally):
        add(self, rows, done, tally)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(GrowingRows, "add", add_and_stop)
            return run(prompts, output)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_says_how_to_go_on(stories, tmp_path, capsys, monkeypatch):
    assert interrupted(stories, tmp_path / "out", monkeypatch) == 130
    assert "interrupted at prompt 8 of 10; the same command with --resume" in capsys.readouterr().err
    assert run(stories, tmp_path / "out", "--resume", "--num-samples", "4") == 2
    assert "num_samples was 8, is 4" in capsys.readouterr().err
    assert run(stories, tmp_path / "out", "--resume") == 0
    assert run(stories, tmp_path / "whole") == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert run(stories, tmp_path / "out", "--resume") == 2  # finished: never overwritten
    assert "already exists" in capsys.readouterr().err


def test_interrupted_before_the_first_batch_there_is_nothing_to_go_on_with(stories, tmp_path, capsys, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(GrowingRows, "add", pressed)
    assert run(stories, tmp_path / "out") == 130
    assert "interrupted at prompt 0 of 10; nothing is written yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [stories]


ROW = {"prompt": "where is mary ?"}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([ROW, {"text": "a"}], [], "rows.jsonl:2: no `prompt`"),
        ([ROW, {"prompt": "w1 " * 200}], [], "rows.jsonl:2: the prompt has 200 tokens"),
        ([ROW, {"prompt": "w1 " * 125}], [], "rows.jsonl:2: prompt and 6 new tokens do not fit"),
        ([{**ROW, "candidates": ["a"]}, ROW], [], "rows.jsonl:2: no `candidates`, which 1 of 2 rows bring"),
        ([{**ROW, "candidates": []}], [], "rows.jsonl:1: `candidates` is an empty list"),
        ([{**ROW, "candidates": "a"}], [], "rows.jsonl:1: `candidates` is text"),
        ([{**ROW, "candidates": ["a", 7]}], [], "rows.jsonl:1: `candidates` holds a number"),
        ([{**ROW, "candidates": [{"reward": 1}]}], [], "rows.jsonl:1: `candidates` holds null"),
        ([{**ROW, "candidates": ["w1 " * 200]}], [], "rows.jsonl:1: prompt and a response of 201 tokens"),
        ([{**ROW, "candidates": ["a"]}], ["--server", "http://127.0.0.1:1"], "the rows bring candidates"),
        ([ROW], ["--server-model", "m"], "--server-model without --server"),
        ([ROW], ["--server", "nowhere"], "nowhere: is no address of a server"),
        ([ROW], ["--reward", "exact"], "rows.jsonl:1: no `answers`"),
        ([ROW], ["--reward", "attentoin"], "did you mean attention"),
        ([ROW], ["--keep", "worst"], "worst"),
        ([ROW], ["--keep", "pairs", "--num-samples", "1"], "a pair needs two candidates"),
        ([ROW], ["--keep", "pairs", "--margin", "-1"], "margin is -1"),
        ([ROW], ["--margin", "1"], "margin is for pairs"),
        ([ROW], ["--temperature", "0"], "at temperature 0 all 8 candidates are the same"),
        ([ROW], ["--num-samples", "0"], "num_samples is 0"),
        ([ROW], ["--batch-size", "0"], "batch_size is 0"),
        ([ROW], ["--resume"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(model, tmp_path, capsys, rows, flags, message):
    prompts = jsonl(tmp_path / "rows.jsonl", rows)
    assert run(prompts, tmp_path / "out", *flags, model=model) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_run_killed_before_its_rows_got_their_name_only_names_them(stories, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GrowingRows, "finish", lambda self: None)
        assert run(stories, tmp_path / "out") == 0
    rows = (tmp_path / "out.partial" / "rows.jsonl").read_bytes()
    assert run(stories, tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out").read_bytes() == rows and not (tmp_path / "out.partial").exists()


def test_an_output_that_is_there_is_left_alone(stories, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run(stories, tmp_path / "out") == 2
    assert "already exists" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"
    assert run(stories, tmp_path) == 2
    assert "already exists" in capsys.readouterr().err


def test_damaged_leftovers_are_refused(stories, tmp_path, capsys):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / JOURNAL).write_text('{"done": 4}\n')
    assert run(stories, tmp_path / "out", "--resume") == 2
    assert "damaged" in capsys.readouterr().err


def test_other_prompts_cannot_go_on_with_a_ranking(stories, tmp_path, capsys, monkeypatch):
    assert interrupted(stories, tmp_path / "out", monkeypatch) == 130
    jsonl(stories, make_rows("agree", "test", 10))
    assert run(stories, tmp_path / "out", "--resume") == 2
    assert "prompts was" in capsys.readouterr().err


def test_other_answers_or_weights_of_another_type_cannot_go_on(stories, tmp_path, capsys, monkeypatch):
    assert interrupted(stories, tmp_path / "out", monkeypatch) == 130
    for flags, named in ((["--answers-field", "kind"], "prompts was"), (["--dtype", "bfloat16"], "dtype was")):
        assert run(stories, tmp_path / "out", "--resume", *flags) == 2
        assert named in capsys.readouterr().err


def test_what_json_cannot_hold_is_told_before_anything_is_ranked(tmp_path, capsys):
    file, table = tmp_path / "rows.parquet", {"prompt": ["a", "b"], "when": [date(2020, 1, 2)] * 2}
    parquet.write_table(arrow.table(table), file)
    assert writable(next(iter_rows(file))) == '["a", [], {"prompt": "a", "when": "2020-01-02"}]'
    parquet.write_table(arrow.table({**table, "picture": [b"1", b"2"]}), file)
    assert run(file, tmp_path / "out") == 2
    told = "rows.parquet:row 1: `picture` cannot be written as JSON (bytes has no JSON form); leave that column out"
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_not_set_is_sampled_as_the_models_configuration_says(tmp_path, capsys):
    folder = save("llama", tmp_path / "model")
    written = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**written, "do_sample": True, "top_k": 1}))
    policy = Policy.load(folder, device="cpu")
    row = {"prompt": "where is mary ?"}

    def said(**given):
        (ranked,) = adhere.rank(policy, [row], reward="certainty", num_samples=4, max_new_tokens=4, **given)
        return {candidate["response"] for candidate in ranked.candidates}

    assert len(said()) == 1 < len(said(top_k=0)) and len(said(sampling={"temperature": 0.9})) == 1
    source, ranked = tmp_path / "rows.jsonl", tmp_path / "ranked.jsonl"
    source.write_text(json.dumps(row) + "\n")
    arguments = ["rank", "--model", str(folder), "--prompts", str(source), "--reward", "certainty", "--keep", "all"]
    assert main([*arguments, "--output", str(ranked), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    (line,) = map(json.loads, ranked.read_text().splitlines())
    assert len({candidate["response"] for candidate in line["candidates"]}) == 1
    (folder / "generation_config.json").write_text(json.dumps({**written, "min_p": 0.1}))
    assert main([*arguments, "--output", str(tmp_path / "again.jsonl"), "--device", "cpu"]) == 2
    assert "min_p (0.1)" in capsys.readouterr().err and not (tmp_path / "again.jsonl").exists()
