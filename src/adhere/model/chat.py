"""What a tokenizer's chat template does with a conversation: the text it makes, where each turn lands, what ends one.

Templates are programs: the answers come from running them on sentinels, never from searching a text for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adhere.errors import UserError

Turns = Sequence[Mapping[str, str]]

SENTINEL = "\ue0d1\ue0d2\ue0d3"
"""Private-use characters, which no prompt holds and no template trims."""
_OPEN_THOUGHT = re.compile(r"(<think(ing)?>)\s*\Z")
_PROBE = "a"


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around turns."""

    before: str = ""
    """Before the words of a single user turn: start token, default system text, header."""
    after: str = ""
    """After them, up to where the response begins."""
    lead: str = ""
    """The blank between that place and a response."""
    end: int | None = None
    """The special token after a response; None where the template writes none, or does not say which it is."""


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, where: str | None = None, ask: bool = True) -> str:
    """The conversation as the model reads it; `ask`: up to where a response begins.

    Templates that can leave out thinking are told to, and a thought that the template opens is closed at once: what is
    scored is the answer. Raises `UserError` where the template refuses the turns.
    """
    said = [{name: str(value) for name, value in turn.items()} for turn in turns]
    try:
        text = str(
            tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask, enable_thinking=False)
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split()) or type(error).__name__
        systems = [role for role in ("system", "developer") if role in roles.split(", ")]
        fix = f"put the {systems[0]} text into the first user turn" if systems else "let user and assistant alternate"
        raise UserError(f"the chat template refuses the turns {roles} ({reason})", where=where, fix=fix) from error
    if ask and (opened := _OPEN_THOUGHT.search(text)):
        return f"{text.rstrip()}\n\n</{opened[1][1:]}\n\n"
    return text


def places(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, text: str, turn: int, where: str | None = None
) -> Iterator[tuple[int, int, int]]:
    """Where the content of `turns[turn]` stands in their rendered `text`: start, end, and the character of the content
    that it begins with (templates trim blanks). More than one place where the template repeats it.

    The turns are rendered once more with a sentinel in its stead; what is the same in both is the template's. Raises
    `UserError` where that does not tell.
    """
    content = turns[turn]["content"]
    marked = render(tokenizer, [*turns[:turn], {**turns[turn], "content": SENTINEL}, *turns[turn + 1 :]], where=where)
    pieces = marked.split(SENTINEL)
    told = f"turn {turn + 1} ({turns[turn]['role']})"
    if len(pieces) == 1:
        fix = "leave that turn out, or put its text into the user's turn"
        raise UserError(f"the chat template leaves out {told}", where=where, fix=fix)
    size, rest = divmod(len(text) - len(marked) + len(SENTINEL) * (len(pieces) - 1), len(pieces) - 1)
    position, found = 0, []
    for place, piece in enumerate(pieces):
        position += size * bool(place)
        known = rest == 0 and size >= 0 and text.startswith(piece, position)
        first = _first(content, text[position - size : position]) if place and known else 0
        if not known or first is None:
            fix = "give the prompt as plain text with --chat off, rendered as you want it"
            raise UserError(f"the chat template rewrites the text of {told}", where=where, fix=fix)
        if place:
            found.append((position - size, position, first))
        position += len(piece)
    yield from found


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer's chat template writes around a user's turn and after a response; an empty `Frame` where there
    is no template, or none that takes a user's turn and a reply."""
    if tokenizer.chat_template is None:
        return Frame()
    reply = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": SENTINEL}]
    asked = [{"role": "user", "content": SENTINEL}]
    try:
        before, found, after = render(tokenizer, asked).partition(SENTINEL)
        unasked = render(tokenizer, asked, ask=False)
        head, answered, tail = render(tokenizer, reply, ask=False).partition(SENTINEL)
    except UserError:
        return Frame()
    prompt = before + _PROBE + after
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    if unasked == before + found + after:  # a template that always asks for a response does so after one, too
        tail = tail.removesuffix(after)
    return Frame(before, after, lead if lead.isspace() else "", _first_special(tokenizer, tail) if answered else None)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response, as a tokenizer tells: its own, and what its template writes after a turn."""
    turn, own = frame(tokenizer).end, tokenizer.eos_token_id
    return {*(own if isinstance(own, list) else [int(own)]), *([] if turn is None else [turn])}


def is_rendered(text: str, special: tuple[str, ...]) -> bool:
    """Whether a text was rendered before: it begins with one of the `special` tokens (see `special_texts`)."""
    return text.lstrip().startswith(special)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens as they are written."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if text}


def _first(content: str, shown: str) -> int | None:
    """The character of `content` that `shown` begins with: all of it, trimmed, or its end or beginning."""
    if shown == content.strip():
        return len(content) - len(content.lstrip())
    if content.endswith(shown):
        return len(content) - len(shown)
    return 0 if content.startswith(shown) else None


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that `text` begins with, blanks aside, if it is a special one."""
    ids = tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return int(ids[0]) if ids and ids[0] in special else None
