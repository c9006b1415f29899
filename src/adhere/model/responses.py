"""Given responses as the tokens that the model would have written, and as a rollout."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adhere.model.chat import frame
from adhere.model.encode import padded
from adhere.model.endings import Endings
from adhere.types import Prompts, Rollout

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "FULLWIDTH", "IDEOGRAPHIC")
_CLOSING = frozenset(".,;:!?%…")
_OPENING = frozenset("/\\-_=@#$<>~^|")


def given_rollout(
    endings: Endings,
    prompts: Prompts,
    responses: Sequence[str | Sequence[int]],
    prompt_index: Tensor,
    ended: Sequence[bool],
    *,
    alone: bool,
    opening: Sequence[int] = (),
) -> Rollout:
    """A rollout of given responses: see `Policy.respond`. `alone`: a decoder of its own reads the response, without the
    prompt; `opening`: what the model forces every response to begin with."""
    chats = prompts.chat or (False,) * len(prompts)
    asked = [(prompts.texts[place], chats[place]) for place in prompt_index.tolist()]
    given = [n for n, response in enumerate(responses) if isinstance(response, str)]
    encoded = encode_responses(
        endings,
        [asked[n] for n in given],
        [str(responses[n]) for n in given],
        [ended[n] for n in given],
        alone=alone,
    )
    written = dict(zip(given, encoded, strict=True))
    rows: list[list[int]] = []
    texts: list[str] = []
    closed: list[bool] = []
    for n, response in enumerate(responses):
        if isinstance(response, str):
            row, text, done = [*opening, *written[n]], response, ended[n]
        else:
            row = [int(token) for token in response]
            said = str(endings.tokenizer.decode(row, skip_special_tokens=True))
            text = endings.cut(said)
            done = text != said
        rows.append(row)
        texts.append(text)
        closed.append(done or (bool(row) and row[-1] in endings.tokens))
    device = prompts.ids.device
    ids = padded([np.asarray(row, dtype=np.int64) for row in rows], int(endings.tokenizer.pad_token_id), left=False)
    mask = padded([np.ones(len(row), dtype=bool) for row in rows], False, left=False)
    return Rollout(
        prompts,
        prompt_index.to(device),
        ids.to(device),
        mask.to(device),
        torch.tensor(closed, device=device),
        tuple(texts),
    )


def encode_responses(
    endings: Endings, asked: Sequence[tuple[str, bool]], responses: Sequence[str], ended: Sequence[bool], *, alone: bool
) -> list[list[int]]:
    """Ids of given responses, closed where they `ended` by themselves. `asked[b]`: the text of the prompt before
    response b, and whether it is a chat; `alone`: a decoder of its own reads the response, without the prompt.

    A response is encoded as the model would write it after that prompt, whether its author wrote a blank first or not:

    - in a chat with the blank that the template puts before a reply, mostly none;
    - after plain text with a blank where two words would touch (`Answer:` + `garden`), else as it is (after a blank, an
      opening bracket, before a comma, in a script without blanks).
    """
    lead = frame(endings.tokenizer).lead
    texts: list[str] = []
    closings: list[list[int]] = []
    for (prompt, chat), response, whole in zip(asked, responses, ended, strict=True):
        stop, end = endings.closing(chat) if whole else ("", [])
        bare = response.lstrip(" ")
        blank = lead if chat else " " * needs_blank(prompt, bare)
        texts.append((blank if bare and not alone else "") + bare + stop)
        closings.append(end)
    found = _batched(endings.tokenizer, texts) if alone else _continued(endings.tokenizer, texts)
    return [
        ids if ids and ids[-1] in endings.tokens else [*ids, *end] for ids, end in zip(found, closings, strict=True)
    ]


def needs_blank(before: str, after: str) -> bool:
    """Whether a blank belongs between two texts that are to read as one: where a word follows a word or a mark.

    >>> needs_blank("Answer:", "garden"), needs_blank("Answer: ", "garden"), needs_blank("Answer", ", yes")
    (True, False, False)
    """
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return False
    end, start = before[-1], after[0]
    opening = unicodedata.category(end) in ("Ps", "Pi") or end in _OPENING
    opening |= end in "\"'`" and before[-2:-1].isspace()
    closing = unicodedata.category(start) in ("Pe", "Pf") or start in _CLOSING
    unspaced = any(unicodedata.name(character, "").startswith(_UNSPACED) for character in (end, start))
    return not (opening or closing or unspaced)


def _continued(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts in the middle of another, where a tokenizer may write a word otherwise than at the start of a text:
    each is read after a mark, or alone where the two have become one token."""
    marks = [":" if text.startswith(" ") else "\n" for text in texts]
    heads = dict(zip(":\n", _batched(tokenizer, [":", "\n"]), strict=True))
    found = []
    for mark, text, ids in zip(
        marks, texts, _batched(tokenizer, [mark + text for mark, text in zip(marks, texts, strict=True)]), strict=True
    ):
        head = heads[mark]
        apart = ids[: len(head)] == head and (len(ids) > len(head) or not text)
        found.append(ids[len(head) :] if apart else _batched(tokenizer, [text])[0])
    return found


def _batched(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
