"""What a row says of responses and rewordings: accepted answers, candidates, a preferred response and the other, and
the same prompt in other words.

Each is text, or a form that others write: SQuAD's answers, candidates with their rewards, conversations whose last turn
is the response. What is anything else is a `Fault` that says what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adhere.errors import unknown_name
from adhere.row_files import Fault, encodable, kind, short

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a message's parts that are text."""

Turn = tuple[str, str]
"""Role and text of a message."""


def answers(raw: Mapping[str, Any], name: str | None = None) -> tuple[str, ...]:
    """The accepted answers, in the field `name` where they have one of their own; none where the field is null."""
    name = name or ("answers" if raw.get("answers") is not None else "answer")
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


def candidates(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The responses to choose from; what `adhere rank --keep all` wrote can be ranked again."""
    given = raw.get("candidates")
    if given is None:
        return ()
    if not isinstance(given, list) or not given:
        what = "an empty list" if given == [] else kind(given)
        raise Fault(f'`candidates` is {what}; write the responses to choose from, e.g. "candidates": ["…", "…"]')
    texts = [item.get("response") if isinstance(item, dict) else item for item in given]
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise Fault(f'`candidates` holds {kind(text)}; write text, e.g. "candidates": ["…", "…"]')
        found.append(encodable(text, "`candidates`"))
    return tuple(found)


def paraphrases(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The same prompt in other words; none where the field is null."""
    given = raw.get("paraphrases")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise Fault(f'`paraphrases` is {kind(given)}; write a list, e.g. "paraphrases": ["…"]')
    for number, text in enumerate(given, 1):
        if not isinstance(text, str):
            raise Fault(f"`paraphrases` {number} is {kind(text)}; write text")
        if not text.strip():
            raise Fault(f"`paraphrases` {number} is empty; write some text, or leave it out")
    return tuple(encodable(text, "`paraphrases`") for text in given)


def pair(raw: Mapping[str, Any], prompt: object) -> tuple[str | None, str | None]:
    """`chosen` and `rejected`: texts, or conversations that end with the assistant's turn.

    Earlier turns of a conversation must be the last ones of `prompt`, or else the response answers something else.
    """
    (chosen, one), (rejected, other) = (_reply(raw, name) for name in ("chosen", "rejected"))
    if one and other and one != other:
        raise Fault("`chosen` and `rejected` answer different conversations; write the same turns before the last")
    for name, turns in (("chosen", one), ("rejected", other)):
        if turns and not _ends_with(prompt, turns):
            raise Fault(f"`{name}` answers another conversation than the prompt's; write the last turn alone")
    return chosen, rejected


def message_text(content: object, place: str) -> str:
    """The text of a message's `content`: text, or parts that are text, put together."""
    if isinstance(content, str):
        return encodable(content, f"{place}: `content`")
    if not isinstance(content, list):
        raise Fault(f"{place}: `content` is {kind(content)}; write text")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise Fault(f"{place}: `content` holds {kind(part)}; write text")
        if part.get("type", "text") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise Fault(f"{place}: `content` holds a part of type {short(str(part.get('type')))!r}; only text is read")
        texts.append(encodable(part["text"], f"{place}: `content`"))
    return "".join(texts)


def _reply(raw: Mapping[str, Any], name: str) -> tuple[str | None, list[Turn]]:
    """The response in a field, and the turns before it; (None, []) where the field is null."""
    value = raw.get(name)
    if value is None:
        return None, []
    if isinstance(value, str):
        return encodable(value, f"`{name}`"), []
    fix = f'write text, e.g. "{name}": "…"'
    if not isinstance(value, list):
        raise Fault(f"`{name}` is {kind(value)}; {fix}")
    if not value:
        raise Fault(f"`{name}` is an empty list; {fix}")
    turns = [_turn(turn, f"`{name}` {number}") for number, turn in enumerate(value, 1)]
    role, text = turns[-1]
    if role != "assistant":
        raise Fault(f"`{name}` ends with a turn of {role}, not of the assistant; end it with the response, or {fix}")
    return text, turns[:-1]


def _turn(turn: object, place: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise Fault(f'{place} has no role; write {{"role": "assistant", "content": "…"}}')
    if turn["role"] not in ROLES:
        raise Fault(f"{place}: {unknown_name('role', short(turn['role']), ROLES)}")
    if turn.get("content") is None and turn.get("tool_calls"):
        raise Fault(f"{place} is a tool call without text; only text is read, write what is said")
    return turn["role"], message_text(turn.get("content"), place)


def _ends_with(prompt: object, turns: list[Turn]) -> bool:
    """Whether the last turns of the prompt are `turns`; a prompt of plain text is what the user says."""
    said = [turn for turn in turns if turn[0] != "system"]
    if isinstance(prompt, str):
        return [text.strip() for _, text in said] == [prompt.strip()]
    if not isinstance(prompt, list):
        return True
    asked = [(turn["role"], turn["content"].strip()) for turn in prompt if turn["role"] != "system"]
    return [(role, text.strip()) for role, text in said] == asked[len(asked) - len(said) :]
