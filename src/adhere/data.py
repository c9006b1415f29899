"""Rows in and out: what a row of a file means, with `file:line` in every complaint (`records` reads the files).

What its prompt is, `row_prompt` says; `Columns` reads rows that call things otherwise. All bad rows are reported
together. Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import atomic_write, to_json
from adhere.row_files import Fault, FilePosition, encodable, kind, records, short
from adhere.row_prompt import Messages, check_field, prompt_of, template_fields, text_of

SHOWN = 20
"""Bad rows that are told one by one; the rest are counted."""
LISTS = ("answers", "candidates")


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
        return () if self.template is None else template_fields(self.template)


PLAIN = Columns()
"""Rows with the usual names."""


@dataclass(frozen=True)
class Row:
    """One prompt and what is known of it."""

    prompt: str | Messages
    """Text, or chat messages that end with the user's (or a tool's) turn. Texts made of several fields know which is
    which (`AnnotatedText`)."""
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
    """The row as it was read."""
    where: str = ""
    """`file:line`, for messages."""


def read_rows(
    source: str | Path, columns: Columns = PLAIN, *, need: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Read the rows of a file, of a folder of them, or of a hub data set (see `adhere.row_files`).

    `columns`: names of the fields, where they are not the usual ones; what it names goes before those. `need`: fields
    of `Row` that every row must have, e.g. `("answers",)`. `limit`: read that many rows and stop.

    Where a row has more than one of them, `prompt` goes before `messages`, and that before `question`, `instruction`
    and their evidence. A last assistant turn of `messages` becomes `response`; `answer` stands for `answers` of one;
    of a `chosen` or `rejected` conversation the last turn is read.

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


def _row(raw: dict[str, Any], where: str, columns: Columns, need: Sequence[str]) -> Row:
    prompt, response = prompt_of(raw, columns.prompt_field, columns.template)
    given = text_of(raw, "response")
    if response is not None and given is not None:
        raise Fault("a last assistant turn and a `response`; keep one of them")
    row = Row(
        prompt,
        _answers(raw, columns),
        response if given is None else given,
        text_of(raw, "reference"),
        text_of(raw, "chosen", chat=True),
        text_of(raw, "rejected", chat=True),
        _candidates(raw),
        raw,
        where,
    )
    for name in need:
        if getattr(row, name) in (None, ()):
            raise Fault(f"no `{name}`; write " + (f'"{name}": ["…"]' if name in LISTS else f'"{name}": "…"'))
    return row


def _answers(raw: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    name = columns.answers_field or ("answers" if raw.get("answers") is not None else "answer")
    if columns.answers_field is not None and name not in raw:
        check_field(raw, name, "answers_field")
    value = raw.get(name)
    if value is None:
        return ()
    if isinstance(value, dict):  # the form of SQuAD: {"text": […], "answer_start": […]}
        value = value.get("text")
    found: list[Any] = value if isinstance(value, list) else [value]
    for item in found:
        if not isinstance(item, str):
            raise Fault(f'`{name}` holds {kind(item)}; write text, e.g. "answers": ["…"]')
        if not item.strip():
            raise Fault(f"`{name}` holds an empty text; write the answer or leave `{name}` out")
    return tuple(encodable(item, f"`{name}`") for item in found)


def _candidates(raw: dict[str, Any]) -> tuple[str, ...]:
    given = raw.get("candidates")
    if given is None:
        return ()
    if not isinstance(given, list) or not given:
        what = "an empty list" if given == [] else kind(given)
        raise Fault(f'`candidates` is {what}; write the responses to choose from, e.g. "candidates": ["…", "…"]')
    # What `adhere rank --keep all` wrote can be ranked again.
    texts = [item.get("response") if isinstance(item, dict) else item for item in given]
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise Fault(f'`candidates` holds {kind(text)}; write text, e.g. "candidates": ["…", "…"]')
        found.append(encodable(text, "`candidates`"))
    return tuple(found)
