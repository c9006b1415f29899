"""Tokens as words: equal numbers for the same word, however it is cased, spaced or split into tokens.

`garden` at the start of a chat turn and ` garden` inside a prompt are two ids of one word, and `Immunology` may be one
token here and three there. Signals that speak of words compare these numbers, never ids.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adhere.reward.pieces import read_pieces
from adhere.reward.salience import TokenClass, token_classes
from adhere.reward.signals import NO_WORD
from adhere.text import fold, is_unspaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, Spelling] = WeakKeyDictionary()


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary spells words."""

    pieces: tuple[bytes, ...]
    """Text of each id, UTF-8; half a character is half its bytes."""
    starts: tuple[bool, ...]
    """Whether the piece says of itself that it starts a word."""
    keys: Tensor
    """[V] int64: equal for pieces that differ in case or in the blank before them; never `NO_WORD`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Spelling:
        """Of a tokenizer; made once."""
        classes = token_classes(tokenizer)
        cached = _CACHE.get(tokenizer)
        if cached is not None and len(cached.keys) == len(classes):  # a tokenizer that grew since is read again
            return cached
        pieces, starts = [b""] * len(classes), [False] * len(classes)
        # An id without a text of its own is equal to itself alone.
        keys = torch.arange(-1, -len(classes) - 1, -1)
        for index, piece in read_pieces(tokenizer).items():
            pieces[index], starts[index] = piece
            if classes[index] != TokenClass.SPECIAL:
                keys[index] = _number(fold(piece.text.decode(errors="replace").strip()))
        _CACHE[tokenizer] = found = cls(tuple(pieces), tuple(starts), keys)
        return found

    def key(self, ids: Tensor) -> Tensor:
        """The key of each of `ids` [...] → [...] int64; ids past the vocabulary are equal to nothing."""
        known = self.keys.to(ids.device)[ids.clamp(max=len(self.keys) - 1)]
        return torch.where(ids < len(self.keys), known, NO_WORD)

    def words(self, ids: Tensor, counted: Tensor) -> Tensor:
        """The word that each token is part of: [n, T] int64, `NO_WORD` where not `counted` ([n, T] bool).

        A word ends where the next piece says that it starts one, at a blank, where letters meet other signs, and after
        every piece of a script that puts no blanks between words.
        """
        rows = zip(ids.tolist(), counted.tolist(), strict=True)
        return torch.tensor([self._row(row, keep) for row, keep in rows], device=ids.device).view(ids.shape)

    def _row(self, ids: list[int], counted: list[bool]) -> list[int]:
        found = [NO_WORD] * len(ids)
        first = 0
        for last in range(1, len(ids) + 1):
            if last < len(ids) and counted[first] and counted[last] and self._joined(ids[last - 1], ids[last]):
                continue
            if counted[first]:
                text = b"".join(self.pieces[index] for index in ids[first:last] if index < len(self.pieces))
                found[first:last] = [_word(text)] * (last - first)
            first = last
        return found

    def _joined(self, one: int, other: int) -> bool:
        """Whether the piece `other` goes on with the word of the piece `one` before it."""
        if max(one, other) >= len(self.pieces) or self.starts[other]:
            return False
        return _joins(self.pieces[one], self.pieces[other])


@lru_cache(maxsize=1 << 16)
def _joins(one: bytes, other: bytes) -> bool:
    before, after = one.decode(errors="replace")[-1:], other.decode(errors="replace")[:1]
    if not before or not after or is_unspaced(before) or is_unspaced(after):
        return False
    return _is_letter(before) and _is_letter(after)


def _is_letter(character: str) -> bool:
    """A letter, digit, accent, apostrophe or part of a character."""
    return character.isalnum() or character in "'’_\ufffd" or unicodedata.category(character)[0] == "M"


@lru_cache(maxsize=1 << 16)
def _word(text: bytes) -> int:
    """The number of a word; of a text that is nothing but signs, the number of these."""
    whole = fold(text.decode(errors="replace").strip())
    bare = whole.strip("".join({c for c in whole if not _is_letter(c) or c == "'"}))
    return _number(bare or whole)


def _number(text: str) -> int:
    """63 bits of a text, never `NO_WORD`."""
    return int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little") >> 1 | 1
