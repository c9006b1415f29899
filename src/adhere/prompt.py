"""A prompt before any tokenizer: text or chat turns, and texts that know what each of their parts is for.

`AnnotatedText` is a string, so whatever takes a text takes it; what reads roles finds them on it. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from enum import IntEnum


class Role(IntEnum):
    """What a piece of a prompt is for. From DOCUMENT on, it belongs to the turn that is to be answered."""

    PADDING = 0
    """No token."""
    TEMPLATE = 1
    """Written by the tokenizer, the chat template or the layout that joins fields."""
    SYSTEM = 2
    """Text of a system turn. The default system text of a chat template is TEMPLATE."""
    EARLIER = 3
    """Turns before the one that is to be answered: examples, or the history of a conversation."""
    DOCUMENT = 4
    """Evidence: a context, a retrieved document, the result of a tool."""
    QUESTION = 5
    """What is asked."""
    INSTRUCTION = 6
    """What is to be done."""
    USER = 7
    """The user's own words where nothing says whether they are evidence or question."""


@dataclass(frozen=True)
class Document:
    """A piece of evidence."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Part:
    """A stretch of a text that has one role."""

    text: str
    role: Role
    document: int = -1
    """Place among the documents of the text; -1 = in none."""
    offset: int = -1
    """Character of the document's text that the part begins with; -1 = not in it (a title)."""


class AnnotatedText(str):
    """A text, and the parts it is made of.

    It is equal to the same text without parts. `prompt_key` tells the two apart.

    >>> parts = [Part("Ann sat.", Role.DOCUMENT, 0, 0), Part(" Who sat?", Role.QUESTION)]
    >>> text = AnnotatedText(parts, [Document("Ann sat.")])
    >>> text, text.parts[1].role.name
    ('Ann sat. Who sat?', 'QUESTION')
    """

    parts: tuple[Part, ...]
    documents: tuple[Document, ...]

    def __new__(cls, parts: Sequence[Part], documents: Sequence[Document] = ()) -> AnnotatedText:
        made = super().__new__(cls, "".join(part.text for part in parts))
        made.parts, made.documents = tuple(parts), tuple(documents)
        return made

    def __reduce__(self) -> tuple[type[AnnotatedText], tuple[tuple[Part, ...], tuple[Document, ...]]]:
        return AnnotatedText, (self.parts, self.documents)


def documents_of(prompt: str | Sequence[Mapping[str, str]]) -> tuple[Document, ...]:
    """The documents of a prompt: a text, or messages, whose last turn holds them. () = it has none, or nothing says so.

    >>> documents_of(AnnotatedText([Part("Ann sat.", Role.DOCUMENT, 0, 0)], [Document("Ann sat.")]))[0].text
    'Ann sat.'
    >>> documents_of("Ann sat. Who sat?")
    ()
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text.documents if isinstance(text, AnnotatedText) else ()


def joined(texts: Iterable[str], gap: str = "") -> AnnotatedText:
    """The texts that are not empty, one after the other, with `gap` (TEMPLATE) between them. Plain text is USER."""
    parts: list[Part] = []
    documents: list[Document] = []
    for text in filter(None, texts):
        if gap and parts:
            parts.append(Part(gap, Role.TEMPLATE))
        if isinstance(text, AnnotatedText):
            shift = len(documents)
            parts += [replace(one, document=one.document + shift) if one.document >= 0 else one for one in text.parts]
            documents += text.documents
        else:
            parts.append(Part(text, Role.USER))
    return AnnotatedText(parts, documents)


class RenderedText(str):
    """A text that is exactly what the model reads: no chat template is put around it."""


def rendered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of a trainer that puts texts to its model as they stand."""
    return [RenderedText(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


Prompt = str | Sequence[Mapping[str, str]]
"""A text, or chat turns with `role` and `content` that end with the user's (or a tool's)."""


def prompt_key(prompt: Prompt) -> str:
    """Text that two prompts share only if they read the same and their parts have the same roles: prompts with equal
    keys form a group."""
    if isinstance(prompt, str):
        return json.dumps(_keyed(prompt))
    return json.dumps([{name: _keyed(value) for name, value in turn.items()} for turn in prompt], default=str)


def _keyed(text: str) -> object:
    if isinstance(text, AnnotatedText):
        return [astuple(part) for part in text.parts]
    return {"rendered": text} if isinstance(text, RenderedText) else text
