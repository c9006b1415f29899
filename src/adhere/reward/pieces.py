"""The pieces of a vocabulary as text: byte-level BPE, SentencePiece, WordPiece and whole words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Piece(NamedTuple):
    """A token as it is written."""

    text: bytes
    """UTF-8, with its blank before it; a piece may hold half a character."""
    starts_word: bool


def read_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, Piece]:
    """Id → piece, for every id that has one."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    marker = next((m for m in ("Ġ", "▁", "##") if any(piece.startswith(m) for piece in vocabulary)), "")
    return {index: _read(piece, "" if index in added else marker) for piece, index in vocabulary.items()}


def _read(piece: str, marker: str) -> Piece:
    if marker == "Ġ":
        try:
            return Piece(bytes(_BYTE_OF[character] for character in piece), piece.startswith("Ġ"))
        except KeyError:
            return Piece(piece.encode(errors="replace"), piece.startswith("Ġ"))
    if marker == "▁":
        byte = _BYTE.fullmatch(piece)
        if byte:
            return Piece(bytes([int(byte[1], 16)]), False)
        return Piece(piece.replace("▁", " ").encode(errors="replace"), piece.startswith("▁"))
    if marker == "##":
        return Piece(piece.removeprefix("##").encode(errors="replace"), not piece.startswith("##"))
    return Piece(piece.removesuffix("</w>").encode(errors="replace"), True)


def _byte_alphabet() -> dict[str, int]:
    """The letters in which byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
