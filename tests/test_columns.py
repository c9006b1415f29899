"""Rows whose fields have names of their own, rows in folders, and rows by the million: each form through every reader,
and every misnamed field as one line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest

from adhere.cli import main
from adhere.commands import COMMANDS
from adhere.data import Columns, iter_rows, read_rows
from adhere.errors import UserError
from tests.families import save

OWN = Columns(prompt_field="text", answers_field="gold")
ROWS = [{"text": f"w{i} is in the w{i + 1} . where is w{i} ?", "gold": f"w{i + 1}"} for i in range(6)]
PROMPTS = [row["text"] for row in ROWS]
GOLD = [(row["gold"],) for row in ROWS]


def written(folder: Path, form: str, rows: Iterable[dict[str, Any]] = ROWS) -> str:
    """`rows` in one of the forms that are read; what names them."""
    data = datasets.Dataset.from_list(list(rows))
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        data.to_csv(path)
    elif form == "parquet":
        data.to_parquet(path, batch_size=1000)
    elif form == "saved":
        data.save_to_disk(path)
    elif form == "saved splits":
        datasets.DatasetDict({"train": data.select([0]), "dev": data}).save_to_disk(path)
        return f"{path}:dev"
    else:
        (path / "data").mkdir(parents=True)
        for part in range(parts := len(data) // 4000 or 1):
            data.shard(parts, part).to_parquet(path / "data" / f"train-{part:05d}.parquet", batch_size=1000)
    return str(path)


FORMS = ["jsonl", "csv", "parquet", "saved", "saved splits", "files"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_with_names_of_its_own(tmp_path: Path, form: str) -> None:
    source = written(tmp_path, form)
    rows = read_rows(source, OWN)
    assert [row.prompt for row in rows] == PROMPTS and [row.answers for row in rows] == GOLD
    assert [row.prompt for row in read_rows(source, OWN, limit=2)] == PROMPTS[:2]
    assert rows[0].where == f"{source}:{'1' if form == 'jsonl' else '2' if form == 'csv' else 'row 1'}"
    with pytest.raises(UserError) as caught:
        read_rows(source, Columns(prompt_field="txt"))
    first = str(caught.value).splitlines()[0]
    assert first == f"{rows[0].where}: no `txt`, which prompt_field names; did you mean text?"


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "saved", "files"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, form: str) -> None:
    def peak(count: int) -> tuple[int, int]:
        # Different words in every row, so that Parquet finds nothing to fold together.
        made = [{"text": f"{n} {hash((n, 'x'))} " * 20} for n in range(count)]
        (tmp_path / str(count)).mkdir()
        source, pool, held = written(tmp_path / str(count), form, made), arrow.default_memory_pool(), 0
        del made
        before = pool.bytes_allocated()
        tracemalloc.start()
        number = 0
        for _ in iter_rows(source, Columns(prompt_field="text")):
            number, held = number + 1, max(held, pool.bytes_allocated() - before)
        _, python = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert number == count
        return python, held

    few, many = peak(4_000), peak(16_000)
    assert many[0] < 1.5 * few[0] + 1_000_000 and many[1] < 1.5 * few[1] + 1_000_000


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    source = written(tmp_path, "saved splits")
    with pytest.raises(UserError, match=r"rows\.saved splits: unknown split 'dew'; did you mean dev\?"):
        read_rows(source.replace(":dev", ":dew"))
    assert len(read_rows(source.removesuffix(":dev"), OWN)) == 1  # train, unless another is named
    source = written(tmp_path, "saved")
    with pytest.raises(UserError, match=r"rows\.saved: one data set, without splits; leave :dev out"):
        read_rows(f"{source}:dev")
    source = written(tmp_path, "files")
    with pytest.raises(UserError, match=r"cannot be loaded \(Bad split: dev\. Available splits: \['train'\]\)"):
        read_rows(f"{source}:dev")


def test_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder that cannot be loaded \(.*doesn't contain any data files\); give a"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "`text`, which prompt_field names, is empty; write some text"),
        ({"text": " "}, "`text` is empty; write some text"),
        ({"text": 3}, '`text` is a number; write text, e.g. "text": "…"'),
        ({"text": []}, '`text` is empty; write [{"role": "user", "content": "…"}]'),
        ({"text": "a"}, "no `gold`, which answers_field names; choose one of text"),
        ({"text": "a", "golden": "b"}, "no `gold`, which answers_field names; did you mean golden?"),
        ({"text": "a", "gold": 3}, "`gold` holds a number"),
        ({}, "no `text`, which prompt_field names; the row is empty"),
    ],
)
def test_a_row_that_the_columns_do_not_fit(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        read_rows(path, OWN)
    assert str(caught.value).startswith(f"{path}:1: {message}")


def test_a_prompt_field_may_hold_messages_and_goes_before_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": turns, "prompt": "unused", "gold": None, "answers": ["unused"]}))
    row = read_rows(path, OWN)[0]
    assert (row.prompt, row.response, row.answers) == (turns[:1], "Hello", ())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_field": "a", "template": "{b}"}, "prompt_field and template both say what the prompt is; leave one"),
        ({"prompt_field": ""}, "prompt_field is empty; write the name of a field"),
        ({"answers_field": ""}, "answers_field is empty"),
    ],
)
def test_columns_that_make_no_sense(columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Columns(**columns)


READING = (
    "train",
    "audit",
    "bench",
    "score",
    "check",
    "rank",
    "inspect",
    "eval",
    "calibrate",
    "heads",
    "preferences make|fit",
)


def test_every_command_that_reads_rows_takes_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert {name.split()[0] for name in READING} | {"demo", "compare", "serve"} == COMMANDS.keys()
    for name in READING:
        for action in name.partition(" ")[2].split("|"):
            assert main([name.split()[0], *filter(None, [action]), "--help"]) == 0
            text = capsys.readouterr().out
            assert all(flag in text for flag in ("--prompt-field", "--answers-field", "--template"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "model")


def test_training_reads_names_from_flags_and_yaml(model: Path, tmp_path: Path, capsys: Any) -> None:
    source = written(tmp_path, "csv")
    settings = tmp_path / "run.yaml"
    settings.write_text("columns: {prompt_field: text, answers_field: gold}\nsteps: 1\nreward: exact\n")
    given = ["train", "--model", str(model), "--prompts", source, "--config", str(settings), "--device", "cpu"]
    given += ["--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "3", "--skip-audit", "--quiet"]
    assert main([*given, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    out = ["--output", str(tmp_path / "other")]
    assert main([*given, *out, "--prompt-field", "txt"]) == 2
    assert f"{source}:2: no `txt`, which prompt_field names; did you mean text?" in capsys.readouterr().err
    assert main([*given, *out, "--template", "{text}"]) == 2
    assert "prompt_field and template both say what the prompt is; leave one of them out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_scoring_reads_names_too(model: Path, tmp_path: Path) -> None:
    source = written(tmp_path, "jsonl", [{**row, "response": "w1"} for row in ROWS])
    given = ["score", "--model", str(model), "--input", source, "--output", str(tmp_path / "out.jsonl")]
    named = ["--prompt-field", "text", "--answers-field", "gold", "--reward", "exact", "--device", "cpu"]
    assert main([*given, *named]) == 0
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in scored] == [float(gold == ("w1",)) for gold in GOLD]
