"""Text as it is compared: answers normalised as in SQuAD, but in any script, and the words that F1 and ROUGE count.

Two texts that a reader calls the same answer come out the same: case, width, typographic quotes, Unicode punctuation
and composed accents make no difference. Nothing here knows a language; English articles go because SQuAD's go.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

# Scripts that put no blanks between words: kana, Han, Thai, Lao, Myanmar, Khmer, Tibetan.
_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED += "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
# Vowel signs and accents belong to their word, but are no `\w`.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_SIGN = rf"[{_UNSPACED}][{_MARKS}]*"
_PART = rf"[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|[{_MARKS}])*"
_ONE_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"{_SIGN}|{_PART}(?:'{_PART})*")
_PIECE = re.compile(rf"{_SIGN}|[^\s{_UNSPACED}]+")

# What NFKC leaves alone, or takes for something else (´ for a blank and an accent, ʼ for a letter).
_PLAIN = str.maketrans(
    dict.fromkeys("‘’‚‛′ʼʻ´", "'")
    | dict.fromkeys("“”„‟″«»", '"')
    | dict.fromkeys("‐‑‒–−˗", "-")
    | {"⁄": "/", "٫": ".", "٬": ","}
)
# 10² is not 102 and 2½ is not 21/2, which is what NFKC makes of them.
_RAISED = re.compile("(?<=[0-9])(?=[²³¹⁰⁴-⁹₀-₉¼-¾⅐-⅞↉①-⑨])")
_INVISIBLE = frozenset("\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f") | {chr(c) for c in range(0xFE00, 0xFE10)}

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d|,\d)")
_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_NEGATIVE = re.compile(r"[\W_]*-[^\w-]*\d")
_SIGNS = re.compile(r"(?:[^\w\s]|_)+")

# What may end a sentence: full stops of scripts with blanks, which need one after them; of scripts without; a line.
_END = re.compile(r"[.!?…؟।॥]+[\"'”’»)\]]*(?=\s|$)|[。！？｡]+[\"'”’」』）]*|\n+")
_SHORT = re.compile(r"(?:^|[\s(\[\"'“‘])((?:\w\.)+\w|\w+)\.$")
_SHORTENED = """
mr mrs ms dr prof st mt ft jr sr gen col lt sgt capt rev hon gov sen rep eq ca approx vs cf al
e.g i.e u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec
"""
_ABBREVIATIONS = frozenset(_SHORTENED.split())
"""English words that a full stop shortens."""
_BEFORE_NUMBERS = frozenset(["no", "nos", "vol", "fig", "figs", "ch", "p", "pp"])
"""Those that are words of their own, or end a sentence, unless a number follows."""


def normalise_answer(text: str) -> str:
    """Case-folded, without punctuation and English articles, with single blanks (SQuAD, Rajpurkar et al. 2016).

    On plain English words this is SQuAD's own normalisation. Elsewhere it goes further, or stops earlier:

    - Text is NFKC with full case folding: “Ｐａｒｉｓ” is "paris", "Straße" is "STRASSE", "İstanbul" is "istanbul".
    - Punctuation is Unicode's (categories P*), besides ASCII's symbols, as in MLQA (Lewis et al. 2020); other symbols
      (€, °, ×) stay.
    - Numbers keep what tells them apart: a decimal point between digits ("3.14", and ".5" is "0.5") and a minus before
      the number ("-5"). Commas that group digits go ("1,000" is "1000"). Any other punctuation between two digits
      becomes a blank ("10:30", "1/2", "5–10"), so that no new number comes of it. "%", "$" and "+" go, as in SQuAD.
    - Where nothing would be left of a text that said something ("A.", "+"), less is taken away: the answer "A" must not
      equal an empty response.

    >>> normalise_answer("The  Garden."), normalise_answer("A."), normalise_answer("+"), normalise_answer(" ")
    ('garden', 'a', '+', '')
    >>> normalise_answer("花园。"), normalise_answer("U.S."), normalise_answer("It’s"), normalise_answer("$1,000.50")
    ('花园', 'us', 'its', '1000.50')
    """
    whole = " ".join(fold(text).split())
    numbers = _POINT.sub("0.", _GROUPED.sub(lambda found: found[0].replace(",", ""), whole))
    bare = unicodedata.normalize("NFC", " ".join(" ".join(map(_bare, numbers.split())).split()))
    return " ".join(_ARTICLE.sub(" ", bare).split()) or bare or whole


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no blanks between words.

    >>> is_unspaced("花"), is_unspaced("f")
    (True, False)
    """
    return _ONE_UNSPACED.match(character) is not None


