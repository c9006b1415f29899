"""What the bench puts to a reward: passages as they are or changed, each with right and wrong responses. Pure text.

    unchanged     the passage as it is: the right answer; wrong are an answer of the same kind that other passages lend,
                  another row's answer (`elsewhere`) and nothing at all (`empty`)
    swapped       that answer of the same kind put in place of the right one: now it is right, and the old one wrong
                  (knowledge conflict: Longpre et al. 2021, arXiv 2109.05052)
    distractor    the passage as it is: wrong are the answers to other questions on it
    unanswerable  the sentences that hold the answer taken out: right is to say so, wrong the answer

A row that has no place in a split (its answer does not stand in the passage, nothing of its kind elsewhere) is not in
it. What other rows lend is chosen by a hash of the seed and the texts: the order of the rows makes no difference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from adhere.faithfulness.settings import BenchConfig
from adhere.measure.metrics import token_f1
from adhere.text import answer_words, contains_answer, is_unspaced, normalise_answer, sentences

SAME = 0.5
"""Word F1 from which on an answer counts as another wording of a right one, and so never as wrong."""
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_YEAR = re.compile(r"(?<!\d)(?:1\d|20)\d\d(?:s|\b)")
_CALENDAR = re.compile(rf"\b(?:{'|'.join(_MONTHS.split() + _DAYS.split())})\b")
_NUMERALS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half third quarter
once twice both first second
"""
_NUMBERS = frozenset(_NUMERALS.split())
SENTENCE_ENDS = tuple(".!?…。！？؟।")
_PARTICLES = "a an the of in on at by to for and or from with de la le du van von der das die al el"
_SMALL = frozenset(_PARTICLES.split())


@dataclass(frozen=True)
class Question:
    """A row as the bench reads it."""

    context: str
    question: str
    answers: tuple[str, ...]
    """Accepted answers, the usual one first; not empty."""


@dataclass(frozen=True)
class Candidate:
    """A response that is known to be right or wrong."""

    response: str
    kind: str
    """What it is: right, same kind, elsewhere, empty, distractor, old answer, removed answer, sample."""
    right: bool


@dataclass(frozen=True)
class Case:
    """One question in one split."""

    split: str
    context: str
    """The passage that is read."""
    answers: tuple[str, ...]
    """What is right there."""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class _Lent:
    """An answer that rows on other passages may be given."""

    text: str
    normal: str
    kind: str
    size: int
    contexts: Collection[str]


@dataclass(frozen=True)
class Builder:
    """Makes the cases of a question; knows the answers of all questions."""

    config: BenchConfig
    lent: tuple[_Lent, ...]
    asked: dict[str, list[Question]] = field(repr=False)
    """Passage → the questions on it."""

    @classmethod
    def of(cls, questions: Sequence[Question], config: BenchConfig) -> Builder:
        """From every question there is, those that are not benched too."""
        asked: dict[str, list[Question]] = {}
        contexts: dict[str, set[str]] = {}
        for one in questions:
            asked.setdefault(one.context, []).append(one)
            contexts.setdefault(one.answers[0], set()).add(one.context)
        lent = (_Lent(t, normalise_answer(t), kind_of(t), len(answer_words(t)), c) for t, c in contexts.items())
        return cls(config, tuple(lent), asked)

    def cases(self, question: Question) -> list[Case]:
        """The cases of one question in every split for which responses are made; the model's own are not among them."""
        other = self._same_kind(question)
        made = [
            self._unchanged(question, other),
            _swapped(question, other),
            self._distractor(question),
            _unanswerable(question, self.config.refusal),
        ]
        return [case for case in made if case is not None]

    def _unchanged(self, question: Question, other: str | None) -> Case:
        elsewhere = self._first(question, [one for one in self.lent if one.text != other])
        lent = [("same kind", other), ("elsewhere", elsewhere), ("empty", "")]
        wrong = [(kind, text) for kind, text in lent if text is not None]
        return _case("unchanged", question.context, question.answers, wrong)

    def _distractor(self, question: Question) -> Case | None:
        others: dict[str, str] = {}
        for asked in self.asked[question.context]:
            text = asked.answers[0]
            if not any(_alike(text, known) for known in question.answers):
                others.setdefault(normalise_answer(text), text)
        wrong = [("distractor", text) for text in others.values()]
        return _case("distractor", question.context, question.answers, wrong) if wrong else None

    def _same_kind(self, question: Question) -> str | None:
        """An answer of the same kind and, as nearly as there is one, of as many words."""
        kind, size = kind_of(question.answers[0]), len(answer_words(question.answers[0]))
        near: dict[int, list[_Lent]] = {}
        for one in self.lent:
            if one.kind == kind:
                near.setdefault(abs(one.size - size), []).append(one)
        for distance in sorted(near):
            if (found := self._first(question, near[distance])) is not None:
                return found
        return None

    def _first(self, question: Question, lent: Sequence[_Lent]) -> str | None:
        """The first in the order of the hash that says something new: it is not in the passage or the question, and is
        no part of an accepted answer or the other way round."""
        for one in sorted(lent, key=lambda one: _rank(self.config.seed, question, one.text)):
            if question.context in one.contexts or not one.normal:
                continue
            said = contains_answer(f"{question.context}\n{question.question}", [one.text])
            if not said and not any(_alike(one.text, known) for known in question.answers):
                return one.text
        return None


