"""Which prompt tokens count: a class for every token of a vocabulary, and five readings of a prompt.

Not a parser: classes come from the token's own text, so "may" is a function word in May, and a full stop inside
"3.14" ends a sentence. The stop words are English; in another language every word is content, which is harmless.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adhere.errors import unknown_name
from adhere.reward.pieces import read_pieces
from adhere.types import Prompts, Reading, Role, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenClass(IntEnum):
    """What a token's text is. Sentence ends and colons are punctuation that `question` must tell apart."""

    CONTENT = 0
    """Letters, digits or part of them."""
    SPECIAL = 1
    """Special tokens, tags such as `<think>`, and ids that no token has."""
    PUNCTUATION = 2
    """Marks, symbols and blanks."""
    FUNCTION = 3
    """An English function word."""
    STOP = 4
    """Punctuation that ends a sentence or a line."""
    COLON = 5
    """Punctuation with a colon: after the last word it marks a cue such as "Answer:"."""


_ENGLISH = """
a an the and or but if of in on at by for with from to into as than so
is are was were be been am do does did has have had will would can could should
it its this that these those there he she they we you i his her their our your my me him them us
who what which when where how 's 't 're 've 'll 'd 'm n't
"""
FUNCTION_WORDS = frozenset(_ENGLISH.split())

_STOPS = frozenset(".!?…。！？؟।\n")
_TAG = re.compile(r"<.*>|\[.*\]")
_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, Tensor] = WeakKeyDictionary()


def token_classes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The `TokenClass` of every id: [V] uint8, V = max(len(tokenizer), largest id + 1). Made once per tokenizer.

    A function word counts as one where the piece starts a word (`Ġthe`, `▁the`, no `##`); a capitalised one (`The`)
    counts without a marker too, because byte-level vocabularies write the first word of a line so.
    """
    vocabulary = tokenizer.get_vocab()
    size = max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    cached = _CACHE.get(tokenizer)
    if cached is not None and len(cached) == size:  # a tokenizer that grew since is read again
        return cached
    special = set(tokenizer.all_special_ids) | {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or _TAG.fullmatch(token.content)
    }
    classes = torch.full((size,), TokenClass.SPECIAL, dtype=torch.uint8)
    for index, piece in read_pieces(tokenizer).items():
        if index not in special:
            classes[index] = _classify(piece.text.decode(errors="replace"), piece.starts_word)
    _CACHE[tokenizer] = classes
    return classes


def classes_of(ids: Tensor, classes: Tensor) -> Tensor:
    """The class of each of `ids` [...] → [...] uint8; ids past the vocabulary (padded embeddings) are SPECIAL."""
    known = classes.to(ids.device)[ids.clamp(max=len(classes) - 1)]
    return torch.where(ids < len(classes), known, torch.full_like(known, TokenClass.SPECIAL))


def response_content(rollout: Rollout, classes: Tensor) -> Tensor:
    """[B, R] bool: the response tokens that are content."""
    return rollout.response_mask & (classes_of(rollout.response_ids, classes) == TokenClass.CONTENT)


def user_tokens(prompts: Prompts, classes: Tensor) -> Tensor:
    """[N, P] bool: the words that a response is about: no template, system text, earlier turn or special token."""
    return prompts.current & (classes_of(prompts.ids, classes) != TokenClass.SPECIAL)


def written_tokens(prompts: Prompts, classes: Tensor) -> Tensor:
    """[N, P] bool: all that somebody wrote: no template, no special token."""
    return (prompts.roles > Role.TEMPLATE) & (classes_of(prompts.ids, classes) != TokenClass.SPECIAL)


def question_tokens(prompts: Prompts, classes: Tensor) -> Tensor:
    """[N, P] bool: the question of each prompt.

    Fields say which it is: the question, or else the instruction; beside documents, the user's words. Where they say
    nothing (`Prompts.guessed`) it is the last sentence: see `last_sentence`.
    """
    words = user_tokens(prompts, classes)
    asked = prompts.has(Role.QUESTION)
    asked = torch.where(asked.any(-1, keepdim=True), asked, prompts.has(Role.INSTRUCTION))
    asked = torch.where(asked.any(-1, keepdim=True), asked, prompts.has(Role.USER))
    start, end = last_sentence(prompts, classes)
    position = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)
    guess = (position > start) & (position < end)
    return words & asked & (guess | ~prompts.guessed.unsqueeze(-1))


def context_tokens(prompts: Prompts, classes: Tensor) -> Tensor:
    """[N, P] bool: the evidence of each prompt.

    Documents where there are any; beside a question or an instruction alone, the user's other words; where fields say
    nothing (`Prompts.guessed`), the user's words before the last sentence.
    """
    evidence = prompts.has(Role.DOCUMENT)
    evidence = torch.where(evidence.any(-1, keepdim=True), evidence, prompts.has(Role.USER))
    start, _ = last_sentence(prompts, classes)
    before = torch.arange(prompts.ids.shape[1], device=prompts.ids.device) <= start
    return user_tokens(prompts, classes) & evidence & (before | ~prompts.guessed.unsqueeze(-1))


def question_span(prompts: Prompts, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The positions just before and just after the question of each prompt, [N, 1] int64 each; of a prompt without
    one, both are its last."""
    asked = question_tokens(prompts, classes)
    width = asked.shape[1]
    position = torch.arange(width, device=asked.device)
    start = torch.where(asked, position, width).amin(-1, keepdim=True) - 1
    end = torch.where(asked, position + 1, 0).amax(-1, keepdim=True)
    return start, torch.where(end > 0, end, width - 1)


