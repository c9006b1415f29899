"""What of a row is its prompt, and what each part of it is for.

    {"prompt": "…"}                                           text that is read as it stands
    {"messages": [{"role": "user", "content": "…"}]}          a chat; a last assistant turn is the response
    {"context": "…", "question": "…"}                         laid out as QUESTION, the roles known
    {"documents": ["…", {"title": "…", "text": "…"}], …}      the same with several pieces of evidence
    {"instruction": "…", "context": "…"}                      instruction first
    {…, "system": "…"}                                        with a system text before it

A `prompt` and the last user turn of `messages` may hold {context}, {documents}, {question} or {instruction}: the field
of that name is put there, and its role is known. What earlier turns say is no evidence for the last question unless the
row has `"history_is_context": true`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from adhere.errors import UserError, unknown_name
from adhere.prompt import AnnotatedText, Document, Part, Role, joined
from adhere.row_files import Fault, encodable, kind, short
from adhere.row_responses import ROLES, message_text

QUESTION = ("Question: ", "\nAnswer:")
"""What stands around a question that is a field of its own."""
GAP = "\n\n"
"""Between the pieces of a prompt."""
FIELDS = {
    "context": Role.DOCUMENT,
    "documents": Role.DOCUMENT,
    "question": Role.QUESTION,
    "instruction": Role.INSTRUCTION,
    "system": Role.SYSTEM,
}
"""Fields whose role their name tells."""
_PLACE = re.compile(r"\{(context|documents|question|instruction)\}")

Messages = list[dict[str, str]]


def prompt_of(
    raw: Mapping[str, Any], field: str | None = None, template: str | None = None
) -> tuple[str | Messages, str | None]:
    """The prompt of a row, and the response where its messages end with one. `field` or `template` say what the prompt
    is where the usual names do not (see `adhere.data.Columns`). Raises `Fault`."""
    if template is not None:
        names = template_fields(template)
        for name in names:
            check_field(raw, name, "the template")
        text = _filled(raw, [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)])
        if not text.strip():
            raise Fault("the prompt is empty; write some text in " + " or ".join(f"`{name}`" for name in names))
        return text, None
    if field is not None:
        check_field(raw, field, "prompt_field")
    for name in ("prompt", "messages") if field is None else (field,):
        value = raw.get(name)
        if isinstance(value, list):
            turns, response = _messages(value, name)
            return _completed(turns, raw), response
        if value is not None and name == "messages" and field is None:
            raise Fault(f'`messages` is {kind(value)}; write [{{"role": "user", "content": "…"}}]')
        if value is not None:
            prompt = text_of(raw, name) or ""
            if not prompt.strip():
                raise Fault(f"`{name}` is empty; write some text")
            prompt, system = _placed(prompt, raw), _piece(raw, "system")
            return joined([system, prompt], GAP) if system.strip() else prompt, None
    return _laid_out(raw), None


def text_of(raw: Mapping[str, Any], name: str, *, empty: bool = False, chat: bool = False) -> str | None:
    """The text of a field, None where it is absent or null. `empty`: may be blank; `chat`: may be a conversation."""
    value = raw.get(name)
    if value is None:
        return None
    if chat and isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise Fault(f'`{name}` is {kind(value)}; write text, e.g. "{name}": "…"')
    if not empty and name in ("prompt", "question", "instruction") and not value.strip():
        raise Fault(f"`{name}` is empty; write some text")
    return encodable(value, f"`{name}`")


def check_field(raw: Mapping[str, Any], name: str, by: str) -> None:
    """Raise a `Fault` where the row lacks the field `name`, which `by` asks for."""
    if name not in raw:
        raise Fault(
            f"no `{name}`, which {by} names; {unknown_name('field', name, raw).fix if raw else 'the row is empty'}"
        )
    if raw[name] is None:
        raise Fault(f"`{name}`, which {by} names, is empty; write some text")


@cache
def template_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names, each once. Raises `UserError`: it is none."""
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


def _laid_out(raw: Mapping[str, Any]) -> AnnotatedText:
    """System text, instruction, evidence and question, those that there are."""
    evidence = [name for name in ("context", "documents") if raw.get(name) is not None]
    if raw.get("question") is None and raw.get("instruction") is None:
        if evidence:
            article = "a " if evidence[0] == "context" else ""
            raise Fault(
                f"{article}`{evidence[0]}` without a `question` or an `instruction`; add one, or give a template"
            )
        raise Fault('no `prompt` or `messages`; write {"prompt": "…"}')
    if len(evidence) > 1:
        raise Fault("`context` and `documents` both hold the evidence; keep one of them")
    pieces: list[str] = [_piece(raw, name) for name in ("system", "instruction", *evidence)]
    if raw.get("question") is not None:
        before, after = (AnnotatedText([Part(text, Role.TEMPLATE)]) for text in QUESTION)
        pieces.append(joined([before, _piece(raw, "question"), after]))
    return _trimmed(joined([piece for piece in pieces if piece.strip()], GAP))


