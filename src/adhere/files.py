"""Writing to disk so that nothing is ever half-written: built under a temporary name, flushed, then renamed.

A process that is killed leaves at most a hidden `.NAME.….partial` beside the target; `new_run_dir` sweeps those away on
resume. What is read of a user's rows is `data`'s business, not this module's.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import date
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import Any

from adhere.errors import RunFailed, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Libraries that write through Rust or C++ (safetensors, torch) report a full disk in words only.
_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")
_RUN_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints", "model")


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Put `content` at `path`, whole or not at all; parent folders are made. Text is written as UTF-8.

    A device or pipe (`/dev/stdout`) is written to directly, a symbolic link stays and its target is replaced.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with disk_errors(path, len(data)):
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        if path.is_dir():
            raise UserError("is a folder, a file was to be written", where=str(path), fix="give a file name")
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _sibling(target, "partial")
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(target.parent)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when the block ends, and vanishes if the block fails.

    A folder already at `path` is replaced, and stays as it was when the block fails.
    """
    target = Path(os.path.realpath(path))
    partial = _sibling(target, "partial")
    with disk_errors(target):
        if target.exists() and not target.is_dir():
            raise UserError("is a file, a folder was to be written", where=str(path), fix="choose another name")
        partial.mkdir(parents=True)
        try:
            yield partial
            for item in partial.rglob("*"):
                _sync(item)
            _sync(partial)
            _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_space(path: str | Path, size: int) -> None:
    """Raise `RunFailed` unless the disk that holds (or would hold) `path` has `size` bytes to spare."""
    free = _free(Path(path))
    if free < size:
        raise _no_room(Path(path), size, free)


