"""Degenerate responses: what a policy might learn to say if a reward let it, made for any model and tokenizer.

A family takes one `Case` (a prompt and the policy's own likeliest response to it) and gives the responses it stands
for, as token ids without their end; none where it has nothing to say there. What a prompt offers several of
(truncations) are all given: a reward has to withstand the best of them.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from adhere.reward.salience import TokenClass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
TRUNCATIONS = 8
"""Points at which a longer response is cut."""


@dataclass(frozen=True)
class Vocabulary:
    """What the families must know of the tokens."""

    content: frozenset[int]
    function: tuple[int, ...]
    """Function words, in order of id: the frequent first, in most vocabularies."""
    special: tuple[int, ...]
    """Special and template tokens that do not end a response."""
    script: dict[int, str] = field(default_factory=dict)
    """Token → the script of its letters (LATIN, CYRILLIC, …), for tokens that have any."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, classes: Tensor, ends: set[int]) -> Vocabulary:
        """Of a tokenizer, its `token_classes` and the ids that end a response."""
        kinds = classes.tolist()
        ids = sorted(set(tokenizer.get_vocab().values()))
        used = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - ends - {tokenizer.pad_token_id}
        texts = tokenizer.batch_decode([[i] for i in ids])
        return cls(
            frozenset(i for i in ids if kinds[i] == TokenClass.CONTENT),
            tuple(i for i in ids if kinds[i] == TokenClass.FUNCTION),
            tuple(sorted(used)),
            {i: script for i, text in zip(ids, texts, strict=True) if i not in used and (script := _script(text))},
        )


@dataclass(frozen=True)
class Case:
    """One prompt, and what its degenerate responses are made of. All ids stand without padding, template and end."""

    prompt: Ids
    question: Ids
    sentence: Ids
    """The prompt's first sentence."""
    sample: Ids
    """The likeliest of the policy's own samples."""
    logprobs: Sequence[float]
    """Of the sample's tokens."""
    other: Ids
    """The likeliest sample of another prompt."""
    ungrounded: Ids
    """Sampled from the question alone; empty where the prompt is nothing but a question."""
    distractors: Sequence[Ids] = ()
    """Answers to other questions about the same documents."""
    examples: Sequence[Ids] = ()
    """What earlier turns of the chat were answered with."""


Family = Callable[[Case, Vocabulary, random.Random], list[Ids]]


def _empty(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """Nothing but the end."""
    return [[]]


def _truncated(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The sample, cut at each point (at most `TRUNCATIONS`, evenly spread)."""
    cuts = range(1, len(case.sample))
    step = max(1, -(-len(cuts) // TRUNCATIONS))
    return [case.sample[:cut] for cut in cuts[::step]]


def _padded(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The sample, and then as many words of the prompt again."""
    own = [i for i in case.prompt if i in words.content]
    return [case.sample + rng.choices(own, k=max(4, len(case.sample)))] if own else []


def _token_repeated(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The sample's content token that comes first, over and over."""
    own = [i for i in case.sample if i in words.content]
    return [own[:1] * max(6, len(case.sample))] if own else []


def _loop(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The whole sample three times over: an n-gram loop."""
    return [case.sample * 3]


def _prompt_copied(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    return [case.prompt]


def _sentence_copied(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The first sentence of the prompt."""
    return [case.sentence]


def _span_copied(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """A random span of the prompt, as long as the sample or a little longer."""
    size = min(len(case.prompt), len(case.sample) + rng.randint(0, 3))
    start = rng.randint(0, len(case.prompt) - size)
    return [case.prompt[start : start + size]]


def _keywords(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The prompt's content words, each once, rare first."""
    count = Counter(i for i in case.prompt if i in words.content)
    return [sorted(count, key=lambda i: (count[i], i))[:12]] if count else []


def _question_echoed(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    return [case.question]


def _function_words(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """As many function words as the sample has tokens."""
    pool = [i for i in words.function if i in case.prompt] or list(words.function[:20])
    return [rng.choices(pool, k=max(3, len(case.sample)))] if pool else []


def _other_answer(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """What another prompt is answered with."""
    return [case.other]


def _distractor(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """Grounded in the same documents, and no answer to this question."""
    return list(case.distractors)


def _example(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """What an example shows how to answer with."""
    return list(case.examples)


def _addition(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The sample, and then what another prompt is answered with, which nothing here supports."""
    return [case.sample + case.other] if case.other else []


def _shuffled_words(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    return [rng.sample(case.sample, len(case.sample))]


def _entity_swapped(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """One word that the sample has from the prompt, exchanged for another content word of the prompt."""
    places = [n for n, i in enumerate(case.sample) if i in words.content and i in case.prompt]
    others = sorted({i for i in case.prompt if i in words.content} - set(case.sample))
    if not places or not others:
        return []
    place = rng.choice(places)
    return [[*case.sample[:place], rng.choice(others), *case.sample[place + 1 :]]]


def _risky_dropped(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """The sample without its least likely content token: how a mean over tokens is gamed."""
    places = [n for n, i in enumerate(case.sample) if i in words.content]
    if not places:
        return []
    worst = min(places, key=lambda n: case.logprobs[n])
    return [case.sample[:worst] + case.sample[worst + 1 :]]


def _ungrounded(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """Fluent, and said without having read the context."""
    return [case.ungrounded] if case.ungrounded else []


def _other_script(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """Tokens of another script than the prompt's, where the tokenizer has one."""
    own = Counter(words.script[i] for i in case.prompt if i in words.script)
    main = own.most_common(1)[0][0] if own else "LATIN"
    foreign = [i for i, script in words.script.items() if script != main]
    return [rng.choices(foreign, k=max(3, len(case.sample)))] if foreign else []


def _template_tokens(case: Case, words: Vocabulary, rng: random.Random) -> list[Ids]:
    """Special and chat-template tokens."""
    return [rng.choices(words.special, k=max(3, len(case.sample)))] if words.special else []


FAMILIES: dict[str, Family] = {
    "empty": _empty,
    "truncated": _truncated,
    "padded": _padded,
    "one token repeated": _token_repeated,
    "n-gram loop": _loop,
    "prompt copied": _prompt_copied,
    "first sentence copied": _sentence_copied,
    "random span copied": _span_copied,
    "keywords stuffed": _keywords,
    "question echoed": _question_echoed,
    "function words": _function_words,
    "another prompt's answer": _other_answer,
    "another question's answer": _distractor,
    "an example's answer": _example,
    "unsupported addition": _addition,
    "words shuffled": _shuffled_words,
    "entity swapped": _entity_swapped,
    "risky token dropped": _risky_dropped,
    "fluent, ungrounded": _ungrounded,
    "another script": _other_script,
    "template tokens": _template_tokens,
}


def _script(text: str) -> str | None:
    """The script of a token's letters, by the first word of their Unicode names; None if there is none, or several."""
    found = {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}
    return found.pop() if len(found) == 1 and "?" not in found else None
