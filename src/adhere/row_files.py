"""What files of rows hold, row by row: JSON Lines read strictly, CSV and Parquet, each with its `file:line`.

Folders (as `save_to_disk` wrote them, or of data files) and data sets of the hub are read by `datasets`: `NAME`,
`NAME:split` or `NAME:config:split`, the split being `train` unless it is given. Nothing is held but the rows in hand
(of such a data set, no more than one of its files). A row that cannot be read comes as the `Fault` that says so, in its
place. What a row means is `data`'s business.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from adhere.errors import UserError, unknown_name

MAX_LINE = 10_000_000
"""Bytes of one line: a file without line ends must not fill the memory."""
DEFAULT_SPLIT = "train"
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".txt", ".tsv", ".gz", ".zip", ".yaml", ".yml")


class Fault(Exception):
    """What is wrong with one row, and what to write instead."""


@dataclass(frozen=True)
class FilePosition:
    """Where in a JSON Lines file reading begins: how many bytes and lines stand before."""

    byte: int = 0
    line: int = 0


def records(
    source: str, limit: int | None, begin: FilePosition | None = None
) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """(`file:line`, row or what is wrong with it) of each of the first `limit` rows; of JSON Lines, from `begin` on."""
    path = Path(source)
    try:
        if not source.strip() or path.is_dir() or not path.exists():
            yield from _dataset(source, limit)
            return
        reader = _READERS.get(path.suffix.lower()) or partial(_jsonl, begin=begin or FilePosition())
        for count, record in enumerate(reader(path), 1):
            yield record
            if count == limit:
                return
    except PermissionError as error:
        raise UserError("cannot be read (no permission)", where=source, fix="check its permissions") from error


def is_jsonl(source: str) -> bool:
    """Whether `records` reads `source` as JSON Lines, which can be read from any `FilePosition` on."""
    path = Path(source)
    return path.is_file() and path.suffix.lower() not in _READERS


def positions(path: str | Path, rows: Iterable[int]) -> Iterator[FilePosition]:
    """Where the given rows of a JSON Lines file begin; their numbers count from 0 and ascend. No line is parsed."""
    wanted = iter(rows)
    target = next(wanted, None)
    byte = row = 0
    with Path(path).open("rb") as file:
        for line, text in enumerate(file):
            if target is None:
                return
            if (text.removeprefix(_BOM) if line == 0 else text).strip():
                if row == target:
                    yield FilePosition(byte, line)
                    target = next(wanted, None)
                row += 1
            byte += len(text)
    assert target is None, f"{path} has {row} rows, and row {target} was asked for"


def _jsonl(path: Path, begin: FilePosition) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    with path.open("rb") as file:
        file.seek(begin.byte)
        number = begin.line
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield where, Fault(f"the line is longer than {MAX_LINE // 1_000_000} MB; write one row a line")
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield where, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | Fault:
    """One line as an object, or what is wrong with it."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Fault(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except Fault as fault:
        return fault
    except json.JSONDecodeError as error:
        return Fault(f"not JSON at column {error.colno} ({error.msg}); write one object a line")
    except (RecursionError, ValueError):
        return Fault("not JSON that can be read (nested too deeply, or a number with too many digits); simplify it")
    if isinstance(value, list):
        return Fault("an array, not an object; write one object a line, without the enclosing [ ]")
    if not isinstance(value, dict):
        return Fault(f'{kind(value)}, not an object; write {{"prompt": "…"}}')
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in {n for n, _ in pairs[:i]})
        raise Fault(f"`{short(twice)}` stands twice in one object; keep one")
    return found


def _constant(name: str) -> NoReturn:
    raise Fault(f"{name} is not JSON; write a number or null")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Fault(f"{short(text)} is too large for a number; write a smaller one")
    return value


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    csv.field_size_limit(MAX_LINE)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError("two columns have one name", where=f"{path}:1", fix="rename one")
            number = reader.line_num + 1
            for cells in reader:
                where, number = f"{path}:{number}", reader.line_num + 1
                if cells and len(cells) != len(header):
                    yield (
                        where,
                        Fault(f"{len(cells)} cells under {len(header)} columns; quote cells that hold a comma"),
                    )
                elif cells:
                    # An empty cell is CSV's only way to leave a field out.
                    yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except UnicodeDecodeError as error:
            raise UserError("is not UTF-8", where=str(path), fix="save the file as UTF-8") from error
        except csv.Error as error:
            raise UserError(
                f"is not CSV ({error})", where=f"{path}:{reader.line_num}", fix="check the quotes"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", record
    except arrow.ArrowInvalid as error:
        raise UserError("is not a Parquet file", where=str(path), fix="check the file, or give JSON Lines") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any] | Fault]]]] = {
    ".csv": _csv,
    ".parquet": _parquet,
}


def _dataset(source: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    name, *parts = [source] if Path(source).is_dir() else source.split(":")
    local = bool(name) and Path(name).is_dir()
    if not local and (not name.strip() or source.endswith(_SUFFIXES) or name.startswith((".", "/", "~"))):
        raise UserError("no such file", where=source or "(empty name)", fix="check the path")
    config, split = (None, None) if not parts else (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    try:
        if len(parts) > 2:
            raise ValueError(f"{len(parts)} colons")
        found = _saved(name, split) if local and _is_saved(name) else _loaded(name, config, split, local, limit)
        for number, record in enumerate(found, 1):
            yield f"{source}:row {number}", dict(record)
            if number == limit:
                return
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # each kind of trouble with a data set has a class of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{'a folder' if local else 'neither a file nor a data set'} that can{'not' * local} be loaded ({reason})",
            where=source,
            fix="give a file of rows, a folder of them or one that save_to_disk wrote; FOLDER:split picks a split"
            if local
            else "check the path; a hub data set is owner/name, owner/name:split or owner/name:config:split",
        ) from error


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((Path(folder) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _saved(folder: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows of a folder that `save_to_disk` wrote, mapped into memory."""
    import datasets

    found: dict[str, Iterable[Mapping[str, Any]]] | datasets.Dataset = datasets.load_from_disk(folder)
    if isinstance(found, dict):
        split = split or DEFAULT_SPLIT
        if split not in found:
            raise unknown_name("split", split, found, where=folder)
        return found[split]
    if split is not None:
        raise UserError("one data set, without splits", where=folder, fix=f"leave :{split} out")
    rows: Iterable[Mapping[str, Any]] = found
    return rows


def _loaded(
    name: str, config: str | None, split: str | None, local: bool, limit: int | None
) -> Iterable[Mapping[str, Any]]:
    """The rows of a hub data set, or of a folder of data files."""
    import datasets

    # A folder is read where it lies. Of the hub, streaming fetches no more than it reads, but anew each time, and
    # cannot read what an earlier run has stored.
    streaming = local or (limit is not None and not datasets.config.HF_HUB_OFFLINE)
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        name, config, split=split or DEFAULT_SPLIT, streaming=streaming
    )
    return rows


def kind(value: object) -> str:
    """How JSON calls the type of `value`."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def encodable(text: str, what: str) -> str:
    """`text`, which is to be written again; raises `Fault` where it has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault(f"{what} holds half of a surrogate pair at character {error.start + 1}; remove it") from error
    return text


def short(text: str) -> str:
    """The beginning of `text`, for a message."""
    return text if len(text) <= 40 else f"{text[:39]}…"
