"""Rows written in parts by many workers: each part a file of its own, the folder named when all of them are there.

A part is a stretch of the input. Who does it again, because a worker died, writes the same file again: no line is lost
or doubled. The parts grow in `NAME.parts/`; that folder becomes `NAME`, with a `_SUCCESS` in it that lists them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adhere.errors import RunFailed
from adhere.files import atomic_write, disk_errors, sweep, to_json
from adhere.resume import JOURNAL, Journal, require_new
from adhere.row_files import FilePosition, is_jsonl, positions, records

AIM = 256
"""Parts that a file of any size is cut into at least, batches allowing: enough to keep many workers busy to the end."""
MOST = 4096
"""Rows of a part at most: what is done again when a worker dies."""
FIELDS = ("part", "rows", "lines", "bytes", "tally", "attempts")
"""What is remembered of a part: its number and rows of the input, lines and bytes that they made, tally, attempts."""
SUCCESS = "_SUCCESS"
WORK = ".work"
"""Folder in the output for what is needed until all parts are there. Hidden: nobody takes it for data."""


@dataclass(frozen=True)
class Shard:
    """A stretch of the input, done by one worker at a time."""

    number: int
    first: int
    """Rows before it."""
    rows: int
    byte: int
    """Where it begins in the file of rows, as `FilePosition` has it."""
    line: int

    @property
    def position(self) -> FilePosition:
        return FilePosition(self.byte, self.line)

    def write(self, folder: Path, lines: Iterable[Mapping[str, Any]], tally: Mapping[str, float]) -> dict[str, Any]:
        """Write its lines, all or none, over those of an earlier attempt. What is to be remembered of it comes back."""
        texts = [to_json(line) + "\n" for line in lines]
        data = "".join(texts).encode("utf-8", "backslashreplace")
        atomic_write(folder / _name(self.number), data)
        return {"part": self.number, "rows": self.rows, "lines": len(texts), "bytes": len(data), "tally": dict(tally)}

    def attempt(self, folder: Path) -> int:
        """Note that a worker begins with it; how many did so far. Those that died are counted too."""
        return mark(folder / WORK / f"{_name(self.number)}.attempts")


def mark(path: Path) -> int:
    """Add a mark to a file of marks; how many there are now. Appending one byte is atomic, whoever else does it."""
    with path.open("ab") as file:
        file.write(b".")
        return file.tell()


def _name(number: int) -> str:
    return f"part-{number:05d}.jsonl"


def shard_rows(total: int, batch_size: int) -> int:
    """Rows that a part of `total` has at least: whole batches, so that a row is scored in the batch it always was."""
    batches = max(1, min(-(-total // (batch_size * AIM)), MOST // batch_size))
    return batches * batch_size


class ShardedRows:
    """The parts of one output: which of them are done, and their folder, which takes its name at the end.

    Nothing is written before `begin`. Raises `UserError`: the target is there already, or as `Journal` does.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path).absolute()
        self.folder = self.path.with_name(f"{self.path.name}.parts")
        require_new(Path(path))
        self._journal = Journal(self.folder, settings, FIELDS, resume=resume)
        self.done: dict[int, dict[str, Any]] = {written["part"]: written for written in self._journal.entries}
        """Number of a part → what is remembered of it."""

    @property
    def work(self) -> Path:
        return self.folder / WORK

    def begin(self, source: str, starts: Sequence[int], total: int) -> list[Shard]:
        """Make the folder; the parts that are not done yet. They begin at the rows `starts` of `source`.

        What is not JSON Lines is written as such once, so that each worker finds its rows without reading those before.
        """
        with disk_errors(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
        for left in self.work.glob("*.attempts"):  # those of the run that is resumed do not count
            left.unlink()
        self._journal.begin()
        file = self.rows_file(source)
        if not is_jsonl(source):
            with disk_errors(self.path), file.open("wb") as copy:
                for _, row in records(source, None):
                    copy.write((to_json(row) + "\n").encode("utf-8", "backslashreplace"))
        ends = [*starts[1:], total]
        return [
            Shard(number, start, end - start, place.byte, place.line)
            for number, (start, end, place) in enumerate(zip(starts, ends, positions(file, starts), strict=True))
            if number not in self.done
        ]

    def rows_file(self, source: str) -> Path:
        """The JSON Lines that the places of the parts are of."""
        return Path(source).absolute() if is_jsonl(source) else self.work / "rows.jsonl"

    def add(self, written: dict[str, Any]) -> None:
        """Remember a part that is done."""
        self._journal.add(written)
        self.done[written["part"]] = written

    def rows_done(self) -> int:
        """Rows of the input in the parts that are done."""
        return sum(written["rows"] for written in self.done.values())

    def tally(self) -> dict[str, float]:
        """The tallies of all parts, summed in order."""
        total: dict[str, float] = {}
        for _, written in sorted(self.done.items()):
            for name, value in written["tally"].items():
                total[name] = total.get(name, 0.0) + value
        return total

    def finish(self, total: int) -> None:
        """Give the folder, with all `total` rows in it, its name. Raises `RunFailed` where a part is not as written."""
        listed = [self.done[number] for number in sorted(self.done)]
        for written in listed:
            file = self.folder / _name(written["part"])
            if not file.is_file() or file.stat().st_size != written["bytes"]:
                fix = f"remove {self._journal.file} and add --resume: all parts are made again"
                raise RunFailed("is not as it was written", where=str(file), fix=fix)
        assert self.rows_done() == total, f"{self.rows_done()} of {total} rows in {len(listed)} parts"
        sweep(self.folder)
        parts = [{"file": _name(w["part"]), "rows": w["rows"], "lines": w["lines"]} for w in listed]
        atomic_write(
            self.folder / SUCCESS,
            to_json({"rows": total, "lines": sum(w["lines"] for w in listed), "parts": parts}, indent=2),
        )
        with disk_errors(self.path):
            self.folder.rename(self.path)
            shutil.rmtree(self.path / WORK, ignore_errors=True)
            (self.path / JOURNAL).unlink()
