"""What each token adds to the text: the text cut at the tokens, so that the pieces, joined, read as the whole; and
which of them make up a word."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from adhere.text import is_unspaced

UNFINISHED = "\ufffd"
"""What decoding shows of a character whose bytes are not all there yet."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each of `ids` adds to those before it, special tokens written out.

    A character of several tokens (an emoji in a byte-level vocabulary) belongs to the last of them, the others add "".
    """

    def decode(start: int, stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    # Each piece is what decoding gains by it after the piece before: alone, a token would lose the blank before it.
    start, stop = 0, 0
    for last in range(1, len(ids) + 1):
        before, after = decode(start, stop), decode(start, last)
        whole = last == len(ids) or not after.endswith(UNFINISHED)
        pieces.append(after[len(before) :] if whole else "")
        if whole:
            start, stop = stop, last
    return tuple(pieces)


def words_of(texts: Sequence[str], special: Sequence[bool]) -> list[int]:
    """The number of tokens of each word, in order: letters that follow one another are of one word, and tokens that
    make up a character. Special tokens, signs and characters of scripts without blanks stand alone.

    >>> words_of(["<s>", "Fen", "wick", ".", " na", "", "ï", "ve"], [True, *[False] * 7])
    [1, 2, 1, 4]
    """
    sizes: list[int] = []
    waiting, before = 0, ""  # tokens of an unfinished character; the text of the word so far, "" where none can go on
    for place, (text, alone) in enumerate(zip(texts, special, strict=True)):
        waiting += 1
        if not text and not alone and place < len(texts) - 1:
            continue
        if sizes and before and text and not alone and _joins(before[-1], text[0]):
            sizes[-1] += waiting
        else:
            sizes.append(waiting)
        waiting, before = 0, "" if alone else text
    return sizes


def _joins(before: str, after: str) -> bool:
    return not (is_unspaced(before) or is_unspaced(after)) and _is_letter(before) and _is_letter(after)


def _is_letter(character: str) -> bool:
    return character.isalnum() or character in "'’_" or unicodedata.category(character)[0] == "M"
