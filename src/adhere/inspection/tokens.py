"""What each token adds to the text: the text cut at the tokens, so that the pieces, joined, read as the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