@contextmanager
def disk_errors(path: str | Path, size: int | None = None) -> Iterator[None]:
    """Turn what the operating system says of `path` into a `UserError`, a full disk into `RunFailed`.

    `size`: bytes that were to be written, for the message.
    """
    path = Path(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in _FULL) or any(w in str(error).lower() for w in _FULL_WORDS):
            raise _no_room(path, size, _free(path)) from error
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise UserError("cannot be written (no permission)", where=str(path), fix="choose another place") from error
        if isinstance(error, NotADirectoryError | FileExistsError):
            raise UserError(
                "cannot be written: a part of its path is a file", where=str(path), fix="choose another place"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise UserError("the name is too long", where=str(path), fix="choose a shorter one") from error
        raise


def to_json(value: object, *, indent: int | None = None) -> str:
    """`value` as strict JSON: what is not finite becomes null; tensors, dataclasses, paths and dates are read."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one line to a JSON Lines file, in a single write, so that a reader never meets half of it."""
    line = (to_json(row) + "\n").encode("utf-8", "backslashreplace")
    with disk_errors(path, len(line)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            file.write(line)


def truncate_jsonl(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave only the rows of a JSON Lines file for which `keep` is true; how many went is returned.

    For resuming: rows after the checkpoint go, and a last line that a killed process left unfinished goes with them. A
    line that is broken elsewhere is an error. A missing file has no rows.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError("is not JSON", where=f"{path}:{number}", fix="repair or remove the line") from error
        if keep(row):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if len(kept) < len(lines) or (lines and not lines[-1].endswith(b"\n")):
        atomic_write(path, b"".join(kept))
    return len(lines) - len(kept)


class GrowingRows:
    """JSON Lines written batch by batch and resumable: they grow in `NAME.partial/` and take their name at the end.

    `state.json` in that folder says how many rows of the input are `done`, how many bytes they made, the `settings`
    that made them, and the `tally` that the caller keeps. What a killed process left beyond those bytes is cut off, so
    no line is lost or doubled. Nothing is written before the first `add`.

    Raises `UserError`: the target is there already, or unfinished without `resume`; with `resume`, there is nothing to
    resume or the settings differ.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(f"{self.path.name}.partial")
        self.settings: dict[str, Any] = json.loads(to_json(settings))
        self.done = 0
        self.tally: dict[str, float] = {}
        self._bytes = 0
        where = str(self.path)
        if self.path.is_dir():
            raise UserError("is a folder, a file was to be written", where=where, fix="give a file name")
        if self.path.exists():
            raise UserError("is there already", where=where, fix="choose another --output")
        if self.folder.exists() and not resume:
            raise UserError(f"is unfinished, in {self.folder}", where=where, fix="add --resume, or remove that folder")
        if resume:
            self._take_up()

    def add(self, rows: Iterable[Mapping[str, Any]], done: int, tally: Mapping[str, float]) -> None:
        """Write a batch: its rows, how many rows of the input are done with it, and the tally so far."""
        text = "".join(to_json(row) + "\n" for row in rows).encode("utf-8", "backslashreplace")
        with disk_errors(self.path, len(text)):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._rows.open("ab") as file:
                file.truncate(self._bytes)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self.done, self.tally, self._bytes = done, dict(tally), self._bytes + len(text)
        state = {"done": done, "bytes": self._bytes, "tally": self.tally, "settings": self.settings}
        atomic_write(self._state, to_json(state, indent=2))

    def finish(self) -> None:
        """Give the rows their name."""
        with disk_errors(self.path):
            self._rows.replace(self.path)
            _sync_folder(self.path.parent)
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    def _take_up(self) -> None:
        """Find where the unfinished rows stand."""
        where = str(self.path)
        if not self.folder.is_dir():
            raise UserError("nothing to resume: no such folder", where=str(self.folder), fix="leave --resume out")
        if not self._state.exists():
            return  # killed before its first batch
        try:
            state = json.loads(self._state.read_text("utf-8"))
            begun, self.done, self._bytes, self.tally = (state[k] for k in ("settings", "done", "bytes", "tally"))
            whole = self._rows.stat().st_size >= self._bytes
        except (OSError, ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            raise UserError("cannot be resumed: damaged", where=str(self.folder), fix="remove the folder, begin anew")
        require_same(begun, self.settings, where, self.folder)


def require_same(begun: Mapping[str, Any], now: Mapping[str, Any], where: str, folder: Path) -> None:
    """Raise `UserError` where the settings that the unfinished work in `folder` began with are not those of now."""
    names = sorted({*begun, *now})
    changed = [name for name in names if begun.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name} was {begun.get(name)}, is {now.get(name)}" for name in changed)
        fix = f"give the options it began with, or remove {folder}"
        raise UserError(f"cannot be resumed with other options: {told}", where=where, fix=fix)


def new_run_dir(path: str | Path, resume: bool = False) -> Path:
    """Make the folder of a run, or with `resume` find one that can go on.

    Raises `UserError`: the folder already holds a run and `resume` is off, or `resume` is on without a checkpoint.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError("is a file, the folder of a run was expected", where=str(path), fix="choose another --output")
    if resume:
        if not path.is_dir():
            raise UserError("nothing to resume: no such folder", where=str(path), fix="leave --resume out")
        sweep(path)
        sweep(path / "checkpoints")
        sweep(path / "completions")
        if not any((path / "checkpoints").glob("step-*")):
            raise UserError(
                "nothing to resume: no checkpoint in it",
                where=str(path),
                fix="remove the folder or choose another --output, and leave --resume out",
            )
        return path
    if any((path / mark).exists() for mark in _RUN_MARKS):
        raise UserError("already holds a run", where=str(path), fix="add --resume or choose another --output")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def sweep(folder: str | Path) -> None:
    """Clear away what a killed process left half-written in `folder`, and put back what it was about to replace."""
    for left in Path(folder).glob(".*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    for old in Path(folder).glob(".*.old"):
        target = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _sibling(target: Path, kind: str) -> Path:
    """A name of our own beside `target`: same folder, so that renaming stays within one file system."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`. POSIX cannot replace a full folder in one step, so an old one steps aside first."""
    if not target.exists():
        new.rename(target)
    else:
        old = _sibling(target, "old")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(target.parent)


def _sync(item: Path) -> None:
    handle = os.open(item, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be flushed; the rename itself is atomic all the same.
    with suppress(OSError):
        _sync(folder)


def _free(path: Path) -> int:
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _no_room(path: Path, size: int | None, free: int) -> RunFailed:
    need = "" if size is None else f"needs {_megabytes(size)}, "
    return RunFailed(f"no room on disk at {path}: {need}has {_megabytes(free)}", fix="free some space and try again")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path | Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, date | clock_time):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")
