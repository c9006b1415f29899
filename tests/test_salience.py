"""Token classes of word-level, byte-level, sentencepiece and wordpiece vocabularies; the five saliences by hand; what
counts when nothing does; padding and template never do."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from adhere.errors import UserError
from adhere.reward import salience as module
from adhere.reward.salience import (
    SALIENCE,
    TokenClass,
    attended,
    classes_of,
    context_tokens,
    question_only,
    question_span,
    question_tokens,
    response_content,
    salience,
    token_classes,
)
from adhere.types import Prompts, Reading, Role, Rollout

C, S, P, F, STOP, COLON = (TokenClass[n] for n in ("CONTENT", "SPECIAL", "PUNCTUATION", "FUNCTION", "STOP", "COLON"))


def wrapped(model):
    core = Tokenizer(model)
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(*names):
    return wrapped(WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *names])}, unk_token="<unk>"))


def classes_by_piece(tokenizer):
    classes = token_classes(tokenizer)
    return {piece: TokenClass(int(classes[i])) for piece, i in tokenizer.get_vocab().items()}


WORD_LEVEL = {
    "The": F,
    "the": F,
    "cat": C,
    "3.14": C,
    ".": STOP,
    ",": P,
    "Answer:": C,
    ":": COLON,
    "it's": C,
    "don't": C,
}
BYTE_LEVEL = {
    "Ġthe": F,
    "the": C,  # as in ba-the
    "The": F,  # first word of a line
    "I": C,  # as in I-BM
    "ĠI": F,
    "ĠCat": C,
    "ing": C,
    "'s": F,
    ".": STOP,
    '?"': STOP,
    "Ċ": STOP,
    "ĠĠ": P,
    ":": COLON,
    ":Ċ": COLON,
    "Ġ(": P,
    "âĢĻ": P,  # the three bytes of ’
    "Ã©": C,  # é
    "âĢ": C,  # half a character
    "42": C,
    "ãĢĤ": STOP,  # 。
    "à¤¾": C,  # a vowel sign, U+093E
}
PIECES = {
    "sentencepiece": {"▁the": F, "the": C, "▁cat": C, "▁": P, "<0x0A>": STOP, "<0xE2>": C, "▁of": F, ".": STOP, "s": C},
    "wordpiece": {"the": F, "##the": C, "cat": C, "##s": C, ".": STOP, "-": P},
}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (words(*WORD_LEVEL), WORD_LEVEL),
        (wrapped(BPE({w: i for i, w in enumerate(BYTE_LEVEL)}, [])), BYTE_LEVEL),
        (wrapped(Unigram([("<unk>", 0.0), *((w, -1.0) for w in PIECES["sentencepiece"])], 0)), PIECES["sentencepiece"]),
        (
            wrapped(WordPiece({w: i for i, w in enumerate(["<unk>", *PIECES["wordpiece"]])}, unk_token="<unk>")),
            PIECES["wordpiece"],
        ),
    ],
    ids=["word level", "byte level", "sentencepiece", "wordpiece"],
)
def test_pieces_have_the_class_of_their_text(tokenizer, expected):
    found = classes_by_piece(tokenizer)
    assert {piece: found[piece] for piece in expected} == expected
    assert {found[token] for token in tokenizer.all_special_tokens} == {S}


def test_added_words_are_read_as_words_and_added_tags_are_special():
    tokenizer = words("cat")
    before = token_classes(tokenizer)
    assert token_classes(tokenizer) is before  # once per tokenizer
    tokenizer.add_tokens(["naïveté", "<think>", "the"])
    found = classes_by_piece(tokenizer)
    assert (found["naïveté"], found["<think>"], found["the"]) == (C, S, F)
    assert len(token_classes(tokenizer)) == len(tokenizer) == len(before) + 3


def test_ids_that_no_token_has_are_special_inside_and_past_the_vocabulary():
    tokenizer = wrapped(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "cat": 7}, unk_token="<unk>"))
    classes = token_classes(tokenizer)
    assert (classes.dtype, len(classes)) == (torch.uint8, 8)
    assert classes_of(torch.tensor([7, 5, 8, 5000]), classes).tolist() == [C, S, S, S]


def test_the_cache_lets_a_tokenizer_go():
    tokenizer = words("cat")
    size = len(module._CACHE)
    token_classes(tokenizer)
    assert len(module._CACHE) == size + 1
    del tokenizer
    gc.collect()
    assert len(module._CACHE) <= size


TOKENIZER = words("the", "is", "in", "where", ".", "?", ":", "mary", "john", "garden", "hall", "tell", "answer", "\n")
CLASSES = token_classes(TOKENIZER)


def reading_of(*texts, index=None, row=None):
    """A reading of one-token responses to left-padded prompts, tokenised word by word. `row` [B][P]: its attention."""
    vocabulary = TOKENIZER.get_vocab()
    rows = [[vocabulary[word] for word in text.split(" ")] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    index = torch.arange(len(rows)) if index is None else torch.tensor(index)
    out = torch.tensor([[vocabulary["mary"], vocabulary["the"]]]).repeat(len(index), 1)
    prompts = Prompts(texts, ids, mask.to(torch.uint8) * Role.USER, ((),) * len(rows))
    rollout = Rollout(
        prompts, index, out, torch.ones_like(out).bool(), torch.ones(len(index)).bool(), ("",) * len(index)
    )
    zeros = torch.zeros(out.shape)
    attention = None if row is None else torch.stack([torch.tensor(row), torch.ones(len(index), width)], 1)
    return Reading(rollout, zeros, zeros, zeros, attention)


def counted(kind, text):
    """The words of `text` that count."""
    weight = salience(kind, reading_of(text), CLASSES)[0]
    return [word for word, s in zip(text.split(" "), weight.tolist(), strict=True) if s > 0]


def test_all_and_content():
    text = "mary is in the garden . where is john ?"
    assert counted("all", text) == text.split(" ")
    assert counted("content", text) == ["mary", "garden", "john"]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("mary is in the garden . where is john ?", ["john"]),
        ("where is john ? mary is in the garden", ["mary", "garden"]),  # the last sentence, asked or not
        ("mary is in the hall", ["mary", "hall"]),
        ("where is john ? \n answer :", ["john"]),  # a cue is not the question
        ("mary . where is john ? \n answer : \n", ["john"]),
        ("answer :", ["answer"]),  # unless there is nothing else
        ("mary is in the hall . tell : john ?", ["tell", "john"]),  # a colon inside cuts nothing
        ("mary . john . . ? \n", ["john"]),
    ],
)
def test_the_question_is_the_last_sentence_with_a_word_in_it(text, question):
    assert counted("question", text) == question


@pytest.mark.parametrize("left", [True, False])
def test_the_question_alone_is_what_stands_after_the_context(left):
    texts = ("mary is in the garden . where is john ? answer :", "where is mary ? \n answer :", "john . tell mary")
    prompts = reading_of(*texts).rollout.prompts
    if not left:  # the same tokens, padded behind
        order = (~prompts.mask).int().argsort(dim=-1, stable=True)
        prompts = replace(prompts, ids=prompts.ids.gather(1, order), roles=prompts.roles.gather(1, order))
    kept, shortened = question_only(prompts, CLASSES, left=left)
    said = [TOKENIZER.decode(ids[mask]) for ids, mask in zip(kept.ids, kept.mask, strict=True)]
    assert said == ["where is john ? answer :", "where is mary ? \n answer :", "tell mary"]
    assert shortened.tolist() == [True, False, True]
    assert kept.mask[:, -1 if left else 0].all() and not (kept.mask & kept.template).any()


def test_what_is_attended_is_a_share_of_the_context_and_never_the_question():
    text = "mary is in the garden . where is john ?"
    row = [0.1, 0.0, 0.2, 0.0, 0.3, 0.05, 0.0, 0.0, 0.9, 0.0]
    reading = reading_of(text, text, row=[row, list(reversed(row))])
    attention = reading.attention[:, :1].repeat(1, 2, 1)
    first, second = attended(reading, attention, CLASSES, 0.5).tolist()
    assert [n for n, taken in enumerate(first) if taken] == [0, 2, 4]
    assert [n for n, taken in enumerate(second) if taken] == [1, 4, 5]
    assert attended(reading, attention, CLASSES, 0.01).sum(-1).tolist() == [1, 1]
    assert attended(reading_of("where is john ?"), torch.ones(1, 2, 4), CLASSES, 1.0).sum() == 0


def test_the_question_alone_keeps_the_template():
    prompts = reading_of("mary . john . where is mary ?").rollout.prompts
    roles = prompts.roles.clone()
    roles[0, 0] = Role.TEMPLATE
    marked = replace(prompts, roles=roles)
    kept, _ = question_only(marked, CLASSES, left=True)
    assert TOKENIZER.decode(kept.ids[0]) == "mary where is mary ?" and kept.template[0].tolist() == [True] + [False] * 4


D, Q, N, U, E, T = Role.DOCUMENT, Role.QUESTION, Role.INSTRUCTION, Role.USER, Role.EARLIER, Role.TEMPLATE


@pytest.mark.parametrize(
    ("roles", "context", "question"),
    [
        # mary . john ? tell garden hall
        ([D, D, T, T, Q, Q, Q], "mary .", "tell garden hall"),
        ([D, D, T, T, U, U, U], "mary .", "tell garden hall"),  # what is no evidence is the question
        ([U, U, T, T, Q, Q, Q], "mary .", "tell garden hall"),  # what is no question is the evidence
        ([N, N, T, D, D, Q, Q], "? tell", "garden hall"),  # an instruction beside a question is neither
        ([N, N, T, D, D, D, D], "? tell garden hall", "mary ."),
        ([Q, Q, Q, Q, Q, Q, Q], "", "mary . john ? tell garden hall"),
        ([U, U, U, U, U, U, U], "mary . john ?", "tell garden hall"),  # the last sentence
        ([E, E, E, E, U, U, U], "", "tell garden hall"),  # what was said before is no evidence
        ([D, D, E, E, U, U, U], "mary .", "tell garden hall"),
    ],
)
def test_context_and_question_are_what_the_roles_say(roles, context, question):
    text = "mary . john ? tell garden hall"
    prompts = replace(reading_of(text).rollout.prompts, roles=torch.tensor([roles], dtype=torch.uint8))
    found = [TOKENIZER.decode(prompts.ids[of(prompts, CLASSES)]) for of in (context_tokens, question_tokens)]
    assert found == [context, question]
    start, end = question_span(prompts, CLASSES)
    assert TOKENIZER.decode(prompts.ids[0, int(start) + 1 : int(end)]) == question
    kept, shortened = question_only(prompts, CLASSES, left=True)
    assert bool(shortened) == bool(context)
    assert int(kept.mask.sum()) == len(roles) - int(context_tokens(prompts, CLASSES).sum())


def test_evidence_alone_has_no_question():
    prompts = replace(reading_of("mary .").rollout.prompts, roles=torch.tensor([[D, D]], dtype=torch.uint8))
    assert not question_tokens(prompts, CLASSES).any()
    start, end = question_span(prompts, CLASSES)
    assert (int(start), int(end)) == (1, 1)


@pytest.mark.parametrize("kind", [k for k in SALIENCE if k != "self"])
def test_a_prompt_without_anything_salient_counts_every_user_token(kind):
    assert counted(kind, "where is the ?") == ["where", "is", "the", "?"]


def test_idf_weighs_by_rarity_in_the_batch():
    # Of three prompts `mary` is in 3, `garden` in 2, `hall` and `john` in 1: log(3/3) = 0, log(3/2), log 3.
    reading = reading_of("mary garden", "mary garden garden hall", "mary john", index=[0, 0, 1, 2])
    rare = torch.log(torch.tensor(1.5)) / torch.log(torch.tensor(3.0))
    weight = salience("idf", reading, CLASSES)
    expected = [[0, 0, 0, rare], [0, 0, 0, rare], [0, rare, rare, 1], [0, 0, 0, 1]]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_idf_of_a_single_prompt_is_content():
    assert counted("idf", "mary is in the garden") == ["mary", "garden"]


def test_self_is_the_first_rows_attention_to_user_tokens():
    reading = reading_of("mary is in hall", "john", row=[[0.4, 0.1, 0.0, 0.2], [0.9, 0.9, 0.9, 0.0]])
    prompts = reading.rollout.prompts
    roles = prompts.roles.clone()
    roles[0, 0] = Role.TEMPLATE
    reading = replace(reading, rollout=replace(reading.rollout, prompts=replace(prompts, roles=roles)))
    # Template and padding out, the rest by the largest: 0.2. John's row is all on padding: every user token.
    torch.testing.assert_close(salience("self", reading, CLASSES), torch.tensor([[0, 0.5, 0, 1.0], [0, 0, 0, 1.0]]))


@given(st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_salience_is_in_range_nothing_on_padding_and_blind_to_its_amount(rows, more):
    names = {i: w for w, i in TOKENIZER.get_vocab().items()}
    texts = [" ".join(names[i] for i in row) for row in rows]
    reading = reading_of(*texts)
    prompts = reading.rollout.prompts

    def widened(x, fill):
        return torch.nn.functional.pad(x, (more, more), value=fill)

    wide = replace(
        prompts,
        ids=widened(prompts.ids, 9),
        roles=widened(prompts.roles, Role.PADDING),
    )
    for kind in ("all", "content", "idf", "question"):
        weight = salience(kind, reading, CLASSES)
        assert weight.dtype == torch.float32 and weight.min() >= 0 and weight.max() <= 1
        assert not weight[~prompts.mask].any()
        other = salience(kind, replace(reading, rollout=replace(reading.rollout, prompts=wide)), CLASSES)
        torch.testing.assert_close(other[:, more : other.shape[1] - more], weight)
        assert not other[~wide.mask].any()


def test_response_content_is_content_within_the_mask():
    reading = reading_of("mary", "john")
    kept = torch.tensor([[True, True], [False, False]])
    rollout = replace(reading.rollout, response_mask=kept)
    assert response_content(rollout, CLASSES).tolist() == [[True, False], [False, False]]


def test_an_unknown_salience_offers_the_nearest():
    with pytest.raises(UserError, match="unknown salience 'contents'; did you mean content"):
        salience("contents", reading_of("mary"), CLASSES)
