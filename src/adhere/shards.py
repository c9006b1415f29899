"""Rows written in parts by many workers: each part a file of its own, the folder named when all of them are there.

A part is a stretch of the input. Who does it again, because a worker died, writes the same file again: no line is lost
or doubled. The parts grow in `NAME.parts/`; that folder becomes `NAME`, with a `_SUCCESS` in it that lists them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adhere.errors import RunFailed, UserError
from adhere.files import append_jsonl, atomic_write, disk_errors, require_same, sweep, to_json, truncate_jsonl
from adhere.row_files import FilePosition, is_jsonl, positions, records

AIM = 256
"""Parts that a file of any size is cut into at least, batches allowing: enough to keep many workers busy to the end."""
MOST = 4096
"""Rows of a part at most: what is done again when a worker dies."""
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

    Nothing is written before `begin`. Raises `UserError` as `GrowingRows` does: the target is there already, or
    unfinished without `resume`; with `resume`, there is nothing to resume or the settings differ.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path).absolute()
        self.folder = self.path.with_name(f"{self.path.name}.parts")
        self.settings: dict[str, Any] = json.loads(to_json(settings))
        self.done: dict[int, dict[str, Any]] = {}
        """Number of a part → what `Shard.write` returned."""
        where = str(path)
        if self.path.exists():
            raise UserError("is there already", where=where, fix="choose another --output")
        if self.folder.exists() and not resume:
            raise UserError(f"is unfinished, in {self.folder}", where=where, fix="add --resume, or remove that folder")
        if resume:
            self._take_up(where)

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
        atomic_write(self._settings, to_json(self.settings, indent=2))
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
        append_jsonl(self._done, written)
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
                fix = f"remove {self._done} and --resume: all parts are made again"
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

    @property
    def _settings(self) -> Path:
        return self.work / "settings.json"

    @property
    def _done(self) -> Path:
        return self.work / "done.jsonl"

    def _take_up(self, where: str) -> None:
        """Find which parts are done."""
        if not self.folder.is_dir():
            raise UserError("nothing to resume: no such folder", where=str(self.folder), fix="leave --resume out")
        if not self._settings.exists():
            return  # killed before its first part
        try:
            begun = json.loads(self._settings.read_text("utf-8"))
            truncate_jsonl(self._done, lambda _row: True)  # a last line that was cut short goes
            told = self._done.read_text("utf-8") if self._done.exists() else ""
            self.done = {written["part"]: written for written in map(json.loads, told.splitlines())}
        except (ValueError, LookupError, TypeError) as error:
            fix = "remove the folder, begin anew"
            raise UserError("cannot be resumed: damaged", where=str(self.folder), fix=fix) from error
        require_same(begun, self.settings, where, self.folder)
