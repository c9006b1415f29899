"""Console: results on standard output, all else on standard error, one JSON document, and no control character sent."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from adhere.console import Console, escaped, shown

Captured = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_table_is_a_result_and_a_note_is_not(capsys: Captured) -> None:
    console = Console()
    console.table("Before and after", ["metric", "mean"], [["exact match", 0.41234], ["length", 12345.6]])
    console.note("saved")
    console.result({"a": 1})
    out, err = capsys.readouterr()
    assert "Before and after" in out and "exact match" in out and "0.4123" in out and "12,346" in out
    assert err == "saved\n" and "{" not in out


def test_json_is_one_document_and_nothing_else(capsys: Captured) -> None:
    console = Console(json=True)
    with console.progress(2, "train") as steps, console.strays_aside():
        print("a library speaks")
        steps.update(1, reward=0.5)
        steps.update(2, reward=float("nan"))
    console.table("Table", ["a"], [[1]])
    console.note("note")
    console.warn("careful")
    console.result({"reward": float("nan"), "text": "é\x1b"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"reward": None, "text": "é\x1b"}
    assert "\x1b" not in out and "é" in out
    for part in ("a library speaks", "train 2/2", "Table", "note", "warning: careful"):
        assert part in err


def test_a_second_document_is_our_own_mistake(capsys: Captured) -> None:
    console = Console(json=True)
    console.result(1)
    with pytest.raises(AssertionError, match="second JSON document"):
        console.result(2)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_can_be_written_whatever_the_text_and_the_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    Console(json=True).result({"text": "é\ud800"})
    assert json.loads(raw.getvalue()) == {"text": "é\ud800"}


def test_quiet_keeps_results_warnings_and_errors_only(capsys: Captured) -> None:
    console = Console(quiet=True)
    with console.progress(1, "train") as steps:
        steps.update(1, reward=1.0)
    console.note("note")
    assert capsys.readouterr() == ("", "")
    Console(json=True, quiet=True).table("Table", ["a"], [[1]])
    assert capsys.readouterr() == ("", "")
    console.table("Table", ["a"], [[1]])
    assert "Table" in capsys.readouterr().out
    console.warn("careful")
    console.error("a.jsonl:1: bad\na.jsonl:2: bad")
    assert capsys.readouterr() == ("", "warning: careful\nerror: a.jsonl:1: bad\na.jsonl:2: bad\n")


def test_untrusted_text_cannot_drive_the_terminal_or_the_markup(capsys: Captured) -> None:
    console = Console()
    evil = "\x1b]0;x\x07 \x9b2J \u202etxt\r [bold]b[/bold] :smile: \ud800"
    console.table(evil, [evil], [[evil + "\nnext"]])
    console.error(evil)
    for text in capsys.readouterr():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
        assert "\\x1b]0;x\\x07" in text and "\\u202e" in text and "[bold]b[/bold] :smile:" in text
    assert escaped("a\tb\u200d\nc\r\u200b\U000e0001") == "a\tb\u200d\nc\\x0d\\u200b\\U000e0001"


def test_text_that_the_stream_cannot_hold_is_written_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    Console().warn("naïve → x")
    sys.stderr.flush()
    assert raw.getvalue() == b"warning: na\\xefve \\u2192 x\n"


def test_long_lines_are_not_broken_where_there_is_no_terminal(capsys: Captured) -> None:
    Console().error("x" * 500)
    assert capsys.readouterr().err == f"error: {'x' * 500}\n"


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys: Captured) -> None:
    with Console().progress(100, "train") as steps:
        for step in range(1, 101):
            steps.update(step, reward=step / 100, kl=0.0123456, tokens_per_s=12345.6)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 20 <= len(lines) <= 22
    assert re.fullmatch(r"train 1/100  reward 0\.01  kl 0\.01235  tokens/s 12,346  \d+ s, \d+ s left", lines[0])
    assert lines[-1].startswith("train 100/100  reward 1 ")


def test_a_resumed_run_shows_its_first_step_and_its_last(capsys: Captured) -> None:
    with Console().progress(1000, "train") as steps:
        steps.update(990)
        steps.update(991)
        steps.update(1000)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["990/1000", "1000/1000"]


def test_in_a_terminal_progress_is_a_bar_with_the_figures_and_notes_above(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    console = Console()
    with console.progress(4, "train") as steps:
        steps.update(3, reward=0.25, length="12 tokens")
        console.note("checkpoint saved")
    text = terminal.getvalue()
    assert "train" in text and "3/4" in text and "reward 0.25  length 12 tokens" in text and "checkpoint saved" in text


def test_a_loop_that_fails_leaves_the_terminal_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    def failing() -> None:
        with Console().progress(4, "train"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("value", "text"), [(True, "yes"), (1234, "1,234"), (1e-7, "1e-07"), (-0.5, "-0.5"), ("a", "a"), (Path("p"), "p")]
)
def test_a_cell_is_written_as_people_read_it(value: object, text: str) -> None:
    assert shown(value) == text
