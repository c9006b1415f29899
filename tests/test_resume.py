"""Going on with what was stopped: killed, resumed, and equal to an unbroken run bit by bit; and all that is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adhere.cli import main
from adhere.errors import UserError
from adhere.files import append_jsonl
from adhere.resume import (
    JOURNAL,
    GrowingRows,
    Journal,
    fingerprint,
    finished,
    new_run_dir,
    require_same,
    truncate_jsonl,
)
from tests.families import save

ROWS = [
    {
        "prompt": f"w{i} is in the w{i + 1} . where is w{i} ?",
        "answers": [f"w{i + 1}"],
        "follow_up": "w3 w4",
        "paraphrases": [f"where is w{i} ?"],
    }
    for i in range(24)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen2", tmp_path_factory.mktemp("models") / "other")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def given(model: Path, other: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    flags = ["--num-samples", "2", "--max-new-tokens", "16", "--batch-size", "1", "--judge", "certainty"]
    paths = ["--model", str(model), "--baseline", str(other), "--prompts", str(prompts), "--output", str(out)]
    return ["eval", *paths, *flags, "--device", "cpu", "--quiet", *more]


def test_a_killed_evaluation_goes_on_to_the_very_same_bytes(
    model: Path, other: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    kept = broken / "unfinished" / JOURNAL
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    code = threads + "import sys; from adhere.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given(model, other, prompts, broken)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if kept.exists() and kept.read_bytes().count(b"\n") > 3:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (broken / "results.json").exists()
    done = [json.loads(line)["name"] for line in kept.read_bytes().splitlines()[1:-1]]
    assert 2 <= len(done) < 72 and done[0] == "before/0"
    with kept.open("ab") as file:  # as if it had been killed while it wrote
        file.write(b'{"name": "after 23", "ba')

    arguments = given(model, other, prompts, broken)
    assert main(arguments) == 2
    assert f"{kept.parent}: is unfinished; add --resume" in capsys.readouterr().err
    for flag, value, told in (
        ("--seed", "9", "seed was 0, is 9"),
        ("--limit", "3", "prompts was "),
        ("--judge", "length", "judge was certainty, is length"),
        ("--dtype", "bfloat16", "dtype was "),
    ):
        assert main([*arguments, "--resume", flag, value]) == 2
        assert f"began with other settings: {told}" in capsys.readouterr().err
    assert main(given(other, model, prompts, broken, "--resume")) == 2
    assert f"model was {model}, is {other}" in capsys.readouterr().err

    assert main([*arguments, "--resume"]) == 0
    assert main(given(model, other, prompts, whole)) == 0
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    kept = {"results.json", "attention.json", "origin.json", "report.html"}
    assert {path.name for path in broken.iterdir()} == kept
    assert (broken / "attention.json").read_bytes() == (whole / "attention.json").read_bytes()
    assert main([*arguments, "--resume"]) == 2
    assert "already holds results" in capsys.readouterr().err


# What every kind of work shares

B = {"name": "b", "text": ""}
SETTINGS = {"model": "m", "sampling": {"top_k": 50, "temperature": 1.0}}


def journal(folder: Path, resume: bool = False, **settings: object) -> Journal:
    return Journal(folder / "out", {**SETTINGS, **settings}, ("name", "text"), resume=resume)


def test_a_journal_goes_on_after_its_last_whole_entry(tmp_path: Path) -> None:
    first = journal(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing is written before there is something to keep
    first.add({"name": "a", "text": "line separator \u2028 and half a pair \ud800"})
    first.add(B)
    with first.file.open("ab") as file:
        file.write(b'{"name": "c", "te')
    again = journal(tmp_path, resume=True)
    assert again.entries == [{"name": "a", "text": "line separator \u2028 and half a pair \ud800"}, B]
    again.add({"name": "c", "text": ""})
    assert [entry["name"] for entry in journal(tmp_path, resume=True).entries] == ["a", "b", "c"]
    again.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", range(0, 40, 3))
def test_a_journal_killed_within_its_first_line_begins_anew(tmp_path: Path, size: int) -> None:
    journal(tmp_path).begin()
    file = tmp_path / "out" / JOURNAL
    file.write_bytes(file.read_bytes()[:size])
    other = journal(tmp_path, resume=True, model="other")
    assert other.entries == []
    other.add(B)
    assert journal(tmp_path, resume=True, model="other").entries == [B]


def test_other_settings_are_told_one_by_one_with_both_values(tmp_path: Path) -> None:
    journal(tmp_path).add(B)
    with pytest.raises(UserError) as error:
        journal(tmp_path, resume=True, seed=3, sampling={"top_k": 20, "temperature": 1.0})
    assert str(error.value) == (
        f"{tmp_path / 'out'}: began with other settings: sampling.top_k was 50, is 20; seed was None, is 3; "
        "give those it began with, or remove this folder"
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"settings": 3}\n',
        '{"name": "a"}\n',
        "3\n",
        "{\n",
        "\xff\n",
        '{"settings": {}}\n{"nam": "a"}\n',
        '{"settings": {}}\n3\n',
        '{"settings": {}}\n{"na\n{"name": "a"}\n',
    ],
)
def test_a_damaged_journal_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"out: is damaged, and cannot be resumed; remove it and begin anew"):
        journal(tmp_path, resume=True)


def test_unfinished_work_is_neither_begun_anew_nor_resumed_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: nothing to resume: it is not there; leave --resume out"):
        journal(tmp_path, resume=True)
    journal(tmp_path).begin()
    with pytest.raises(UserError, match=r"out: is unfinished; add --resume, or remove this folder"):
        journal(tmp_path)


def test_rows_beyond_the_last_entry_are_cut_off_and_missing_ones_are_damage(tmp_path: Path) -> None:
    rows = GrowingRows(tmp_path / "out", {})
    rows.add([{"a": 1}], 1, {"sum": 1.0})
    with (rows.folder / "rows.jsonl").open("ab") as file:
        file.write(b'{"a": "never told of"}\n{"a": ')
    again = GrowingRows(tmp_path / "out", {}, resume=True)
    assert (again.done, again.tally) == (1, {"sum": 1.0})
    again.add([{"a": 2}], 2, {"sum": 3.0})
    whole = (rows.folder / "rows.jsonl").read_bytes()
    assert whole == b'{"a": 1}\n{"a": 2}\n'
    for damaged in (whole[:-1], whole.replace(b"2", b"3"), b""):
        (rows.folder / "rows.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.jsonl: is damaged"):
            GrowingRows(tmp_path / "out", {}, resume=True)
    (rows.folder / "rows.jsonl").write_bytes(whole)
    GrowingRows(tmp_path / "out", {}, resume=True).finish()
    assert (tmp_path / "out").read_bytes() == whole and not rows.folder.exists()


def test_a_result_counts_as_finished_only_with_the_settings_that_made_it(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert not finished(result, SETTINGS, where=tmp_path, fix="x")
    result.write_text(json.dumps({"settings": SETTINGS, "reward": 1.0}))
    assert finished(result, SETTINGS, where=tmp_path, fix="x")
    with pytest.raises(UserError, match=r"model was m, is n; remove it$"):
        finished(result, {**SETTINGS, "model": "n"}, where=tmp_path, fix="remove it")
    for text in ("{", "[]", "{}", '{"settings": 3}'):
        result.write_text(text)
        with pytest.raises(UserError, match=r"result\.json: is damaged"):
            finished(result, SETTINGS, where=tmp_path, fix="x")


def test_settings_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    begun = json.loads(json.dumps({"seeds": [1, 2], "path": "a/b"}))
    require_same(begun, {"seeds": (1, 2), "path": Path("a/b")}, where=tmp_path, fix="x")
    assert fingerprint("a\ud800") == fingerprint(b"a\\ud800") != fingerprint("a")


def test_resuming_keeps_the_rows_up_to_a_step_and_drops_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        append_jsonl(path, {"step": step, "kl": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 5, "k')
    assert [row["step"] for row in truncate_jsonl(path, lambda row: row["step"] < 3)] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert len(truncate_jsonl(path)) == 3
    assert truncate_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("rest", ["", '{"step": 2}\n'])
def test_a_line_that_is_broken_though_finished_is_an_error(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n' + rest)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not JSON"):
        truncate_jsonl(path)


def test_a_complete_last_row_without_a_newline_is_kept_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    assert len(truncate_jsonl(path)) == 2
    append_jsonl(path, {"step": 2})
    assert len(path.read_text().splitlines()) == 3


def test_a_new_run_needs_a_folder_without_one(tmp_path: Path) -> None:
    run = new_run_dir(tmp_path / "runs" / "a")
    assert run.is_dir()
    assert new_run_dir(run) == run
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match="already holds a run; add --resume or choose another --output"):
        new_run_dir(run)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, the folder of a run was expected"):
        new_run_dir(tmp_path / "file")


def test_resuming_needs_a_run_and_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume: it is not there; leave --resume out"):
        new_run_dir(tmp_path / "a", resume=True)
    run = new_run_dir(tmp_path / "a")
    assert new_run_dir(run, resume=True) == run  # killed before anything was written
    (run / "checkpoints" / ".step-2.12345678.partial").mkdir(parents=True)
    assert new_run_dir(run, resume=True) == run
    assert list((run / "checkpoints").iterdir()) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="nothing to resume: no run in it; choose the folder of a run"):
        new_run_dir(tmp_path / "other", resume=True)
