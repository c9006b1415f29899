"""Console: results on standard output, all else on standard error, one JSON document, and no control character sent."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console as Rich

from adhere.console import Console, _bars, escaped, shown
from adhere.progress import phase

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
    with console.strays_aside():
        for reward in console.track([0.5, float("nan")], "train", 2):
            print("a library speaks")
            console.figures(reward=reward)
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
    for _ in console.track([1], "train", 1):
        console.figures(reward=1.0)
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


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of standard error. Not a fixture: pytest puts its own in place when the test begins."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def seen_last(console: Console) -> str:
    """What a live display shows now, without its colours."""
    page = Rich(file=io.StringIO(), width=100, no_color=True)
    page.print(_bars(console._loops))
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue()


def test_without_a_terminal_a_long_loop_is_a_plain_line_now_and_then(capsys: Captured, clock: Clock) -> None:
    console = Console()
    for step in console.track(range(1, 101), "train", 100):
        clock.now += 2
        console.figures(reward=step / 100, kl=0.0123456, tokens_per_s=12345.6)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 20 <= len(lines) <= 23
    assert lines[0] == "train 0/100"
    assert lines[1] == "train 1/100  reward 0.01  kl 0.01235  tokens/s 12,346  2 s, 198 s left"
    assert lines[-1].startswith("train 100/100  reward 1 ") and lines[-1].endswith("200 s")


def test_without_a_terminal_a_short_loop_is_one_line_and_a_loop_within_is_told_once(
    capsys: Captured, clock: Clock
) -> None:
    console = Console()
    for _ in console.track("ab", "ranking", 2):
        for title in ("sampling", "reading"):
            list(console.track(range(9), title, 9))
    with phase(console.track, "saving"):
        clock.now += 7
    assert capsys.readouterr().err.splitlines() == [
        "ranking 0/2",
        "ranking: sampling",
        "ranking: reading",
        "saving",
        "saving  7 s",
    ]


def test_the_first_figures_are_told_however_quick_the_first_step(capsys: Captured, clock: Clock) -> None:
    console = Console()
    for step in console.track(range(1000), "train", 1000):
        if step == 0:
            console.figures(reward=0.5)
        clock.now += 0.01
    assert capsys.readouterr().err.splitlines()[1].startswith("train 1/1000  reward 0.5 ")


def test_a_resumed_run_counts_from_where_it_was_and_its_time_from_now(capsys: Captured, clock: Clock) -> None:
    for _ in Console().track(range(990, 1000), "train", 1000, done=990):
        clock.now += 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["train 990/1000", "train 991/1000  3 s, 27 s left", "train 1000/1000  30 s"]


def test_items_may_count_for_more_than_one(capsys: Captured, clock: Clock) -> None:
    for _ in Console().track([[1, 2, 3], [4]], "ranking", 4, size=len):
        clock.now += 6
    assert capsys.readouterr().err.splitlines()[1:] == ["ranking 3/4  6 s, 2 s left", "ranking 4/4  12 s"]


def test_in_a_terminal_a_loop_is_a_bar_with_the_time_left_and_the_figures_below(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = opened(monkeypatch)
    console = Console()
    for step in console.track(range(4), "train", 4):
        if step == 3:
            assert re.search(r"train +━+╸? +3/4 0:30 left\n+reward 0\.25  length 12 tokens", seen_last(console))
        clock.now += 30
        console.figures(reward=0.25, length="12 tokens")
        console.note(f"checkpoint {step} saved")
    text = terminal.getvalue()
    assert "checkpoint 3 saved" in text and "4/4" in text and "2:00" in text
    assert text.rstrip().endswith("\x1b[?25h")


def test_the_time_left_runs_down_between_two_steps(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    opened(monkeypatch)
    console = Console()
    for step in console.track(range(3), "reading", 3):
        if step == 0:
            assert "0/3 0:00" in seen_last(console)
        clock.now += 60
        if step == 1:
            assert "1/3 1:00 left" in seen_last(console)  # 120 seconds after the first step, less the 60 since


def test_in_a_terminal_loops_within_are_below_and_go_when_they_are_done(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    opened(monkeypatch)
    console = Console()
    with phase(console.track, "ranking"):
        for _ in console.track(range(24), "sampling", 24):
            clock.now += 1
        assert "sampling" not in seen_last(console)
        for step in console.track(range(24), "reading", 24):
            if step == 2:
                outer, inner = seen_last(console).splitlines()
                assert outer.startswith("ranking ") and outer.rstrip().endswith("0:26")
                assert inner.startswith("  reading ") and " 2/24 0:22 left" in inner
            clock.now += 1


@pytest.mark.parametrize(("seconds", "left"), [(0.2, False), (5.0, True)])
def test_only_a_loop_that_took_its_time_leaves_a_bar_behind(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: float, left: bool
) -> None:
    terminal = opened(monkeypatch)
    with phase(Console().track, "saving"):
        clock.now += seconds
    erased = terminal.getvalue().endswith("\x1b[1A\x1b[2K")
    assert erased is not left


@pytest.mark.parametrize(("given", "coloured"), [(None, True), ("", True), ("1", False)])
def test_no_color_takes_the_colours_away(monkeypatch: pytest.MonkeyPatch, given: str | None, coloured: bool) -> None:
    if given == "" and int(version("rich").split(".")[0]) < 14:
        pytest.skip("rich before 14 takes an empty NO_COLOR for a set one")
    terminal = opened(monkeypatch)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if given is not None:
        monkeypatch.setenv("NO_COLOR", given)
    console = Console()
    list(console.track(range(4), "train", 4))
    console.warn("careful")
    codes = re.findall(r"\x1b\[[0-9;]*m", terminal.getvalue())
    assert any(re.search(r"3[0-9]|9[0-9]", code) for code in codes) is coloured


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    list(Console().track(range(4), "train", 4))
    assert terminal.getvalue() == "train 0/4\n"


def test_with_verbose_no_bar_is_drawn_among_what_libraries_log(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    list(Console(verbose=True).track(range(4), "train", 4))
    assert terminal.getvalue() == "train 0/4\n"


def test_a_loop_that_fails_leaves_the_terminal_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    console = Console()

    def failing() -> None:
        for _ in console.track(range(4), "train", 4):
            for _ in console.track(range(4), "sampling", 4):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert "\x1b[?25h" in terminal.getvalue() and not console._loops
    list(console.track(range(4), "saving", 4))
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 2


def test_loops_left_half_way_go_with_the_loop_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    console = Console()
    for _ in console.track(range(1), "ranking", 1):
        kept = console.track(range(9), "sampling", 9)
        next(kept)
    assert not console._loops
    del kept
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_what_adhere_logs_is_a_warning_of_the_command_line(capsys: Captured) -> None:
    log = logging.getLogger("adhere.model.memory")
    with Console(quiet=True).logs():
        log.warning("out of memory: from here on at most %d tokens in one forward", 64)
        log.info("a detail")
    with Console(verbose=True).logs():
        log.info("a detail")
        logging.getLogger("transformers").warning("not ours")
    told = "warning: out of memory: from here on at most 64 tokens in one forward\na detail\n"
    assert capsys.readouterr().err == told
    assert not logging.getLogger("adhere").handlers and logging.getLogger("adhere").propagate


@pytest.mark.parametrize(
    ("value", "text"), [(True, "yes"), (1234, "1,234"), (1e-7, "1e-07"), (-0.5, "-0.5"), ("a", "a"), (Path("p"), "p")]
)
def test_a_cell_is_written_as_people_read_it(value: object, text: str) -> None:
    assert shown(value) == text
