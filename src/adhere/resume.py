"""Going on with work that was stopped: the one place that decides whether it may go on, and cuts off what a kill left.

Work that is done batch by batch keeps a `Journal` of the settings it began with and of each batch that is done.
Training has checkpoints instead (`learn.checkpoint`), and asks here for its folder alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import GrowingFile, atomic_write, disk_errors, json_line, rename, sweep, to_json

JOURNAL = ".journal.jsonl"
"""Hidden: nobody takes it for data."""
_RUN_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints", "model")
_BEGUN_MARKS = (*_RUN_MARKS, "audit-before.json")
"""What a run that was killed may have left."""


def require_new(path: Path) -> None:
    """Raise `UserError` where there is something at `path` already: nothing is overwritten."""
    if path.exists():
        raise UserError("already exists", where=str(path), fix="choose another --output")


def require_same(begun: Mapping[str, Any], now: Mapping[str, Any], *, where: Path, fix: str) -> None:
    """Raise `UserError` unless the settings of now are those that the work at `where` began with.

    The message names each setting that differs, with both values; `fix` says what to do then.
    """
    if changed := list(_changes(begun, json.loads(to_json(now)))):
        raise UserError(f"began with other settings: {'; '.join(changed)}", where=str(where), fix=fix)


def fingerprint(content: str | bytes) -> str:
    """Sixteen hex digits to compare what is too long to keep among the settings, such as a file of prompts."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def damaged(path: Path) -> UserError:
    """The error for unfinished work, or a result, that is not as it was written."""
    return UserError("is damaged, and cannot be resumed", where=str(path), fix="remove it and begin anew")


def finished(result: Path, settings: Mapping[str, Any], *, where: Path, fix: str) -> bool:
    """Whether the JSON document `result` is there. Raises `UserError` where its `settings` are not these."""
    if not result.exists():
        return False
    try:
        begun = dict(json.loads(result.read_bytes())["settings"])
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(result) from error
    require_same(begun, settings, where=where, fix=fix)
    return True


def truncate_jsonl(path: str | Path, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """Leave only the rows of a JSON Lines file for which `keep` is true, and return them.

    A last line that a killed process left unfinished goes too. A line that is broken elsewhere is a `UserError`. A
    missing file has no rows.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError("is not JSON", where=f"{path}:{number}", fix="repair or remove the line") from error
        if keep(row):
            kept.append((line if line.endswith(b"\n") else line + b"\n", row))
    if len(kept) < len(lines) or (lines and not lines[-1].endswith(b"\n")):
        atomic_write(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


class Journal:
    """What is done of the work in `folder`: the settings it began with, then an entry, with these `fields`, a batch.

    Nothing is written before `begin` or the first `add`. Raises `UserError`: the folder is there, and `resume` is off;
    with `resume`, it is not there, is damaged, or began with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fields: Sequence[str], *, resume: bool) -> None:
        self.folder, self.file, self._settings = folder, folder / JOURNAL, settings
        self.entries: list[dict[str, Any]] = []
        if resume and not folder.is_dir():
            raise _nothing_to_resume(folder)
        if not resume and folder.exists():
            raise UserError("is unfinished", where=str(folder), fix="add --resume, or remove this folder")
        try:
            rows = truncate_jsonl(self.file)
            begun = dict(rows[0]["settings"]) if rows else None
            self.entries = [{name: row[name] for name in fields} for row in rows[1:]]
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(folder) from error
        if begun is not None:  # else it was killed before its first line was whole
            require_same(begun, settings, where=folder, fix="give those it began with, or remove this folder")
        self._begun = begun is not None
        self._lines = GrowingFile(self.file)

    def begin(self) -> None:
        """Write the settings, unless they are there."""
        if not self._begun:
            self._lines.append(json_line({"settings": self._settings}))
        self._begun = True

    def add(self, entry: dict[str, Any]) -> None:
        """Remember a batch that is done."""
        self.begin()
        self._lines.append(json_line(entry))
        self.entries.append(entry)

    def close(self) -> None:
        """All that was done is where it belongs: the folder goes."""
        shutil.rmtree(self.folder, ignore_errors=True)


class GrowingRows:
    """JSON Lines written batch by batch and resumable: they grow in `NAME.partial/` and take their name at the end.

    The journal says how many rows of the input are `done`, how many bytes they made and which are the last of them, and
    the `tally` that the caller keeps. What a killed process left beyond those bytes is cut off, so no line is lost or
    doubled. Raises `UserError`:
    the target is there already, or as `Journal` does.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(f"{self.path.name}.partial")
        self._rows = self.folder / "rows.jsonl"
        require_new(self.path)
        self._journal = Journal(self.folder, settings, ("done", "bytes", "tail", "tally"), resume=resume)
        last = [{"done": 0, "bytes": 0, "tail": fingerprint(b""), "tally": {}}, *self._journal.entries][-1]
        self.done, self.tally = last["done"], last["tally"]
        self._file = GrowingFile(self._rows, last["bytes"])
        if fingerprint(self._file.tail()) != last["tail"]:
            raise damaged(self._rows)

    def add(self, rows: Iterable[Mapping[str, Any]], done: int, tally: Mapping[str, float]) -> None:
        """Write a batch: its rows, how many rows of the input are done with it, and the tally so far."""
        self._file.append(b"".join(map(json_line, rows)), sync=True)
        self.done, self.tally = done, dict(tally)
        tail = fingerprint(self._file.tail())
        self._journal.add({"done": done, "bytes": self._file.size, "tail": tail, "tally": self.tally})

    def finish(self) -> None:
        """Give the rows their name."""
        rename(self._rows, self.path)
        self._journal.close()


def new_run_dir(path: str | Path, resume: bool = False) -> Path:
    """Make the folder of a training run, or with `resume` find one that can go on.

    A run that was killed before its first checkpoint can: it starts over. Raises `UserError`: the folder already holds
    a run and `resume` is off, or `resume` is on and it holds none.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError("is a file, the folder of a run was expected", where=str(path), fix="choose another --output")
    if resume:
        if not path.is_dir():
            raise _nothing_to_resume(path)
        for folder in (path, path / "checkpoints", path / "completions"):
            sweep(folder)
        if any(path.iterdir()) and not any((path / mark).exists() for mark in _BEGUN_MARKS):
            fix = "choose the folder of a run, or leave --resume out"
            raise UserError("nothing to resume: no run in it", where=str(path), fix=fix)
        return path
    if any((path / mark).exists() for mark in _RUN_MARKS):
        raise UserError("already holds a run", where=str(path), fix="add --resume or choose another --output")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _changes(begun: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`sampling.top_k was 50, is 20` for each setting that differs, nested ones by their path."""
    for name in sorted({*begun, *now}):
        old, new = begun.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} was {old}, is {new}"


def _nothing_to_resume(path: Path) -> UserError:
    return UserError("nothing to resume: it is not there", where=str(path), fix="leave --resume out")
