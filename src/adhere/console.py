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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console as Rich
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from adhere.files import to_json

PLAIN_LINES = 20
"""Progress lines of a whole run where standard error is no terminal."""
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

    @contextmanager
    def progress(self, total: int, title: str) -> Iterator[Steps]:
        """Show how far a loop of `total` steps is: a live bar in a terminal, else a plain line now and then."""
        if self.quiet:
            yield Steps(total, title)
        elif not self._err.is_terminal:
            yield _Lines(total, title, self._err)
        else:
            bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._err,
            )
            steps = _Bar(total, title, bar)
            with Live(steps, console=self._err, refresh_per_second=4, redirect_stdout=False):
                yield steps

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


class Steps:
    """What `Console.progress` gives to a loop; this one shows nothing."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title = total, title

    def update(self, step: int, **figures: float | str) -> None:
        """`step` steps are done; `figures` are shown by their names, `_per_` as `/`."""


class _Lines(Steps):
    """A plain line for the first step, the last, and about twenty in all."""

    def __init__(self, total: int, title: str, err: Rich) -> None:
        super().__init__(total, title)
        self._err, self._every, self._start = err, max(1, total // PLAIN_LINES), time.monotonic()
        self._last = 0

    def update(self, step: int, **figures: float | str) -> None:
        first = self._last == 0
        if first or step >= self.total or step // self._every > self._last // self._every:
            seconds = time.monotonic() - self._start
            left = f", {seconds / step * (self.total - step):.0f} s left" if 0 < step < self.total else ""
            line = f"{self.title} {step}/{self.total}  {_figures(figures)}  {seconds:.0f} s{left}"
            self._err.print(Text(escaped(line)), soft_wrap=True)
        self._last = step


class _Bar(Steps):
    """A bar, and the figures under it."""

    def __init__(self, total: int, title: str, bar: Progress) -> None:
        super().__init__(total, title)
        self._bar, self._task = bar, bar.add_task(_line(title).plain, total=total)
        self._text = Text("")

    def update(self, step: int, **figures: float | str) -> None:
        self._bar.update(self._task, completed=step)
        self._text = Text(escaped(_figures(figures)), style="dim", overflow="ellipsis", no_wrap=True)

    def __rich__(self) -> Table:
        grid = Table.grid()
        grid.add_row(self._bar)
        grid.add_row(self._text)
        return grid


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
