"""One prompt as the one text that the model reads, and which of its characters have which role.

Roles come from where a prompt's own parts were put: through a layout they are known, through a chat template they are
found by running it (`chat.places`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from adhere.errors import UserError
from adhere.model.chat import Frame, Turns, frame, is_rendered, places, render, special_texts
from adhere.model.settings import ChatOptions
from adhere.prompt import AnnotatedText, Document, Part, Prompt, RenderedText, Role

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Stretch:
    """Characters `start … end - 1` of a text that have a role; see `Part`."""

    start: int
    end: int
    role: Role
    document: int = -1
    offset: int = -1


@dataclass(frozen=True)
class Composed:
    """What the model reads. Characters in no stretch are the template's."""

    text: str
    stretches: tuple[Stretch, ...]
    documents: tuple[Document, ...] = ()
    chat: bool = False
    """Whether it is a chat, which the response to it ends as the template ends a turn."""
    whole: bool = False
    """Whether a template made it here and now: the tokenizer's own start tokens are not put before it."""


def takes_chat(tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> bool:
    """Whether plain prompts become user turns. Raises `UserError` where the options need a template that is missing."""
    if tokenizer.chat_template is None and (options.chat == "on" or options.system is not None):
        needs = "chat is on" if options.chat == "on" else "a system text needs one"
        raise UserError(f"the tokenizer has no chat template, and {needs}", fix="leave it out, or use a chat model")
    return tokenizer.chat_template is not None and options.chat != "off"


def compose(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: ChatOptions, names: Sequence[str]
) -> list[Composed]:
    """Each prompt as the model reads it; `names` says where each comes from.

    Raises `UserError`: an empty prompt, messages without a chat template, or turns that the template refuses.
    """
    chat, around, special = takes_chat(tokenizer, options), frame(tokenizer), tuple(special_texts(tokenizer))
    found = []
    for prompt, where in zip(prompts, names, strict=True):
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError("the prompt is empty", where=where, fix="write some text")
        turns = _turns(prompt, options, chat, special)
        if turns is not None:
            found.append(_conversation(tokenizer, turns, where))
            continue
        assert isinstance(prompt, str)
        found.append(_plain(prompt, around, tokenizer.chat_template is not None and _is_rendered(prompt, special)))
    return found


def turns_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, options: ChatOptions) -> list[dict[str, str]] | None:
    """The chat that a prompt is put to the model as; None where it is plain text."""
    return _turns(prompt, options, takes_chat(tokenizer, options), tuple(special_texts(tokenizer)))


def _turns(prompt: Prompt, options: ChatOptions, chat: bool, special: tuple[str, ...]) -> list[dict[str, str]] | None:
    """See `turns_of`. `chat`: whether plain prompts become user turns; `special`: what a rendered text begins with."""
    if not isinstance(prompt, str):
        turns = [dict(turn) for turn in prompt]
    elif not chat or isinstance(prompt, RenderedText) or _is_rendered(prompt, special):
        return None
    elif isinstance(prompt, AnnotatedText) and prompt.parts[0].role == Role.SYSTEM:
        system, *rest = prompt.parts
        if rest and rest[0].role == Role.TEMPLATE and not rest[0].text.strip():
            rest = rest[1:]  # the gap between the two, which a turn of its own does not need
        user = AnnotatedText(rest, prompt.documents)
        turns = [{"role": "system", "content": system.text}, {"role": "user", "content": user}]
    else:
        turns = [{"role": "user", "content": prompt}]
    if options.system is not None and not any(turn["role"] in _SYSTEM for turn in turns):
        turns = [{"role": "system", "content": options.system}, *turns]
    return turns


def _is_rendered(prompt: str, special: tuple[str, ...]) -> bool:
    """Whether a plain prompt was rendered before; what a field begins with says nothing."""
    layout = not isinstance(prompt, AnnotatedText) or prompt.parts[0].role in (Role.TEMPLATE, Role.USER)
    return layout and is_rendered(prompt, special)


def _plain(prompt: str, around: Frame, chat: bool) -> Composed:
    """A text that is read as it stands. Of a `chat` of one user turn, what the template wrote is not the user's."""
    stretches, documents = _annotated(prompt, Role.USER)
    if chat:
        start = len(around.before) if prompt.startswith(around.before) else 0
        end = len(prompt) - len(around.after) if prompt.endswith(around.after) else len(prompt)
        stretches = list(_moved(stretches, 0, start, end))
    return Composed(str(prompt), tuple(stretches), documents, chat)


def _conversation(tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str) -> Composed:
    if tokenizer.chat_template is None:
        raise UserError("messages, but the tokenizer has no chat template", where=where, fix="write a plain `prompt`")
    text = render(tokenizer, turns, where=where)
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    stretches: list[Stretch] = []
    documents: tuple[Document, ...] = ()
    for place, turn in enumerate(turns):
        if not turn["content"].strip():
            continue
        parts, known = _annotated(turn["content"], _role(turn["role"], place, last), len(documents))
        for start, end, first in places(tokenizer, turns, text, place, where):
            stretches += _moved(parts, start - first, start, end)
        documents += known
    return Composed(text, tuple(sorted(stretches, key=lambda stretch: stretch.start)), documents, chat=True, whole=True)


def _role(speaker: str, place: int, last: int) -> Role:
    """Of a turn whose text says nothing itself. What a tool gives after the last user turn is evidence."""
    if speaker in _SYSTEM:
        return Role.SYSTEM
    if place == last:
        return Role.USER
    return Role.DOCUMENT if place > last and speaker == "tool" else Role.EARLIER


def _annotated(text: str, role: Role, before: int = 0) -> tuple[list[Stretch], tuple[Document, ...]]:
    """The stretches of a text, and its documents, the first of which has the place `before`. A text without parts has
    one role, `role`."""
    parts: Sequence[Part] = [Part(text, role)]
    documents: tuple[Document, ...] = ()
    if isinstance(text, AnnotatedText):
        parts, documents = text.parts, text.documents
    elif role == Role.DOCUMENT:
        parts, documents = [Part(text, role, 0, 0)], (Document(str(text)),)
    found, start = [], 0
    for part in parts:
        document = part.document + before if part.document >= 0 else -1
        found.append(Stretch(start, start + len(part.text), part.role, document, part.offset))
        start += len(part.text)
    return found, documents


def _moved(stretches: Sequence[Stretch], by: int, start: int, end: int) -> Iterator[Stretch]:
    """The stretches `by` characters further on, cut to `start … end - 1`."""
    for stretch in stretches:
        first, last = max(start, stretch.start + by), min(end, stretch.end + by)
        if first < last and stretch.role != Role.TEMPLATE:
            offset = stretch.offset + first - stretch.start - by if stretch.offset >= 0 else -1
            yield replace(stretch, start=first, end=last, offset=offset)
