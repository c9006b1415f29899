"""Rows in and out: what a row of a file means, with `file:line` in every complaint (`records` reads the files).

What its prompt is, `row_prompt` says; `Columns` reads rows that call things otherwise. All bad rows are reported
together. Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import atomic_write, to_json
from adhere.prompt import documents_of
from adhere.row_files import Fault, FilePosition, kind, records, short, told
from adhere.row_lists import unpacked
from adhere.row_prompt import Messages, check_field, prompt_of, template_fields, text_of
from adhere.row_responses import answers, candidates, pair, paraphrases

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
    """One prompt and what is known of it.

    >>> row = Row("where is mary ?", answers=("garden",))
    >>> row.prompt, row.response
    ('where is mary ?', None)
    """

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
    """The row as it was read; lists that a CSV holds as text are lists."""
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
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} rows leaves none", fix="give 1 or more")
    any_good = False
    for row in _rows(records(str(source), limit, begin), columns, need):
        any_good = True
        yield row
    if not any_good:
        raise UserError("holds no rows", where=told(str(source)), fix='write one object a line, e.g. {"prompt": "…"}')


def rows_of(
    items: Iterable[str | Mapping[str, Any] | Row], columns: Columns = PLAIN, *, need: Sequence[str] = ()
) -> list[Row]:
    """The rows that a program holds: texts (prompts), mappings with the fields that a row of a file has, or rows.

    A `datasets.Dataset` is such mappings. `columns` and `need` are those of `read_rows`; the errors name the rows by
    their numbers, from 1.

    >>> rows_of(["where is mary ?", {"question": "where ?", "answer": "garden"}])[1].answers
    ('garden',)
    """
    if isinstance(items, Mapping):
        fix = "give a list of them; of a DatasetDict, one split: dataset['train']"
        raise UserError("rows are given as one mapping", where="prompts", fix=fix)
    found = list(_rows(((f"row {number}", item) for number, item in enumerate(items, 1)), columns, need))
    if not found:
        raise UserError("no rows are given", where="prompts", fix="give at least one prompt")
    return found


def _rows(given: Iterable[tuple[str, Any]], columns: Columns, need: Sequence[str]) -> Iterator[Row]:
    """What is given (records, rows, or what is wrong with them) as rows; all faults are told after the last."""
    unknown = [name for name in need if name not in Row.__dataclass_fields__]
    assert not unknown, f"`need` names fields that a Row has not: {unknown}"
    faults: list[str] = []
    bad = 0
    for where, raw in given:
        try:
            if isinstance(raw, Fault):
                raise raw
            if isinstance(raw, Row):
                row = raw
            elif isinstance(raw, str):  # a prompt, whatever the fields of a row are called
                row = _row({"prompt": raw}, where, PLAIN)
            elif isinstance(raw, Mapping):
                row = _row(dict(raw), where, columns)
            else:
                raise Fault(f"is {kind(raw)}; give text, a mapping or a Row")
            for name in need:
                if getattr(row, name) in (None, ()):
                    raise Fault(f"no `{name}`; write " + (f'"{name}": ["…"]' if name in LISTS else f'"{name}": "…"'))
        except Fault as fault:
            bad += 1
            if bad <= SHOWN:
                faults.append(f"{where}: {fault}")
            continue
        yield row
    if bad > SHOWN:
        faults.append(f"… and {bad - SHOWN} more")
    if bad:
        raise UserError("\n".join(faults))


def require_documents(rows: Iterable[Row]) -> None:
    """Raise `UserError` for a row that does not say what its evidence is."""
    for row in rows:
        if not documents_of(row.prompt):
            raise UserError("has no context to check against", where=row.where, fix="add `context` or `documents`")


def require_measurable(rows: Iterable[Row]) -> None:
    """Raise `UserError` for rows whose `prior`, `follow_up` or `paraphrases`, which `evaluate` reads, are not the texts
    they should be: left aside, they would lower the count of a figure, and nobody would know."""
    require_all(rows, _unmeasurable)


def require_all(rows: Iterable[Row], fault_of: Callable[[Row], object]) -> None:
    """Raise `UserError` with every row (the first twenty) that `fault_of` finds a fault with."""
    faults = [f"{row.where or f'row {n}'}: {fault}" for n, row in enumerate(rows, 1) if (fault := fault_of(row))]
    if len(faults) > SHOWN:
        faults[SHOWN:] = [f"… and {len(faults) - SHOWN} more"]
    if faults:
        raise UserError("\n".join(faults))


def _unmeasurable(row: Row) -> Fault | None:
    """What is wrong with the fields that `evaluate` alone reads."""
    try:
        for name in ("prior", "follow_up"):
            text_of(row.fields, name)
        paraphrases(row.fields)
    except Fault as fault:
        return fault
    return None


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


def _row(fields: dict[str, Any], where: str, columns: Columns) -> Row:
    texts = {*LISTS, "answer", "documents", "paraphrases", columns.answers_field or "answers"}
    raw = unpacked(fields, texts, {"prompt", "messages", "chosen", "rejected", columns.prompt_field or "prompt"})
    alone = columns.answers_field is None and raw.get("answers") is None
    if alone and isinstance(raw.get("answer"), list) and isinstance(fields["answer"], str):
        # The one answer may well be a list that is to be written out; which of the two is meant cannot be told.
        raise Fault("`answer` is text that holds a list; call it `answers`, which may hold more than one")
    prompt, response = prompt_of(raw, columns.prompt_field, columns.template)
    given = text_of(raw, "response")
    if response is not None and given is not None:
        raise Fault("a last assistant turn and a `response`; keep one of them")
    if columns.answers_field is not None and columns.answers_field not in raw:
        check_field(raw, columns.answers_field, "answers_field")
    written = raw.get(columns.prompt_field or "prompt") == prompt  # rather than laid out from other fields
    return Row(
        prompt,
        answers(raw, columns.answers_field),
        response if given is None else given,
        text_of(raw, "reference"),
        *pair(raw, prompt if written or isinstance(prompt, list) else None),
        candidates(raw),
        raw,
        where,
    )
