"""Rows: every accepted form, every message of a bad row or file, all bad rows at once, and what is written back."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from adhere import row_files
from adhere.data import Columns, Row, iter_rows, read_rows, write_jsonl
from adhere.errors import UserError
from adhere.prompt import AnnotatedText


def saved(folder: Path, *rows: Any, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def only(folder: Path, row: dict[str, Any], **options: Any) -> Row:
    rows = read_rows(saved(folder, row), **options)
    assert len(rows) == 1
    return rows[0]


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "Hi"}, "Hi", None),
        ({"prompt": " Hi\n", "response": ""}, " Hi\n", ""),
        ({"messages": [USER]}, [USER], None),
        ({"prompt": [USER]}, [USER], None),
        ({"messages": [USER, REPLY]}, [USER], "Hello"),
        ({"messages": [{"role": "system", "content": "Be kind"}, {**USER, "name": None}]},
         [{"role": "system", "content": "Be kind"}, USER], None),
        ({"context": "A.", "question": "B?"}, "A.\n\nQuestion: B?\nAnswer:", None),
        ({"context": "A.", "instruction": "Sum up."}, "Sum up.\n\nA.", None),
        ({"context": "", "instruction": "Sum up."}, "Sum up.", None),
        ({"question": "B?"}, "Question: B?\nAnswer:", None),
        ({"prompt": "Hi", "messages": [USER, REPLY]}, "Hi", None),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, [USER], ""),
        ({"prompt": None, "question": "B?"}, "Question: B?\nAnswer:", None),
        ({"documents": ["A.", {"title": "T", "text": "C."}], "question": "B?"},
         "A.\n\nT\nC.\n\nQuestion: B?\nAnswer:", None),
        ({"documents": [], "question": "B?"}, "Question: B?\nAnswer:", None),
        ({"system": "S", "instruction": "Sum up.", "context": "A.", "question": "B?"},
         "S\n\nSum up.\n\nA.\n\nQuestion: B?\nAnswer:", None),
        ({"prompt": "Hi", "system": "S"}, "S\n\nHi", None),
        ({"messages": [USER], "system": "S"}, [{"role": "system", "content": "S"}, USER], None),
        ({"prompt": "{context} {question} {x}", "context": "A.", "x": "?"}, "A. {question} {x}", None),
        ({"messages": [USER, REPLY, {"role": "user", "content": "{documents}, or?"}], "documents": ["A", "B"]},
         [USER, REPLY, {"role": "user", "content": "A\n\nB, or?"}], None),
    ],
)  # fmt: skip
def test_each_form_of_a_prompt(tmp_path: Path, row: dict[str, Any], prompt: Any, response: str | None) -> None:
    read = only(tmp_path, row)
    assert (read.prompt, read.response) == (prompt, response)
    assert read.fields == row and read.where == f"{tmp_path}/prompts.jsonl:1"


def test_the_other_fields_of_a_row(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "answers": ["a", "b"], "reference": "r", "chosen": "c", "rejected": [USER, REPLY], "id": 7}
    read = only(tmp_path, row)
    assert read.answers == ("a", "b")
    assert (read.reference, read.chosen, read.rejected) == ("r", "c", "Hello")
    assert read.fields["id"] == 7


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"answer": "a"}, ("a",)),
        ({"answers": "a"}, ("a",)),
        ({"answers": []}, ()),
        ({"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, ("a", "b")),
        ({"answers": None}, ()),
    ],
)
def test_each_form_of_answers(tmp_path: Path, field: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert only(tmp_path, {"prompt": "Hi", **field}).answers == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "Hi"', "not JSON at column 16 (Expecting ',' delimiter); write one object a line"),
        ("plain text", "not JSON at column 1"),
        ('[{"prompt": "Hi"}]', "an array, not an object; write one object a line, without the enclosing [ ]"),
        ("3", 'a number, not an object; write {"prompt": "…"}'),
        ('{"prompt": "a", "prompt": "b"}', "`prompt` stands twice in one object; keep one"),
        ('{"prompt": "a", "weight": NaN}', "NaN is not JSON; write a number or null"),
        ('{"prompt": "a", "weight": -Infinity}', "-Infinity is not JSON"),
        ('{"prompt": "a", "weight": 1e999}', "1e999 is too large for a number"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "a number with too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ({"text": "Hi"}, 'no `prompt` or `messages`; write {"prompt": "…"}'),
        ({"prompt": None}, "no `prompt` or `messages`"),
        ({"context": "A."}, "a `context` without a `question` or an `instruction`; add one, or give a template"),
        ({"prompt": " \n"}, "`prompt` is empty; write some text"),
        ({"question": ""}, "`question` is empty; write some text"),
        ({"instruction": "", "context": "A."}, "`instruction` is empty"),
        ({"prompt": 3}, '`prompt` is a number; write text, e.g. "prompt": "…"'),
        ({"prompt": {"text": "Hi"}}, "`prompt` is an object; write text"),
        ({"question": "B?", "context": ["A"]}, "`context` is a list; write text"),
        ({"question": "B?", "documents": "A"}, "`documents` is text; write a list"),
        ({"question": "B?", "documents": [3]}, '`documents` 1 is a number; write text or {"title": "…", "text": "…"}'),
        ({"question": "B?", "documents": ["A", {"title": 3}]}, "`documents` 2: `title` is a number; write text"),
        ({"question": "B?", "documents": ["A", {"title": "T"}]}, "`documents` 2: `text` is null; write text"),
        ({"question": "B?", "documents": [" "]}, "`documents` 1: `text` is empty; write some text"),
        ({"question": "B?", "documents": ["A"], "context": "A"}, "`context` and `documents` both hold the evidence"),
        ({"documents": ["A"]}, "`documents` without a `question` or an `instruction`; add one"),
        ({"prompt": "Hi", "system": 3}, "`system` is a number; write text"),
        ({"messages": [{**USER, "role": "system"}, USER], "system": "S"}, "a system turn and a `system`; keep one"),
        ({"messages": [USER], "history_is_context": "yes"}, "`history_is_context` is text; write true or false"),
        ('{"prompt": "a\\ud800"}', "`prompt` holds half of a surrogate pair at character 2; remove it"),
        ({"messages": "Hi"}, '`messages` is text; write [{"role": "user", "content": "…"}]'),
        ({"messages": []}, '`messages` is empty; write [{"role": "user", "content": "…"}]'),
        ({"prompt": []}, "`prompt` is empty"),
        ({"messages": ["Hi"]}, '`messages` 1 has no role; write {"role": "user", "content": "…"}'),
        ({"messages": [USER, {"content": "x"}]}, "`messages` 2 has no role"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "`messages` 1: unknown role 'usr'; did you mean user?"),
        ({"messages": [{"role": "user", "content": [1]}]}, "`messages` 1: `content` holds a number; write text"),
        ({"messages": [{"role": "user", "content": ""}]}, "`messages` 1: `content` is empty"),
        ({"messages": [{"role": "tool"}]}, "`messages` 1: `content` is null; write text"),
        ({"messages": [REPLY]}, "`messages` holds an assistant turn only; begin with the user's"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "`messages` 1: `tool_calls` is a list; only text is read"),
        ({"messages": [USER, REPLY], "response": "Hello"}, "a last assistant turn and a `response`; keep one of them"),
        ({"prompt": "Hi", "answers": [3]}, '`answers` holds a number; write text, e.g. "answers": ["…"]'),
        ({"prompt": "Hi", "answers": ["a", None]}, "`answers` holds null"),
        ({"prompt": "Hi", "answers": [""]}, "`answers` holds an empty text; write the answer or leave `answers` out"),
        ({"prompt": "Hi", "answers": {"start": 1}}, "`answers` holds null"),
        ({"prompt": "Hi", "answer": True}, "`answer` holds true or false"),
        ({"prompt": "Hi", "response": ["a"]}, "`response` is a list; write text"),
        ({"prompt": "Hi", "chosen": [{"role": "assistant"}]}, "`chosen` 1: `content` is null; write text"),
    ],
)  # fmt: skip
def test_each_bad_row_is_told_with_its_line_and_what_to_write(tmp_path: Path, row: Any, message: str) -> None:
    path = saved(tmp_path, {"prompt": "fine"}, row)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:2: ") and message in told
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["answers", "response", "chosen", "reference"])
def test_a_needed_field_that_is_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"prompts\.jsonl:1: no `{name}`; write \"{name}\": "):
        only(tmp_path, {"prompt": "Hi"}, need=(name,))
    assert only(tmp_path, {"prompt": "Hi", name: "x"}, need=(name,))


def test_all_bad_rows_are_reported_together_but_no_more_than_twenty(tmp_path: Path) -> None:
    path = saved(tmp_path, {"prompt": "fine"}, *[{"n": i} for i in range(24)], "{")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{n}" for n in range(2, 22)]
    assert lines[20:] == ["… and 5 more"]


def test_blank_lines_carriage_returns_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa9\xe2\x80\xa8b"}')
    rows = read_rows(path)
    assert [row.prompt for row in rows] == ["a", "é\u2028b"]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]


def test_a_row_that_is_not_utf_8_says_at_which_byte(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r":2: not UTF-8 at byte 13; save the file as UTF-8"):
        read_rows(path)


def test_a_line_over_the_bound_is_refused_and_the_next_one_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "MAX_LINE", 2_000_000)
    path = saved(tmp_path, {"prompt": "x" * 5_000_000}, {"prompt": 1}, {"prompt": "y" * 1_000_000})
    with pytest.raises(UserError) as caught:
        read_rows(path)
    first, second = str(caught.value).splitlines()
    assert first == f"{path}:1: the line is longer than 2 MB; write one row a line"
    assert second.startswith(f"{path}:2: ")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"prompts\.jsonl: holds no rows; write one object a line"):
        read_rows(path)


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "/none/at/all", "dir/none.parquet", ""])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no such file; check the path"):
        read_rows(name)


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = saved(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "broken")
    assert [row.prompt for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(UserError, match="a limit of 0 rows leaves none; give 1 or more"):
        read_rows(path, limit=0)


def test_a_template_lays_out_fields_and_goes_before_a_prompt(tmp_path: Path) -> None:
    row = {"prompt": "unused", "title": "T", "body": ""}
    assert only(tmp_path, row, columns=Columns(template="{{x}} {title}: {body}{title}")).prompt == "{x} T: T"


def parts(text: str) -> list[tuple[str, str]]:
    assert isinstance(text, AnnotatedText)
    return [(part.role.name, part.text) for part in text.parts]


def test_the_parts_of_a_prompt_know_what_they_are_for(tmp_path: Path) -> None:
    row = {"context": " A. ", "question": "B?"}
    asked = only(tmp_path, row).prompt
    assert parts(asked) == [("DOCUMENT", "A. "), ("TEMPLATE", "\n\n"), ("TEMPLATE", "Question: "), ("QUESTION", "B?"),
                            ("TEMPLATE", "\nAnswer:")]  # fmt: skip
    assert asked.documents[0].text == " A. " and asked.parts[0].offset == 1
    # Beside evidence alone, the words around a field are the user's; beside a question they are a layout.
    words = {"messages": [{"role": "user", "content": "{context} Who?"}], **row}
    assert parts(only(tmp_path, words).prompt[0]["content"]) == [("DOCUMENT", " A. "), ("USER", " Who?")]
    layout = Columns(template="{context}|{question}|{other}")
    assert parts(only(tmp_path, {**row, "other": "C"}, columns=layout).prompt) == [
        ("DOCUMENT", " A. "), ("TEMPLATE", "|"), ("QUESTION", "B?"), ("TEMPLATE", "|"), ("USER", "C")]  # fmt: skip
    turns = [USER, REPLY, USER]
    history = only(tmp_path, {"messages": turns, "history_is_context": True}).prompt
    assert [isinstance(turn["content"], AnnotatedText) for turn in history] == [True, True, False]
    assert history == turns


def test_a_template_field_that_a_row_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":1: no `titel`, which the template names; did you mean title\?"):
        only(tmp_path, {"title": "T", "body": "B"}, columns=Columns(template="{titel}"))
    with pytest.raises(UserError, match=r":1: `n` is a number; write text"):
        only(tmp_path, {"n": 3}, columns=Columns(template="{n}"))
    with pytest.raises(UserError, match=r":1: the prompt is empty; write some text in `a` or `b`"):
        only(tmp_path, {"a": "", "b": " "}, columns=Columns(template="{a}{b}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "names no field, so that every prompt would be the same"),
        ("{question", "expected '}' before end of string"),
        ("{}", "`{}` in it is not a plain field name"),
        ("{0}", "`{0}` in it is not a plain field name"),
        ("{a.__class__}", "is not a plain field name"),
        ("{a[0]}", "is not a plain field name"),
        ("{a!r}", "is not a plain field name"),
    ],
)
def test_a_template_that_is_not_one(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        only(tmp_path, {"a": "x"}, columns=Columns(template=template))
    assert str(caught.value).startswith("template: ") and message in str(caught.value)


def test_csv_rows_have_their_line_and_an_empty_cell_is_no_field(tmp_path: Path) -> None:
    path = saved(tmp_path, "question,answer,context", '"a,\nb",42,', "c,,d", name="rows.csv")
    rows = read_rows(path)
    assert [row.prompt for row in rows] == ["Question: a,\nb\nAnswer:", "d\n\nQuestion: c\nAnswer:"]
    assert [row.answers for row in rows] == [("42",), ()]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["prompt,id", "a"], ":2: 1 cells under 2 columns; quote cells that hold a comma"),
        (["prompt,prompt", "a,b"], ":1: two columns have one name; rename one"),
        (["prompt", '"a'], ":2: is not CSV (unexpected end of data); check the quotes"),
        (["prompt"], "holds no rows"),
    ],
)
def test_csv_that_is_broken(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_rows(saved(tmp_path, *lines, name="rows.csv"))
    assert message in str(caught.value)


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"prompt": ["a", None], "answers": [["x"], []]}), path)
    assert read_rows(path, limit=1)[0].answers == ("x",)
    with pytest.raises(UserError, match=r"rows\.parquet:row 2: no `prompt` or `messages`"):
        read_rows(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_rows(path)


def test_a_hub_id_is_read_by_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert len(read_rows("owner/name")) == 2
    assert len(read_rows("owner/name:test", limit=1)) == 1
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert len(read_rows("owner/name:test", limit=1)) == 1
    assert read_rows("owner/name:small:test")[1].where == "owner/name:small:test:row 2"
    assert asked == [
        ("owner/name", None, "train", False),
        ("owner/name", None, "test", True),
        ("owner/name", None, "test", False),
        ("owner/name", "small", "test", False),
    ]


def test_a_hub_id_that_cannot_be_loaded_says_what_was_tried() -> None:
    told = r"owner/no-such-name: neither a file nor a data set that can be loaded \(.+\); check the path; a hub data"
    with pytest.raises(UserError, match=told):
        read_rows("owner/no-such-name")
    with pytest.raises(UserError, match=r"can be loaded \(3 colons\); .* owner/name:split or owner/name:config:split"):
        read_rows("owner/name:a:b:c")


def test_what_is_written_is_read_back_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / "rows.jsonl"
    rows = [{"prompt": "é\n\u2028", "reward": 0.5}, {"prompt": "b", "reward": float("nan")}]
    write_jsonl(path, rows)
    assert [row.fields for row in read_rows(path)] == [rows[0], {"prompt": "b", "reward": None}]

    def failing() -> Any:
        yield rows[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(path, failing())
    assert len(read_rows(path)) == 2 and [item.name for item in path.parent.iterdir()] == ["rows.jsonl"]


def test_rows_come_one_at_a_time_and_faults_when_all_have_come(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 7}\n{"prompt": "b"}\n')
    rows = iter_rows(path)
    assert [next(rows).prompt, next(rows).prompt] == ["a", "b"]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: `prompt` is a number"):
        next(rows)


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{"word " * 40}{n}"}}\n' for n in range(20_000)))
    tracemalloc.start()
    count = sum(1 for _ in iter_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < 1_000_000 < path.stat().st_size


def test_candidates_are_texts_or_what_a_ranking_wrote(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "candidates": ["b", {"response": "c", "reward": 1.0}]}\n{"prompt": "a"}\n')
    assert [row.candidates for row in read_rows(path)] == [("b", "c"), ()]
    with pytest.raises(UserError, match=r'rows\.jsonl:2: no `candidates`; write "candidates": \["…"\]'):
        read_rows(path, need=("candidates",))
