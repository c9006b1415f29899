"""Rows in and out: what a row of a file means, with `file:line` in every complaint (`records` reads the files).

A prompt is given as `prompt` (text or messages), as `messages`, or as `question` or `instruction` with an optional
`context`; `Columns` reads rows that call them otherwise. All bad rows are reported together. Nothing here knows a
tokenizer or a model.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from adhere.errors import UserError, unknown_name
from adhere.files import atomic_write, to_json
from adhere.row_files import Fault, FilePosition, encodable, kind, records, short
from adhere.row_lists import unpacked
from adhere.row_responses import ROLES, answers, candidates, pair

SHOWN = 20
"""Bad rows that are told one by one; the rest are counted."""
QUESTION = "{context}\n\nQuestion: {question}\nAnswer:"
INSTRUCTION = "{instruction}\n\n{context}"
LISTS = ("answers", "candidates")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Columns:
    """Which fields of a row are its prompt and its answers, where they have names of their own."""

    prompt_field: str | None = None
    """Field that holds the prompt, text or messages (default: prompt, messages, question or instruction)."""
    template: str | None = None
    """Text with {field} names that makes a prompt of several fields, e.g. "{context} {question}"."""
    answers_field: str | None = None
    """Field that holds the accepted answers (default: answers or answer)."""

    def __post_init__(self) -> None:
        if self.prompt_field is not None and self.template is not None:
            raise UserError("prompt_field and template both say what the prompt is", fix="leave one of them out")
        for name in ("prompt_field", "answers_field"):
            if getattr(self, name) == "":
                raise UserError(f"{name} is empty", fix="write the name of a field")
        self.template_fields()

    def template_fields(self) -> tuple[str, ...]:
        """The fields that the template names, each once. Raises `UserError`: it is none."""
        return () if self.template is None else _template_fields(self.template)


PLAIN = Columns()
"""Rows with the usual names."""


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
    candidates: tuple[str, ...] = ()
    """Responses to choose from; empty where none are given."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was read; lists that a CSV holds as text are lists."""
    where: str = ""
    """`file:line`, for messages."""


