"""All that adhere prints, and the only module that does.

Results go to standard output; progress, notes, warnings and errors to standard error. With `json`, standard output
holds one JSON document and nothing else. Text from models and files is untrusted: control characters are written out
as codes, never sent to a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console as Rich
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adhere.files import to_json
from adhere.progress import Progress, one

T = TypeVar("T")
PLAIN_LINES = 20
"""Progress lines of a long loop, at most, where standard error is no terminal."""
SHORT = 1.0
"""Seconds. A loop that takes less leaves no bar behind, and no second plain line."""
_TITLE_WIDTH, _BAR_WIDTH = 22, 24
_PLAIN_WIDTH = 120
# Unicode categories: control, format, surrogate.
_CONTROL = ("Cc", "Cf", "Cs")
# Of those, line end and tab are let through, and the joiners that Persian, Indic scripts and emoji are written with.
_HARMLESS = "\n\t\u200c\u200d"


def escaped(text: str) -> str:
    r"""`text` with control characters written out, line end and tab excepted.

    Terminal escapes, bidirectional overrides and lone surrogates would otherwise reach the reader's terminal.

    >>> escaped("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(_code(c) if c not in _HARMLESS and unicodedata.category(c) in _CONTROL else c for c in text)


class Console:
    """Where the command line speaks. `json`: one document, from `result`; `quiet`: results, warnings, errors only;
    `verbose`: an error with the calls that led to it."""

    def __init__(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._out, self._err = _rich(sys.stdout), _rich(sys.stderr)
        self._stdout = sys.stdout
        self._done = False
        self._loops: list[_Loop] = []  # those under way, each within the one before it
        self._live: Live | None = None

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table of results, on standard output; numbers to the right. With `json`, on standard error."""
        if self.json and self.quiet:
            return
        table = Table(title=_line(title), title_justify="left", title_style="bold")
        for place, name in enumerate(columns):
            numeric = all(isinstance(row[place], int | float) for row in rows) and bool(rows)
            table.add_column(_line(name), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_line(shown(cell)) for cell in row))
        (self._err if self.json else self._out).print(table)

    def note(self, text: str) -> None:
        """Something good to know, on standard error."""
        if not self.quiet:
            self._say("", text, "")

    def warn(self, text: str) -> None:
        """Something to look at, even when quiet."""
        self._say("warning: ", text, "yellow")

    def error(self, text: str) -> None:
        """Why the command failed, one line or one a fault, even when quiet; while an exception is handled, `verbose`
        puts its traceback before."""
        if self.verbose and sys.exception() is not None:
            self._say("", traceback.format_exc(), "")
        self._say("error: ", text, "bold red")

    def result(self, value: object) -> None:
        """With `json`, the document: called once. Otherwise nothing, tables having told it."""
        if not self.json:
            return
        assert not self._done, "a second JSON document on standard output"
        self._done = True
        text = to_json(value, indent=2) + "\n"
        try:
            self._stdout.write(text)
        except UnicodeEncodeError:  # an ASCII stream, or half of a surrogate pair in a model's text
            import json

            self._stdout.write(json.dumps(json.loads(text), indent=2) + "\n")
        self._stdout.flush()

    def write(self, text: str) -> None:
        """Text for another program, on standard output as it is."""
        self._stdout.write(text)
        self._stdout.flush()

    @contextmanager
    def strays_aside(self) -> Iterator[None]:
        """With `json`, send what other libraries print to standard error for as long as the block runs."""
        with contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext():
            yield

    def track(
        self, items: Iterable[T], title: str, total: int, *, size: Callable[[T], int] = one, done: int = 0
    ) -> Iterator[T]:
        """The `Progress` of the command line: in a terminal a live bar with the time left, and one below it for each
        loop within; elsewhere, and with `verbose`, a plain line for each kind of loop and now and then one more for the
        outermost."""
        if self.quiet:
            yield from items
            return
        loop = _Loop(title, total, done)
        self._open(loop)
        try:
            for item in items:
                yield item
                loop.advance(size(item))
                if self._live is None and loop is self._loops[0] and loop.line_is_due():
                    self._say("", loop.line(), "")
        finally:
            self._close(loop)

    def figures(self, **figures: float | str) -> None:
        """Show `figures` beside the outermost loop, by their names, `_per_` as `/`."""
        if self._loops:
            self._loops[0].figures = figures

    @contextmanager
    def logs(self) -> Iterator[None]:
        """What adhere logs is said here as long as the block runs: warnings; with `verbose` all else too."""
        logger, handler = logging.getLogger("adhere"), _Logs(self)
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before

    def _open(self, loop: _Loop) -> None:
        outer = self._loops[0] if self._loops else None
        self._loops.append(loop)
        if outer is None and self._draws:
            self._live = Live(
                get_renderable=lambda: _bars(self._loops),
                console=self._err,
                refresh_per_second=4,
                redirect_stdout=False,
            )
            self._live.start(refresh=True)
        elif outer is None:
            self._say("", loop.line(), "")
        elif self._live is None and loop.title not in outer.within:
            self._say("", f"{outer.title}: {loop.title}", "")
        if outer is not None:
            outer.within.add(loop.title)

    @property
    def _draws(self) -> bool:
        """Whether a bar can be drawn over and over: not among the lines that libraries log."""
        return self._err.is_terminal and not self._err.is_dumb_terminal and not self.verbose

    def _close(self, loop: _Loop) -> None:
        if loop not in self._loops:
            return
        place = self._loops.index(loop)
        del self._loops[place + 1 :]  # those within it that were left half way
        if place == 0 and self._live is not None:
            self._live.transient = loop.seconds < SHORT
            self._live.stop()
            self._live = None
        del self._loops[place:]

    def _say(self, prefix: str, text: str, style: str) -> None:
        self._err.print(Text(prefix, style=style) + Text(escaped(text)), soft_wrap=True)


def hear_libraries() -> None:
    """What the libraries log, from INFO up, goes to standard error. Before any of them is imported."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    logging.basicConfig(level=logging.INFO)


def quieten_libraries() -> None:
    """Progress bars and advice of the libraries would drown our own.

    Imports none of them: what is not loaded yet reads the environment when it is.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging as speech

        speech.set_verbosity_error()
        speech.disable_progress_bar()


def progress_bars() -> Progress:
    """Progress on standard error, for the policy that is to show it: live bars in a terminal, plain lines elsewhere.

    >>> from adhere import Policy, progress_bars
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu", progress=progress_bars())
    """
    return Console().track


class _Logs(logging.Handler):
    """Log records in the style of a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        (self._console.warn if record.levelno >= logging.WARNING else self._console.note)(record.getMessage())


class _Loop:
    """A loop under way: how far it is, and how long it may still take."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.figures: dict[str, float | str] = {}
        self.within: set[str] = set()
        """Titles of the loops that ran within it."""
        self._first, self._start = done, time.monotonic()
        self._advanced = self._told = self._start
        self._told_at = done

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    @property
    def counted(self) -> bool:
        """Whether there is anything to count: a loop of one item is either running or over."""
        return self.total > 1

    def advance(self, size: int) -> None:
        """`size` more are done."""
        self.done, self._advanced = self.done + size, time.monotonic()

    def left(self) -> float | None:
        """Seconds to go at the pace so far; None before anything is done."""
        passed = self.done - self._first
        if passed <= 0:
            return None
        whole = (self._advanced - self._start) / passed * (self.total - self.done)
        return max(0.0, whole - (time.monotonic() - self._advanced))

    def line_is_due(self) -> bool:
        """Whether a plain line should be written now: at the first step and the last, and about `PLAIN_LINES` times in
        all, but none within `SHORT` seconds of another unless it brings the first figures."""
        first, last = self._told_at == self._first, self.done >= self.total
        every = max(1, self.total // PLAIN_LINES)
        due = first or last or self.done // every > self._told_at // every
        now = time.monotonic()
        if not due or (now - self._told < SHORT and not (self.figures and (first or last))):
            return False
        self._told, self._told_at = now, self.done
        return True

    def line(self) -> str:
        """How far it is, in a plain line."""
        parts = [f"{self.title} {self.done}/{self.total}" if self.counted else self.title, _figures(self.figures)]
        if self.done > self._first:
            left = self.left()
            parts.append(f"{self.seconds:.0f} s" + (f", {left:.0f} s left" if left and self.done < self.total else ""))
        return "  ".join(part for part in parts if part)

    def row(self, depth: int) -> tuple[Text, ProgressBar, str, Text]:
        """How far it is, as the cells of a row: title, bar, count, time."""
        running = self.done < self.total
        left = self.left() if self.counted and running else None
        bar = ProgressBar(self.total, self.done, _BAR_WIDTH)
        if running and not self.counted:
            bar = ProgressBar(None, 0, _BAR_WIDTH, pulse=True)
        return (
            Text("  " * depth) + _line(self.title),
            bar,
            f"{self.done}/{self.total}" if self.counted else "",
            Text(_clock(self.seconds) if left is None else f"{_clock(left)} left", style="cyan"),
        )


def _bars(loops: Sequence[_Loop]) -> Table:
    """The loops under way, each in a row, and the figures of the outermost below them."""
    rows = Table.grid(padding=(0, 1))
    rows.add_column(min_width=_TITLE_WIDTH)  # so that bars stay in place while loops within come and go
    for depth, loop in enumerate(loops):
        rows.add_row(*loop.row(depth))
    whole = Table.grid()
    whole.add_row(rows)
    if loops and loops[0].figures:
        whole.add_row(Text(escaped(_figures(loops[0].figures)), style="dim", overflow="ellipsis", no_wrap=True))
    return whole


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> _clock(7.2), _clock(3671)
    ('0:07', '1:01:11')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def shown(value: object) -> str:
    """A figure or a cell as people read it: four digits that count, thousands marked, a dash for nothing.

    >>> shown(0.123456), shown(12345.6), shown(3), shown(None), shown(float("nan"))
    ('0.1235', '12,346', '3', '–', '–')
    """
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _figures(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{name.replace('_per_', '/').replace('_', ' ')} {shown(value)}" for name, value in figures.items()
    )


def _rich(stream: TextIO) -> Rich:
    # Where there is no terminal to ask, a fixed width: the same text in every log.
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Rich(file=cast(TextIO, _Encodable(stream)), width=width, highlight=False, markup=False, emoji=False)


class _Encodable:
    """A stream that writes out, as a code, what its encoding has no sign for, rather than failing half way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _line(text: str) -> Text:
    """`text` on one line, for a cell."""
    return Text(escaped(text.replace("\r\n", "\n")).replace("\n", "⏎").replace("\t", " "))


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
