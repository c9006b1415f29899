"""Rows in and out: JSON Lines read strictly, with `file:line` in every complaint; CSV, Parquet and hub ids too.

A prompt is given as `prompt` (text or messages), as `messages`, or as `question` or `instruction` with an optional
`context`, laid out by a template. All bad rows are reported together. Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import csv
import json
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from attune.errors import UserError, unknown_name
from attune.files import atomic_write, to_json

MAX_LINE = 10_000_000
"""Bytes of one line: a file without line ends must not fill the memory."""
SHOWN = 20
"""Bad rows that are told one by one; the rest are counted."""
QUESTION = "{context}\n\nQuestion: {question}\nAnswer:"
INSTRUCTION = "{instruction}\n\n{context}"
ROLES = ("system", "developer", "user", "assistant", "tool")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".txt", ".tsv", ".gz", ".zip", ".yaml", ".yml")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One prompt and what is known of it."""

    prompt: str | Messages
    """Text, or chat messages that end with the user's (or a tool's) turn."""
    answers: tuple[str, ...] = ()
    """Accepted answers; empty where none are known."""
    response: str | None = None
    """A given response, to be scored."""
    reference: str | None = None
    """A response to compare with, not necessarily the only right one."""
    chosen: str | None = None
    """The preferred response of a pair."""
    rejected: str | None = None
    """The other response of the pair."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was read."""
    where: str = ""
    """`file:line`, for messages."""


class _Fault(Exception):
    """What is wrong with one row, and what to write instead."""