def last_sentence(prompts: Prompts, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the last sentence of the user's words (USER) stands: the positions just before and just after it, [N, 1]
    int64 each.

    Rule: cut the words after every STOP; the last piece with a word in it is the question. If a colon follows its last
    word, it is a cue ("Answer:") and the piece before it is the question, where there is one.
    """
    kind = classes_of(prompts.ids, classes)
    user = prompts.has(Role.USER) & (kind != TokenClass.SPECIAL)
    position = torch.arange(prompts.ids.shape[1], device=prompts.ids.device).expand_as(prompts.ids)
    word = user & ((kind == TokenClass.CONTENT) | (kind == TokenClass.FUNCTION))
    stop = user & (kind == TokenClass.STOP)

    def last(mask: Tensor, before: Tensor) -> Tensor:
        """[N, 1]: the last position where `mask` holds, before `before`; -1 where there is none."""
        return torch.where(mask & (position < before), position, -1).amax(-1, keepdim=True)

    end = torch.full((len(prompts), 1), position.shape[1], device=prompts.ids.device)
    final = last(word, end)
    start = last(stop, final)
    earlier = last(word, start)
    cue = (user & (kind == TokenClass.COLON) & (position > final)).any(-1, keepdim=True) & (earlier >= 0)
    return torch.where(cue, last(stop, earlier), start), torch.where(cue, start, end)


def question_only(prompts: Prompts, classes: Tensor, *, left: bool) -> tuple[Prompts, Tensor]:
    """The prompts without their context, and where that took anything away ([N] bool).

    Template tokens and earlier turns stay, and so does everything after the question. `left`: the side of the padding.
    """
    keep = prompts.mask & ~context_tokens(prompts, classes)
    return prompts.only(keep, left=left), (keep != prompts.mask).any(-1)


def attended(reading: Reading, attention: Tensor, classes: Tensor, share: float) -> Tensor:
    """[N, P] bool: the `share` of each prompt's context tokens that its responses together attend to most.

    `attention` [B, R, P]; every response of a group counts alike, and at least one token is taken.
    """
    rollout = reading.rollout
    context = context_tokens(rollout.prompts, classes)
    rows = attention.sum(1) / reading.response_mask.sum(-1, keepdim=True).clamp(min=1)
    mass = torch.zeros(context.shape, device=rows.device).index_add(0, rollout.prompt_index, rows)
    order = mass.masked_fill(~context, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return context & (order < (share * context.sum(-1, keepdim=True)).ceil())


def salience(kind: str, reading: Reading, classes: Tensor) -> Tensor:
    """How much each prompt token counts, [B, P] float32 in [0, 1]; 0 on padding, template and special tokens.

    `kind` is a name in `SALIENCE`. A prompt without any salient token ("Why?") would leave every signal without
    ground: there, all of the user's tokens count.
    """
    if kind not in SALIENCE:
        raise unknown_name("salience", kind, SALIENCE)
    return _or_else(SALIENCE[kind](reading, classes), _all(reading, classes))


def _all(reading: Reading, classes: Tensor) -> Tensor:
    """Every user token, 1."""
    return user_tokens(reading.rollout.prompts, classes).float()[reading.rollout.prompt_index]


def _content(reading: Reading, classes: Tensor) -> Tensor:
    """Content tokens, 1."""
    return _content_tokens(reading.rollout.prompts, classes).float()[reading.rollout.prompt_index]


def _idf(reading: Reading, classes: Tensor) -> Tensor:
    """Content tokens, log(N / df) over the N prompts of the batch, divided by the batch's largest.

    Where every content token of a prompt is in all prompts (a batch of one, say) rarity says nothing: then `content`.
    """
    prompts = reading.rollout.prompts
    content = _content_tokens(prompts, classes)
    span = int(prompts.ids.max()) + 1 if prompts.ids.numel() else 1
    row = torch.arange(len(prompts), device=prompts.ids.device).unsqueeze(-1)
    once = torch.unique((row * span + prompts.ids)[content])  # a prompt counts once per token
    frequency = torch.bincount(once % span, minlength=span)
    weight = torch.log(len(prompts) / frequency.clamp(min=1).float())[prompts.ids] * content
    weight = weight / weight.max().clamp(min=torch.finfo(torch.float32).tiny) if weight.numel() else weight
    return _or_else(weight, content.float())[reading.rollout.prompt_index]


def _question(reading: Reading, classes: Tensor) -> Tensor:
    """Content tokens of the question (see `question_tokens`), 1."""
    prompts = reading.rollout.prompts
    asked = _content_tokens(prompts, classes) & question_tokens(prompts, classes)
    return asked.float()[reading.rollout.prompt_index]


def _self(reading: Reading, classes: Tensor) -> Tensor:
    """User tokens, by how strongly the first response row attends to them, divided by the prompt's largest.

    On a decoder-only model that row is the query at the last prompt position: what the model itself looks at before
    it says a word. On an encoder–decoder it is the first row of cross-attention.
    """
    assert reading.attention is not None, "salience `self` reads the attention, which this reading did not capture"
    weight = reading.attention[:, 0] * _all(reading, classes)
    return weight / weight.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


SALIENCE: dict[str, Callable[[Reading, Tensor], Tensor]] = {
    "all": _all,
    "content": _content,
    "idf": _idf,
    "question": _question,
    "self": _self,
}


def _content_tokens(prompts: Prompts, classes: Tensor) -> Tensor:
    return user_tokens(prompts, classes) & (classes_of(prompts.ids, classes) == TokenClass.CONTENT)


def _or_else(weight: Tensor, fallback: Tensor) -> Tensor:
    """`weight` [..., P], and `fallback` in the rows where nothing has weight."""
    return torch.where((weight > 0).any(-1, keepdim=True), weight, fallback)


def _classify(text: str, starts_word: bool) -> TokenClass:
    bare = text.strip()
    if not any(c.isalnum() or c == "\ufffd" or unicodedata.category(c)[0] == "M" for c in bare):
        if ":" in bare:
            return TokenClass.COLON
        return TokenClass.STOP if _STOPS & set(text) else TokenClass.PUNCTUATION
    free = starts_word or bare[0] in "'’" or (len(bare) > 1 and bare.istitle())
    if free and bare.lower().replace("’", "'") in FUNCTION_WORDS:
        return TokenClass.FUNCTION
    return TokenClass.CONTENT