def _piece(raw: Mapping[str, Any], name: str) -> AnnotatedText:
    """The text of a field with the role that its name tells, or else the user's; empty where the row has none."""
    if name == "documents" and raw.get(name) is not None:
        if not isinstance(raw[name], list):
            raise Fault(f'`documents` is {kind(raw[name])}; write a list of texts or of {{"title": "…", "text": "…"}}')
        return joined([_document(item, place) for place, item in enumerate(raw[name], 1)], GAP)
    text = text_of(raw, name, empty=name not in ("question", "instruction")) or ""
    role = FIELDS.get(name, Role.USER)
    if text and role == Role.DOCUMENT:
        return AnnotatedText([Part(text, role, 0, 0)], [Document(text)])
    return AnnotatedText([Part(text, role)] if text else [])


def _document(item: Any, number: int) -> AnnotatedText:
    """One of the `documents`, its title above it."""
    place = f"`documents` {number}"
    found = {"text": item} if isinstance(item, str) else item
    if not isinstance(found, Mapping):
        raise Fault(f'{place} is {kind(item)}; write text or {{"title": "…", "text": "…"}}')
    texts: list[str] = []
    for name, value in (("title", found.get("title") or ""), ("text", found.get("text"))):
        if not isinstance(value, str):
            raise Fault(f"{place}: `{name}` is {kind(value)}; write text")
        texts.append(encodable(value, f"{place}: `{name}`"))
    title, text = texts
    if not text.strip():
        raise Fault(f"{place}: `text` is empty; write some text, or leave that document out")
    parts = [Part(text, Role.DOCUMENT, 0, 0)]
    if title.strip():
        parts = [Part(title, Role.DOCUMENT, 0), Part("\n", Role.TEMPLATE), *parts]
    return AnnotatedText(parts, [Document(text, title)])


def _placed(text: str, raw: Mapping[str, Any]) -> str:
    """A text of the user's with the fields that it names in braces in their places; as it is where it names none."""
    parts = re.split(_PLACE, text)
    known = [(literal, name) for literal, name in zip(parts[::2], [*parts[1::2], None], strict=True)]
    if not any(name is not None and raw.get(name) is not None for _, name in known):
        return text
    return _filled(raw, known)


def _filled(raw: Mapping[str, Any], parts: Sequence[tuple[str, str | None]]) -> AnnotatedText:
    """A layout: texts, each with the field after it. The texts are the user's words where evidence alone comes from
    fields, else they are the layout's."""
    names = [name for _, name in parts if name is not None and raw.get(name) is not None]
    role = Role.USER if all(FIELDS.get(name) == Role.DOCUMENT for name in names) else Role.TEMPLATE
    pieces: list[str] = []
    for literal, name in parts:
        pieces.append(AnnotatedText([Part(literal, role)] if literal else []))
        if name in names:
            pieces.append(_piece(raw, name))
        elif name is not None:
            pieces.append(AnnotatedText([Part(f"{{{name}}}", role)]))
    return joined(pieces)


def _completed(turns: Messages, raw: Mapping[str, Any]) -> Messages:
    """A chat with what other fields of its row say: a system text, fields that the last user turn names in braces, and
    whether its history is evidence."""
    system, history = _piece(raw, "system"), raw.get("history_is_context", False)
    if not isinstance(history, bool):
        raise Fault(f"`history_is_context` is {kind(history)}; write true or false")
    if system.strip():
        if turns[0]["role"] in ("system", "developer"):
            raise Fault("a system turn and a `system`; keep one of them")
        turns = [{"role": "system", "content": str(system)}, *turns]
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns))
    found = []
    for place, turn in enumerate(turns):
        content = turn["content"]
        if place == last:
            content = _placed(content, raw)
        elif history and place < last and turn["role"] not in ("system", "developer"):
            content = AnnotatedText([Part(content, Role.DOCUMENT, 0, 0)], [Document(content)])
        found.append({**turn, "content": content})
    return found


def _messages(turns: list[Any], name: str) -> tuple[Messages, str | None]:
    if not turns:
        raise Fault(f'`{name}` is empty; write [{{"role": "user", "content": "…"}}]')
    found: Messages = []
    for number, turn in enumerate(turns, 1):
        place = f"`{name}` {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise Fault(f'{place} has no role; write {{"role": "user", "content": "…"}}')
        role = turn["role"]
        if role not in ROLES:
            raise Fault(f"{place}: {unknown_name('role', short(role), ROLES)}")
        content = message_text(turn.get("content"), place)
        if not content.strip() and role == "user":
            raise Fault(f"{place}: `content` is empty; write some text")
        said = {key: value for key, value in {**turn, "content": content}.items() if value is not None}
        for key, value in said.items():
            if not isinstance(value, str):
                raise Fault(f"{place}: `{short(key)}` is {kind(value)}; only text is read, remove it")
        found.append({key: encodable(value, f"{place}: `{short(key)}`") for key, value in said.items()})
    if found[-1]["role"] != "assistant":
        return found, None
    if len(found) == 1:
        raise Fault(f"`{name}` holds an assistant turn only; begin with the user's")
    return found[:-1], found[-1]["content"]


def _trimmed(text: AnnotatedText) -> AnnotatedText:
    """The text without blanks at its ends."""
    first, *rest = text.parts
    cut = len(first.text) - len(first.text.lstrip())
    first = replace(first, text=first.text[cut:], offset=first.offset + cut if first.offset >= 0 else -1)
    *before, last = first, *rest
    return AnnotatedText([*before, replace(last, text=last.text.rstrip())], text.documents)