def _swapped(question: Question, other: str | None) -> Case | None:
    places = occurrences(question.context, question.answers)
    if not places or other is None:
        return None
    put = other.rstrip().removesuffix(".")  # the passage has its own full stop
    pieces, end = [], 0
    for start, stop in places:
        begins = question.context[start].isupper() and not question.answers[0][0].isupper()  # a sentence
        pieces += [question.context[end:start], put[0].upper() + put[1:] if begins else put]
        end = stop
    changed = "".join([*pieces, question.context[end:]])
    if contains_answer(changed, question.answers):
        return None
    return _case("swapped", changed, [other], [("old answer", question.context[slice(*places[0])])])


def _unanswerable(question: Question, refusal: str) -> Case | None:
    spans, holds = holding(question.context, question.answers)
    kept, end = [], 0
    for (start, stop), gone in zip(spans, holds, strict=True):
        if gone:
            kept.append(question.context[end:start])
            end = stop
    rest = " ".join("".join([*kept, question.context[end:]]).split())
    if not any(holds) or not rest or contains_answer(rest, question.answers):
        return None
    removed = question.context[slice(*occurrences(question.context, question.answers)[0])]
    return _case("unanswerable", rest, [refusal], [("removed answer", removed)])


def kind_of(answer: str) -> str:
    """What an answer is, by its looks: a `date`, a `number`, a `name`, a `sentence` or a `phrase`.

    A date holds a year, or a month or weekday in English; a number any other digit, or English numerals alone; of a
    name most words that count begin with a capital; a sentence ends as one. In a script without capitals a name is a
    phrase.

    >>> [kind_of(text) for text in ("in May 1519", "three million", "the Vatican", "He ran away.", "much higher")]
    ['date', 'number', 'name', 'sentence', 'phrase']
    """
    tokens = [token for token in re.findall(r"[^\W_]+", answer) if token.lower() not in _SMALL]
    if _YEAR.search(answer) or _CALENDAR.search(answer):
        return "date"
    if any(character.isdecimal() for character in answer):
        return "number"
    if tokens and all(token.lower() in _NUMBERS for token in tokens):
        return "number"
    capitals = sum(token[0].isupper() for token in tokens)
    if capitals * 2 > len(tokens):
        return "name"
    return "sentence" if answer.rstrip()[-1:] in SENTENCE_ENDS else "phrase"


def occurrences(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Character spans in which an answer stands in `text` as words, regardless of case and of the kind of blanks; where
    two begin alike, the longer.

    >>> occurrences("The red car, a red  Car, and red carpets.", ["red car"])
    [(4, 11), (15, 23)]
    """
    patterns = [pattern for answer in sorted(answers, key=len, reverse=True) if (pattern := _pattern(answer))]
    return [found.span() for found in re.finditer("|".join(patterns), text, re.IGNORECASE)] if patterns else []


def holding(context: str, answers: Sequence[str]) -> tuple[list[tuple[int, int]], list[bool]]:
    """The sentences of a passage (see `adhere.text.sentences`), and whether an answer stands in each, or begins or ends
    there."""
    spans, places = sentences(context), occurrences(context, answers)
    return spans, [any(first < end and last > start for first, last in places) for start, end in spans]


def _pattern(answer: str) -> str:
    """A regular expression that finds the answer as words."""
    text = answer.strip().rstrip(".") or answer.strip()
    if not text:
        return ""
    before = r"(?<!\w)" if text[0].isalnum() and not is_unspaced(text[0]) else ""
    after = r"(?!\w)" if text[-1].isalnum() and not is_unspaced(text[-1]) else ""
    return before + r"\s+".join(map(re.escape, text.split())) + after


def _case(split: str, context: str, answers: Sequence[str], wrong: Sequence[tuple[str, str]]) -> Case:
    """The case whose right response is the first of `answers`; `wrong`: kind and text of the others."""
    others = (Candidate(text, kind, False) for kind, text in wrong)
    return Case(split, context, tuple(answers), (Candidate(answers[0], "right", True), *others))


def _alike(one: str, other: str) -> bool:
    """Whether two answers may well be the same: one holds the other, or half of their words are the same."""
    return contains_answer(one, [other]) or contains_answer(other, [one]) or token_f1(one, other) >= SAME


def _rank(seed: int, question: Question, text: str) -> bytes:
    key = "\0".join((str(seed), question.context, question.question, text))
    return blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest()