def is_answer(text: str, accepted: Iterable[str]) -> bool:
    """Whether `text` is one of the accepted answers, once both are normalised."""
    return normalise_answer(text) in {normalise_answer(answer) for answer in accepted}


def contains_answer(text: str, accepted: Iterable[str]) -> bool:
    """Whether one of the accepted answers stands in `text`, word for word, once both are normalised.

    >>> contains_answer("It was the red car.", ["Red car"]), contains_answer("It was a red carpet.", ["red car"])
    (True, False)
    """
    whole = f" {' '.join(answer_words(text))} "
    return any(f" {' '.join(answer_words(answer))} " in whole for answer in accepted)


def answer_words(text: str) -> list[str]:
    """The normalised answer in pieces, for F1: words, and single characters of scripts that put no blanks between them.

    That is the mixed segmentation of MLQA's evaluation (Lewis et al. 2020), which XQuAD and XTREME use too.

    >>> answer_words("the red car"), answer_words("在花园。"), answer_words("iPhone的")
    (['red', 'car'], ['在', '花', '园'], ['iphone', '的'])
    """
    return _PIECE.findall(normalise_answer(text))


def sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of `text`: characters [start, end) of each, without the blanks around them, in order.

    A sentence ends at a full stop, question or exclamation mark of any script, with the quotes that close after it, and
    at the end of a line. A full stop ends none inside a number or word, after an initial, an English abbreviation or
    the number of an item in a list.

    >>> [text[a:b] for text in ["Dr. No paid $3.50. Who? “Me.”"] for a, b in sentences(text)]
    ['Dr. No paid $3.50.', 'Who?', '“Me.”']
    """
    found, start = [], 0
    for end in [*(match for match in _END.finditer(text) if _ends(text, match)), None]:
        stop = len(text) if end is None else end.end()
        piece = text[start:stop]
        if any(character.isalnum() for character in piece):
            first = start + len(piece) - len(piece.lstrip())
            found.append((first, first + len(piece.strip())))
            start = stop
        elif found and piece.strip() and "\n" not in text[found[-1][1] : start]:  # signs alone close what was before
            found[-1] = (found[-1][0], start + len(piece.rstrip()))
            start = stop
    return found


def _ends(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark that may end a sentence does."""
    after = text[mark.end() :].lstrip(" \t")[:1]
    if mark[0].startswith(("..", "…")):
        return not after.islower()
    short = _SHORT.search(text, max(0, mark.start() - 12), mark.start() + 1)
    if short is None or not after or after == "\n":
        return True
    word = short[1]
    if word.isdecimal():  # the number of an item of a list
        return bool(text[: short.start(1)].rpartition("\n")[2].strip())
    if word.casefold() in _BEFORE_NUMBERS:
        return not after.isdigit()
    return not (word.casefold() in _ABBREVIATIONS or (len(word) == 1 and word != "I"))


def words(text: str) -> list[str]:
    """Case-folded words of `text`, in order, punctuation left out; characters where a script has no blanks.

    >>> words("Don't — the 2nd CAFÉ, 東京!")
    ["don't", 'the', '2nd', 'café', '東', '京']
    """
    return _WORD.findall(fold(text))


def fold(text: str) -> str:
    """`text` without differences of case, width, composition and typography; invisible characters go.

    Upper case comes before case folding, or else ı and İ, which have one partner each, would part from their pairs.
    """
    if text.isascii() and text.isprintable():
        return text.lower()
    text = unicodedata.normalize("NFKD", _RAISED.sub(" ", "".join(map(_shown, text)).translate(_PLAIN)))
    return unicodedata.normalize("NFKC", text.upper().casefold().replace("i\u0307", "i")).translate(_PLAIN)


def _shown(character: str) -> str:
    """What is seen of a character: nothing of marks that only direct others, of a digit of any script its value."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    hidden = unicodedata.category(character) in ("Cc", "Cf") or character in _INVISIBLE
    return "" if hidden and not character.isspace() else character


def _bare(piece: str) -> str:
    """A piece without blanks, without its punctuation; see `normalise_answer` for what numbers keep."""
    return ("-" if _NEGATIVE.match(piece) else "") + _SIGNS.sub(_without_punctuation, piece)


def _without_punctuation(found: re.Match[str]) -> str:
    signs, text = found[0], found.string
    kept = "".join(c for c in signs if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    between_digits = text[: found.start()][-1:].isdecimal() and text[found.end() :][:1].isdecimal()
    if not between_digits or kept == signs:
        return kept
    return signs if signs == "." else f"{kept} "