def read_rows(
    source: str | Path, *, template: str | None = None, need: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Read the rows of a file, or of a hub data set (`owner/name`, `owner/name:split`, `owner/name:config:split`).

    `template`: `{field}` names to lay out a prompt from the fields of a row; it goes before `prompt` and `messages`.
    `need`: fields of `Row` that every row must have, e.g. `("answers",)`. `limit`: read that many rows and stop.

    Where a row has more than one of them, `prompt` goes before `messages`, and that before `question` and
    `instruction`. A last assistant turn of `messages` becomes `response`; `answer` stands for `answers` of one; of a
    `chosen` or `rejected` conversation the last turn is read.

    Raises `UserError`: no such file, no rows, a template that is not one, or every bad row (first twenty).
    """
    unknown = [name for name in need if name not in Row.__dataclass_fields__]
    assert not unknown, f"`need` names fields that a Row has not: {unknown}"
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} rows leaves none", fix="give 1 or more")
    names = _template_fields(template) if template is not None else ()
    rows: list[Row] = []
    faults: list[str] = []
    bad = 0
    for where, raw in _records(str(source), limit):
        try:
            if isinstance(raw, _Fault):
                raise raw
            rows.append(_row(raw, where, template, names, need))
        except _Fault as fault:
            bad += 1
            if bad <= SHOWN:
                faults.append(f"{where}: {fault}")
    if bad > SHOWN:
        faults.append(f"… and {bad - SHOWN} more")
    if bad:
        raise UserError("\n".join(faults))
    if not rows:
        raise UserError("holds no rows", where=str(source), fix='write one object a line, e.g. {"prompt": "…"}')
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, all or none."""
    text = "".join(to_json(row) + "\n" for row in rows)
    atomic_write(path, text.encode("utf-8", "backslashreplace"))


# ---------------------------------------- from disk or hub


def _records(source: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any] | _Fault]]:
    """(`file:line`, row or what is wrong with it) of each of the first `limit` rows."""
    path = Path(source)
    try:
        if source and path.is_dir():
            raise UserError("is a folder", where=source, fix="give a file of rows")
        if not source or not path.exists():
            if not source.strip() or source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
                raise UserError("no such file", where=source or "(empty name)", fix="check the path")
            yield from _hub(source, limit)
            return
        reader = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _jsonl)
        for count, record in enumerate(reader(path), 1):
            yield record
            if count == limit:
                return
    except PermissionError as error:
        raise UserError("cannot be read (no permission)", where=source, fix="check its permissions") from error


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | _Fault]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield where, _Fault(f"the line is longer than {MAX_LINE // 1_000_000} MB; write one row a line")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield where, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | _Fault:
    """One line as an object, or what is wrong with it."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return _Fault(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except _Fault as fault:
        return fault
    except json.JSONDecodeError as error:
        return _Fault(f"not JSON at column {error.colno} ({error.msg}); write one object a line")
    except (RecursionError, ValueError):
        return _Fault("not JSON that can be read (nested too deeply, or a number with too many digits); simplify it")
    if isinstance(value, list):
        return _Fault("an array, not an object; write one object a line, without the enclosing [ ]")
    if not isinstance(value, dict):
        return _Fault(f'{_kind(value)}, not an object; write {{"prompt": "…"}}')
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in {n for n, _ in pairs[:i]})
        raise _Fault(f"`{_short(twice)}` stands twice in one object; keep one")
    return found


def _constant(name: str) -> NoReturn:
    raise _Fault(f"{name} is not JSON; write a number or null")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Fault(f"{_short(text)} is too large for a number; write a smaller one")
    return value


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | _Fault]]:
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
                        _Fault(f"{len(cells)} cells under {len(header)} columns; quote cells that hold a comma"),
                    )
                elif cells:
                    # An empty cell is CSV's only way to leave a field out.
                    yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
        except UnicodeDecodeError as error:
            raise UserError("is not UTF-8", where=str(path), fix="save the file as UTF-8") from error
        except csv.Error as error:
            raise UserError(
                f"is not CSV ({error})", where=f"{path}:{reader.line_num}", fix="check the quotes"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | _Fault]]:
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


def _hub(source: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any] | _Fault]]:
    import datasets

    name, *parts = source.split(":")
    config, split = (None, "train") if not parts else (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    try:
        if len(parts) > 2:
            raise ValueError(f"{len(parts)} colons")
        # Streaming fetches no more than it reads, but cannot read what an earlier run has stored.
        streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
        found = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, record in enumerate(found, 1):
            yield f"{source}:row {number}", dict(record)
            if number == limit:
                return
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # each kind of trouble with the hub has a class of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"neither a file nor a data set that can be loaded ({reason})",
            where=source,
            fix="check the path; a hub data set is owner/name, owner/name:split or owner/name:config:split",
        ) from error


# ---------------------------------------- what a row says


def _row(raw: dict[str, Any], where: str, template: str | None, names: Sequence[str], need: Sequence[str]) -> Row:
    prompt, response = _prompt(raw, template, names)
    given = _text(raw, "response")
    if response is not None and given is not None:
        raise _Fault("a last assistant turn and a `response`; keep one of them")
    row = Row(
        prompt,
        _answers(raw),
        response if given is None else given,
        _text(raw, "reference"),
        _text(raw, "chosen", chat=True),
        _text(raw, "rejected", chat=True),
        raw,
        where,
    )
    for name in need:
        if getattr(row, name) in (None, ()):
            raise _Fault(f"no `{name}`; write " + ('"answers": ["…"]' if name == "answers" else f'"{name}": "…"'))
    return row


def _prompt(raw: dict[str, Any], template: str | None, names: Sequence[str]) -> tuple[str | Messages, str | None]:
    """The prompt, and the response where the messages end with one."""
    if template is not None:
        for name in names:
            if raw.get(name) is None:
                raise _Fault(f"no `{name}`, which the template names; the row has {', '.join(raw) or 'no fields'}")
        text = template.format(**{name: _text(raw, name, empty=True) for name in names})
        if not text.strip():
            raise _Fault("the prompt is empty; write some text in " + " or ".join(f"`{name}`" for name in names))
        return text, None
    for name in ("prompt", "messages"):
        if isinstance(raw.get(name), list):
            return _messages(raw[name], name)
        if raw.get(name) is not None and name == "messages":
            raise _Fault(f'`messages` is {_kind(raw[name])}; write [{{"role": "user", "content": "…"}}]')
        if raw.get(name) is not None:
            return _text(raw, name) or "", None
    for name, layout in (("question", QUESTION), ("instruction", INSTRUCTION)):
        if raw.get(name) is not None:
            filled = {"context": _text(raw, "context", empty=True) or "", name: _text(raw, name)}
            return layout.format(**filled).strip(), None
    if raw.get("context") is not None:
        raise _Fault("a `context` without a `question` or an `instruction`; add one, or give a template")
    raise _Fault('no `prompt` or `messages`; write {"prompt": "…"}')


def _messages(turns: list[Any], name: str) -> tuple[Messages, str | None]:
    if not turns:
        raise _Fault(f'`{name}` is empty; write [{{"role": "user", "content": "…"}}]')
    found: Messages = []
    for number, turn in enumerate(turns, 1):
        place = f"`{name}` {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise _Fault(f'{place} has no role; write {{"role": "user", "content": "…"}}')
        role, content = turn["role"], turn.get("content")
        if role not in ROLES:
            raise _Fault(f"{place}: {unknown_name('role', _short(role), ROLES)}")
        if not isinstance(content, str):
            raise _Fault(f"{place}: `content` is {_kind(content)}; write text")
        if not content.strip() and role == "user":
            raise _Fault(f"{place}: `content` is empty; write some text")
        said = {key: value for key, value in turn.items() if value is not None}
        for key, value in said.items():
            if not isinstance(value, str):
                raise _Fault(f"{place}: `{_short(key)}` is {_kind(value)}; only text is read, remove it")
        found.append({key: _encodable(value, f"{place}: `{_short(key)}`") for key, value in said.items()})
    if found[-1]["role"] != "assistant":
        return found, None
    if len(found) == 1:
        raise _Fault(f"`{name}` holds an assistant turn only; begin with the user's")
    return found[:-1], found[-1]["content"]


def _answers(raw: dict[str, Any]) -> tuple[str, ...]:
    name = "answers" if raw.get("answers") is not None else "answer"
    value = raw.get(name)
    if value is None:
        return ()
    if isinstance(value, dict):  # the form of SQuAD: {"text": […], "answer_start": […]}
        value = value.get("text")
    found: list[Any] = value if isinstance(value, list) else [value]
    for item in found:
        if not isinstance(item, str):
            raise _Fault(f'`{name}` holds {_kind(item)}; write text, e.g. "answers": ["…"]')
        if not item.strip():
            raise _Fault(f"`{name}` holds an empty text; write the answer or leave `{name}` out")
    return tuple(_encodable(item, f"`{name}`") for item in found)


def _text(raw: dict[str, Any], name: str, *, empty: bool = False, chat: bool = False) -> str | None:
    """The text of a field, None where it is absent or null. `empty`: may be blank; `chat`: may be a conversation."""
    value = raw.get(name)
    if value is None:
        return None
    if chat and isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise _Fault(f'`{name}` is {_kind(value)}; write text, e.g. "{name}": "…"')
    if not empty and name in ("prompt", "question", "instruction") and not value.strip():
        raise _Fault(f"`{name}` is empty; write some text")
    return _encodable(value, f"`{name}`")


def _encodable(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Fault(f"{what} holds half of a surrogate pair at character {error.start + 1}; remove it") from error
    return text


def _template_fields(template: str) -> list[str]:
    """The fields that a template names, each once."""
    where = "template"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{error} in {template!r}", where=where, fix="write {field}, and {{ }} for braces") from error
    names: list[str] = []
    for _, name, layout, conversion in parts:
        if name is None:
            continue
        if not name or layout or conversion or any(mark in name for mark in ".[]") or name.isdigit():
            raise UserError(f"`{{{name}}}` in it is not a plain field name", where=where, fix="write {field}")
        if name not in names:
            names.append(name)
    if not names:
        raise UserError("it names no field, so that every prompt would be the same", where=where, fix="write {field}")
    return names


def _kind(value: object) -> str:
    """How JSON calls the type of `value`."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