def read_rows(
    source: str | Path, columns: Columns = PLAIN, *, need: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Read the rows of a file, of a folder of them, or of a hub data set (see `adhere.row_files`).

    `columns`: names of the fields, where they are not the usual ones; what it names goes before those. `need`: fields
    of `Row` that every row must have, e.g. `("answers",)`. `limit`: read that many rows and stop.

    Where a row has more than one of them, `prompt` goes before `messages`, and that before `question` and
    `instruction`. A last assistant turn of `messages` becomes `response`; `answer` stands for `answers` of one; of a
    `chosen` or `rejected` conversation the last turn is read.

    Raises `UserError`: no such file, no rows, or every bad row (first twenty).
    """
    return list(iter_rows(source, columns, need=need, limit=limit))


def iter_rows(
    source: str | Path,
    columns: Columns = PLAIN,
    *,
    need: Sequence[str] = (),
    limit: int | None = None,
    begin: FilePosition | None = None,
) -> Iterator[Row]:
    """The rows that `read_rows` reads, one at a time, for files that do not fit the memory.

    `begin`: of a JSON Lines file, the rows from there on (see `adhere.row_files.places`).

    Bad rows are left out and told together after the last row: who must not act on the good rows of a bad file goes
    through them once before.
    """
    unknown = [name for name in need if name not in Row.__dataclass_fields__]
    assert not unknown, f"`need` names fields that a Row has not: {unknown}"
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} rows leaves none", fix="give 1 or more")
    faults: list[str] = []
    good = bad = 0
    for where, raw in records(str(source), limit, begin):
        try:
            if isinstance(raw, Fault):
                raise raw
            row = _row(raw, where, columns, need)
        except Fault as fault:
            bad += 1
            if bad <= SHOWN:
                faults.append(f"{where}: {fault}")
            continue
        good += 1
        yield row
    if bad > SHOWN:
        faults.append(f"… and {bad - SHOWN} more")
    if bad:
        raise UserError("\n".join(faults))
    if not good:
        raise UserError("holds no rows", where=str(source), fix='write one object a line, e.g. {"prompt": "…"}')


def writable(row: Row) -> str:
    """All that a row holds, as JSON, which it is to be written as beside its scores.

    Raises `UserError` where a field (of a Parquet file, of a data set) has no such form."""
    for name, value in row.fields.items():
        try:
            to_json(value)
        except TypeError as error:
            fix = "leave that column out, or make it text"
            raise UserError(f"`{short(name)}` cannot be written as JSON ({error})", where=row.where, fix=fix) from error
    return to_json([row.prompt, row.answers, row.fields])


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, all or none."""
    text = "".join(to_json(row) + "\n" for row in rows)
    atomic_write(path, text.encode("utf-8", "backslashreplace"))


def _row(fields: dict[str, Any], where: str, columns: Columns, need: Sequence[str]) -> Row:
    texts = {*LISTS, "answer", "documents", "paraphrases", columns.answers_field or "answers"}
    raw = unpacked(fields, texts, {"prompt", "messages", "chosen", "rejected", columns.prompt_field or "prompt"})
    alone = columns.answers_field is None and raw.get("answers") is None
    if alone and isinstance(raw.get("answer"), list) and isinstance(fields["answer"], str):
        # The one answer may well be a list that is to be written out; which of the two is meant cannot be told.
        raise Fault("`answer` is text that holds a list; call it `answers`, which may hold more than one")
    prompt, response = _prompt(raw, columns)
    given = _text(raw, "response")
    if response is not None and given is not None:
        raise Fault("a last assistant turn and a `response`; keep one of them")
    if columns.answers_field is not None and columns.answers_field not in raw:
        _there(raw, columns.answers_field, "answers_field")
    written = raw.get(columns.prompt_field or "prompt") == prompt  # rather than laid out from other fields
    row = Row(
        prompt,
        answers(raw, columns.answers_field),
        response if given is None else given,
        _text(raw, "reference"),
        *pair(raw, prompt if written or isinstance(prompt, list) else None),
        candidates(raw),
        raw,
        where,
    )
    for name in need:
        if getattr(row, name) in (None, ()):
            raise Fault(f"no `{name}`; write " + (f'"{name}": ["…"]' if name in LISTS else f'"{name}": "…"'))
    return row


def _prompt(raw: dict[str, Any], columns: Columns) -> tuple[str | Messages, str | None]:
    """The prompt, and the response where the messages end with one."""
    if columns.template is not None:
        names = columns.template_fields()
        for name in names:
            _there(raw, name, "the template")
        text = columns.template.format(**{name: _text(raw, name, empty=True) for name in names})
        if not text.strip():
            raise Fault("the prompt is empty; write some text in " + " or ".join(f"`{name}`" for name in names))
        return text, None
    if columns.prompt_field is not None:
        name = columns.prompt_field
        _there(raw, name, "prompt_field")
        if isinstance(raw[name], list):
            return _messages(raw[name], name)
        text = _text(raw, name) or ""
        if not text.strip():
            raise Fault(f"`{name}` is empty; write some text")
        return text, None
    for name in ("prompt", "messages"):
        if isinstance(raw.get(name), list):
            return _messages(raw[name], name)
        if raw.get(name) is not None and name == "messages":
            raise Fault(f'`messages` is {kind(raw[name])}; write [{{"role": "user", "content": "…"}}]')
        if raw.get(name) is not None:
            return _text(raw, name) or "", None
    for name, layout in (("question", QUESTION), ("instruction", INSTRUCTION)):
        if raw.get(name) is not None:
            filled = {"context": _text(raw, "context", empty=True) or "", name: _text(raw, name)}
            return layout.format(**filled).strip(), None
    if raw.get("context") is not None:
        raise Fault("a `context` without a `question` or an `instruction`; add one, or give a template")
    raise Fault('no `prompt` or `messages`; write {"prompt": "…"}')


def _messages(turns: list[Any], name: str) -> tuple[Messages, str | None]:
    if not turns:
        raise Fault(f'`{name}` is empty; write [{{"role": "user", "content": "…"}}]')
    found: Messages = []
    for number, turn in enumerate(turns, 1):
        place = f"`{name}` {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise Fault(f'{place} has no role; write {{"role": "user", "content": "…"}}')
        role, content = turn["role"], turn.get("content")
        if role not in ROLES:
            raise Fault(f"{place}: {unknown_name('role', short(role), ROLES)}")
        if not isinstance(content, str):
            raise Fault(f"{place}: `content` is {kind(content)}; write text")
        if not content.strip() and role == "user":
            raise Fault(f"{place}: `content` is empty; write some text")
        said = {key: value for key, value in turn.items() if value is not None}
        for key, value in said.items():
            if not isinstance(value, str):
                raise Fault(f"{place}: `{short(key)}` is {kind(value)}; only text is read, remove it")
        found.append({key: encodable(value, f"{place}: `{short(key)}`") for key, value in said.items()})
    if found[-1]["role"] != "assistant":
        return found, None
    if len(found) == 1:
        raise Fault(f"`{name}` holds an assistant turn only; begin with the user's")
    return found[:-1], found[-1]["content"]


def _there(raw: dict[str, Any], name: str, by: str) -> None:
    """Raise a `Fault` where the row lacks the field `name`, which `by` asks for."""
    if name not in raw:
        raise Fault(
            f"no `{name}`, which {by} names; {unknown_name('field', name, raw).fix if raw else 'the row is empty'}"
        )
    if raw[name] is None:
        raise Fault(f"`{name}`, which {by} names, is empty; write some text")


def _text(raw: dict[str, Any], name: str, *, empty: bool = False) -> str | None:
    """The text of a field, None where it is absent or null. `empty`: may be blank."""
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Fault(f'`{name}` is {kind(value)}; write text, e.g. "{name}": "…"')
    if not empty and name in ("prompt", "question", "instruction") and not value.strip():
        raise Fault(f"`{name}` is empty; write some text")
    return encodable(value, f"`{name}`")


@cache
def _template_fields(template: str) -> tuple[str, ...]:
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
    return tuple(names)
