"""Writing to disk so that nothing is ever half-written: built under a temporary name, flushed, then renamed.

A process that is killed leaves at most a hidden `.NAME.….partial` beside the target, which `sweep` clears away. What is
read of a user's rows is `data`'s business, and whether work goes on is `resume`'s.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import date
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import Any

from adhere.errors import RunFailed, UserError

TAIL = 4096
"""Bytes by whose sight a file that grows is known again."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
# Libraries that write through Rust or C++ (safetensors, torch) report a full disk in words only.
_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")


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


def rename(source: Path, target: Path) -> None:
    """Give a finished file its name, for good: after a power cut it has it still."""
    with disk_errors(target):
        source.replace(target)
        _sync_folder(target.parent)


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


class GrowingFile:
    """A file that this process alone extends. Before each write it must be the file that it was after the one before,
    by its size and its last bytes: what was removed, cut short or written to by others is never extended.

    `size`: bytes of it that count, where it is known; what is beyond them goes with the first write.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = Path(path)
        self.size = (self.path.stat().st_size if self.path.exists() else 0) if size is None else size
        self._cut = size is not None
        self._tail = self.tail() if self.size else b""

    def tail(self) -> bytes:
        """The last bytes of what counts; fewer, or none, where they are not there."""
        if not self.path.is_file():
            return b""
        with self.path.open("rb") as file:
            file.seek(max(0, self.size - TAIL))
            return file.read(min(self.size, TAIL))

    def append(self, data: bytes, *, sync: bool = False) -> None:
        """Extend it in a single write, so that a reader never meets half of it; `sync`: to the disk, for good.

        Raises `RunFailed` where it is not the file that it was."""
        with disk_errors(self.path, len(data)):
            if self.size == 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            elif not self.path.exists():
                raise RunFailed("was removed while it was written", where=str(self.path), fix="begin anew")
            with self.path.open("ab", buffering=0) as file:
                found = file.tell()
                if found < self.size or (found > self.size and not self._cut) or self.tail() != self._tail:
                    what = f"is not as it was written: {self.size} bytes, and {found} are there"
                    raise RunFailed(what, where=str(self.path), fix="look who else wrote to it")
                if found > self.size:
                    file.truncate(self.size)
                file.write(data)
                if sync:
                    os.fsync(file.fileno())
        self.size += len(data)
        self._cut, self._tail = False, (self._tail + data)[-TAIL:]


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one line to a JSON Lines file. Raises `RunFailed` where it does not end with a whole line."""
    file = GrowingFile(path)
    if file.size and not file.tail().endswith(b"\n"):
        raise RunFailed("ends in the middle of a line", where=str(path), fix="repair or remove that line")
    file.append(json_line(row))


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON Lines."""
    return (to_json(row) + "\n").encode("utf-8", "backslashreplace")


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
