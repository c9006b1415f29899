"""Lists that a CSV could hold as text only: what pandas, datasets and JSON write, what stays text, what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from adhere.data import Columns, Row, read_rows
from adhere.errors import UserError
from adhere.row_files import Fault
from adhere.row_lists import unpacked

TURNS = [{"role": "user", "content": 'It\'s "where", is it {not} ?'}, {"role": "assistant", "content": "yes }\n{'a'"}]
SQUAD = {"text": ["garden", "the garden"], "answer_start": [3, 7]}
text = st.text(st.sampled_from("ab'\"\\ ,[]{}()\n\té花"), max_size=8)


def cell(written: object, field: str, **others: Any) -> Row:
    """The row of a CSV that pandas writes of `written` in the column `field`."""
    return read_rows(pandas_csv({"prompt": "where ?", **others, field: written}))[0]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pandas_csv(row: dict[str, object]) -> Path:
    path = Path("rows.csv")
    pandas.DataFrame({name: [value] for name, value in row.items()}).to_csv(path, index=False)
    return path


def datasets_csv(row: dict[str, object]) -> Path:
    path = Path("rows.csv")
    Dataset.from_list([row]).to_csv(path)
    return path


@pytest.mark.parametrize("write", [pandas_csv, datasets_csv])
def test_a_csv_of_pandas_or_datasets_gives_the_rows_that_were_written(write: Any) -> None:
    reply = [{"role": "assistant", "content": "the garden"}]
    row = {"prompt": TURNS[:1], "answers": ["garden", "the 'old' garden"], "chosen": reply, "rejected": TURNS[1:]}
    read = read_rows(write({**row, "candidates": ["a", 'b "c"']}))[0]
    assert (read.prompt, read.answers) == (row["prompt"], tuple(row["answers"]))
    assert (read.chosen, read.rejected, read.candidates) == ("the garden", TURNS[1]["content"], ("a", 'b "c"'))
    assert read_rows(write({"question": "where ?", "answers": SQUAD}))[0].answers == ("garden", "the garden")
    assert read_rows(write({"messages": TURNS}))[0].response == TURNS[1]["content"]
    ranked = [{"response": "a", "reward": 0.5}, {"response": "b", "reward": None}]
    assert read_rows(write({"prompt": "x", "candidates": ranked}))[0].candidates == ("a", "b")


def test_fields_of_other_names_hold_lists_too() -> None:
    path = pandas_csv({"talk": TURNS[:1], "gold": ["garden"]})
    row = read_rows(path, Columns(prompt_field="talk", answers_field="gold"))[0]
    assert (row.prompt, row.answers) == (TURNS[:1], ("garden",))


@given(st.lists(text, min_size=1, max_size=4))
def test_lists_of_any_texts_are_read_as_they_were(texts: list[str]) -> None:
    import numpy

    forms = [repr(texts), str(numpy.array(texts, dtype=object)), str(pandas.Series([texts]).iloc[0])]
    for form in [*forms, repr(tuple(texts))]:
        assert unpacked({"answers": form}, {"answers"}, set()) == {"answers": texts}


@pytest.mark.parametrize(
    "said",
    [
        "[1, 2]",
        "[-2, 7]",
        "[MASK]",
        "[0, 1)",
        "{'a': 1}",
        '{"text": "hello"}',
        "('quoted' text)",
        "('a')",
        "a ['b']",
        '[{"name": "call", "arguments": {}}]',
    ],
)
def test_an_answer_that_merely_looks_like_a_list_stays_text(said: str) -> None:
    assert cell(said, "answers").answers == cell(said, "answer").answers == (said,)


@pytest.mark.parametrize("said", ['["b", "a"]', "[{'role': 'user'}] means what ?", "[1, 2]", "{'role': 'user'}"])
def test_a_prompt_that_merely_looks_like_a_list_stays_text(said: str) -> None:
    assert cell("x", "answers", prompt=said).prompt == said


def test_an_empty_list_of_answers_is_none() -> None:
    assert cell([], "answers").answers == ()
    with pytest.raises(UserError, match=r"rows\.csv:2: no `answers`"):
        read_rows("rows.csv", need=("answers",))


@pytest.mark.parametrize(
    ("field", "said", "message"),
    [
        (
            "answers",
            "['garden', 'the gar",
            "`answers` begins as a list and cannot be read as one (['garden', 'the gar)",
        ),
        ("answers", "['a', nan]", "`answers` begins as a list"),
        ("answers", "['a' 'b' ... 'z']", "`answers` begins as a list"),  # NumPy's short form of many
        ("answers", "['a', None]", "`answers` holds null"),
        ("answers", "['a', 1]", "`answers` holds a number"),
        ("answers", "[['a']]", None),
        ("candidates", "['a', 'b'", "`candidates` begins as a list"),
        ("prompt", "[{'role': 'user', 'content': nan}]", "`prompt` begins as a list"),
        ("chosen", "[{'role': 'user', 'content': 'x'}]", "`chosen` ends with a turn of user"),
        ("answer", "['garden']", "`answer` is text that holds a list; call it `answers`"),
        ("answers", "[" + "{'text':" * 5000 + "]", "`answers` begins as a list"),
    ],
)
def test_a_list_that_cannot_be_read_is_told_with_its_line(field: str, said: str, message: str | None) -> None:
    if message is None:
        assert cell(said, field).answers == (said,)  # no list of texts: it may be the answer
        return
    with pytest.raises(UserError) as caught:
        cell(said, field)
    assert str(caught.value).startswith(f"rows.csv:2: {message}")


def test_what_is_kept_of_the_row_holds_the_lists_too() -> None:
    row = cell(["a"], "answers", paraphrases=["where is it ?"], note="['x']")
    assert row.fields == {"prompt": "where ?", "paraphrases": ["where is it ?"], "note": "['x']", "answers": ["a"]}


def test_fields_that_hold_no_lists_are_left_alone() -> None:
    raw = {"response": "['a']", "answers": 3, "n": None}
    assert unpacked(raw, {"answers"}, {"prompt"}) == raw
    with pytest.raises(Fault):
        unpacked({"answers": "['a"}, {"answers"}, set())
