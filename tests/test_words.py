"""Tokens as words: case, blanks and the way a word is split make no difference, on every kind of vocabulary."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adhere.reward.signals import NO_WORD
from adhere.reward.words import Spelling

MERGED = ["garden", " garden", "Garden", " the", "the", " The", "gar", "den", " gar", ".", ",", " ", "'s", "\n"]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [alphabet.pre_tokenize_str(text) for text in MERGED]
    known = ["<unk>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [parts[0][0] for parts in spelled if len(parts) == 1 and parts[0][0] not in known]
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(known)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    known = [
        "<unk>",
        "<pad>",
        "</s>",
        "▁garden",
        "garden",
        "▁Gar",
        "▁gar",
        "den",
        "▁",
        ".",
        "▁the",
        "花",
        "▁花园",
        "园",
    ]
    return wrapped(Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(known)}, unk_token="<unk>")))


def word_piece() -> PreTrainedTokenizerFast:
    known = ["<unk>", "<pad>", "</s>", "garden", "gar", "##den", "the", ".", "##garden"]
    return wrapped(Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(known)}, unk_token="<unk>")))


def ids(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> torch.Tensor:
    found = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert tokenizer.unk_token_id not in found
    return torch.tensor([found])


def words(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    row = ids(tokenizer, *pieces)
    return Spelling.of(tokenizer).words(row, torch.ones_like(row, dtype=torch.bool))[0].tolist()


@pytest.mark.parametrize(
    ("tokenizer", "whole", "others"),
    [
        (byte_level(), ["garden"], [["Ġgarden"], ["Garden"], ["gar", "den"], ["Ġgar", "den"], ["g", "a", "r", "den"]]),
        (sentence_piece(), ["garden"], [["▁garden"], ["▁Gar", "den"], ["▁", "garden"], ["▁gar", "den"]]),
        (word_piece(), ["garden"], [["gar", "##den"], ["##garden"]]),
    ],
    ids=["byte-level", "SentencePiece", "WordPiece"],
)
def test_a_word_is_the_same_however_it_is_spelled(tokenizer, whole, others):
    (word,) = words(tokenizer, *whole)
    for other in others:
        found = words(tokenizer, *other)
        assert found[-1] == word and set(found[-(len(other) - (other[0] == "▁")) :]) == {word}


def test_a_word_ends_where_the_next_begins():
    tokenizer = byte_level()
    garden, the, end = (words(tokenizer, piece)[0] for piece in ("garden", "the", "."))
    assert words(tokenizer, "the", "Ġgarden", ".", "Ġthe") == [the, garden, end, the]
    assert words(tokenizer, "garden", "Ċ", "the")[::2] == [garden, the]
    assert len({garden, the, end, NO_WORD}) == 4


def test_a_possessive_belongs_to_its_word():
    tokenizer = byte_level()
    assert len(set(words(tokenizer, "garden", "'", "s"))) == 1
    assert words(tokenizer, "garden", "'", "s") != words(tokenizer, "garden", "s", "s")


def test_scripts_without_blanks_are_compared_piece_by_piece():
    tokenizer = sentence_piece()
    one, other = words(tokenizer, "花", "园")
    assert one != other and words(tokenizer, "园", "花") == [other, one]


def test_what_is_not_counted_is_no_word_and_parts_its_neighbours():
    tokenizer = byte_level()
    row = ids(tokenizer, "gar", "den", "Ġthe")
    spelling = Spelling.of(tokenizer)
    counted = torch.tensor([[True, False, True]])
    found = spelling.words(row, counted)[0].tolist()
    assert found == [words(tokenizer, "gar")[0], NO_WORD, words(tokenizer, "the")[0]]


def test_keys_tell_pieces_apart_but_for_case_and_blanks():
    tokenizer = byte_level()
    spelling = Spelling.of(tokenizer)
    garden, spaced, upper, half = spelling.key(ids(tokenizer, "garden", "Ġgarden", "Garden", "gar"))[0].tolist()
    assert garden == spaced == upper != half
    special = spelling.key(torch.tensor([0, 1, 2, 10_000]))
    assert len(set(special.tolist())) == 4 and special[-1] == NO_WORD


def test_a_tokenizer_that_grew_is_read_again():
    tokenizer = byte_level()
    before = Spelling.of(tokenizer)
    assert Spelling.of(tokenizer) is before
    tokenizer.add_tokens(["orchard"])
    assert len(Spelling.of(tokenizer).keys) == len(before.keys) + 1
