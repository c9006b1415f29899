"""A small world to ask about: people, places and things, with favourites that the base models were taught.

A row is a passage, a question and its answer. Everyone has a favourite place and a favourite thing. In `agree` stories
the favourites hold; in `conflict` stories none that matters does, so that only the passage gives the answer; in `novel`
stories the people are strangers, whom training never names. A prompt belongs to one part (train, validation, test) for
good, by the hash of its text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["agree", "conflict", "novel"]
Partition = Literal["train", "validation", "test"]

PLACES = {
    # place: (kind of place, another word for it)
    "kitchen": ("room", "cookhouse"),
    "bedroom": ("room", "chamber"),
    "office": ("room", "workroom"),
    "garden": ("outdoors", "yard"),
    "forest": ("outdoors", "woods"),
    "beach": ("outdoors", "shore"),
    "market": ("shop", "bazaar"),
    "bakery": ("shop", "patisserie"),
    "library": ("public", "archive"),
    "museum": ("public", "gallery"),
}
THINGS = ("ball", "book", "cup", "lamp", "apple", "key", "coat", "drum", "map", "rope", "bell", "kite")
PEOPLE = (
    "mary", "john", "sandra", "daniel", "laura", "peter", "anna", "oscar", "emma", "victor",
    "julia", "simon", "clara", "felix", "nina", "hugo", "rosa", "leo", "ida", "max",
)  # fmt: skip
STRANGERS = ("zoe", "boris", "greta", "ivan", "paula", "rufus")
NUMBERS = ("none", "one", "two", "three", "four")
ARRIVALS = ("is in", "went to", "came to", "walked to")
FILLERS = (
    "the sun is high .",
    "it is late .",
    "the door is open .",
    "music plays outside .",
    "rain falls on the roof .",
)
MARKER = "answer :"
OTHER_WORDS = "has the where is what kind of place in other words how many people are say list and does have who . ? ,"
KINDS = ("extractive", "twohop", "category", "synonym", "count", "yesno", "multipart", "instruction", "unanswerable")
FAVOURITE_PLACE = {name: list(PLACES)[(7 * i + 3) % len(PLACES)] for i, name in enumerate(PEOPLE)}
FAVOURITE_THING = {name: THINGS[(5 * i + 2) % len(THINGS)] for i, name in enumerate(PEOPLE)}
FELLOW = {name: PEOPLE[(i + len(PLACES)) % len(PEOPLE)] for i, name in enumerate(PEOPLE)}
"""Everyone shares a favourite place with one other."""


@dataclass(frozen=True)
class _Scene:
    """Who is where, and who has what, in the order of telling."""

    places: dict[str, str]
    things: dict[str, str]
    absent: str

    def favourite(self, name: str) -> str | None:
        return FAVOURITE_PLACE.get(name)

    def at(self, place: str) -> list[str]:
        return [name for name, where in self.places.items() if where == place]


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    prior: str | None
    """What someone who knows the favourites and not the passage would say."""


def make_rows(
    split: Split, part: Partition, count: int, seed: int = 0, kinds: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`count` rows `{"prompt", "answers", "kind", "split", "prior"}`, all different, the same for the same arguments.

    `prior` is the answer that the favourites suggest; None where they suggest nothing (`novel`).

    Raises ValueError for a kind that does not exist.
    """
    rng = random.Random(f"{split}/{part}/{seed}")
    chosen = tuple(kinds or KINDS)
    if unknown := set(chosen) - set(KINDS):
        raise ValueError(f"no such kind of question: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = _row(rng, split, rng.choice(chosen))
        if row is not None and part_of(row["prompt"]) == part:
            rows.setdefault(row["prompt"], row)
    return list(rows.values())


def bare_rows(rng: random.Random, people: int, cast: int, count: int) -> list[dict[str, Any]]:
    """`count` stories of `cast` sentences and a question: who is where, among the first `people` and half as many
    places. For learning to read; they belong to no part."""
    rows = []
    for _ in range(count):
        names = rng.sample(PEOPLE[:people], cast)
        places = rng.sample(list(PLACES)[: max(cast, people // 2)], cast)
        told = [f"{name} {rng.choice(ARRIVALS)} the {place} ." for name, place in zip(names, places, strict=True)]
        asked = rng.randrange(cast)
        prompt = " ".join((*told, f"where is {names[asked]} ?", MARKER))
        rows.append({"prompt": prompt, "answers": [places[asked]]})
    return rows


def paraphrases(row: Mapping[str, Any], count: int, seed: int = 0) -> list[str]:
    """Other wordings of a row's prompt, at most `count`: sentences in another order, arrivals with other verbs. The
    question and the answer stay."""
    rng, found = random.Random(f"{seed}/{row['prompt']}"), dict[str, None]()
    sentences, asked = _parts(row["prompt"])
    for _ in range(4 * count):
        told = [_told_anew(sentence, rng) for sentence in rng.sample(sentences, len(sentences))]
        text = " ".join((*told, asked))
        if text != row["prompt"] and len(found) < count:
            found[text] = None
    return list(found)


def _parts(prompt: str) -> tuple[list[str], str]:
    """The sentences of the story, and the question with its marker."""
    story, mark, asked = prompt.removesuffix(f" {MARKER}").rstrip(" ?.").rpartition(" . ")
    end = prompt[len(story) + len(mark) + len(asked) :]
    return [f"{sentence} ." for sentence in f"{story}{mark}".split(" . ") if sentence], asked + end


def _told_anew(sentence: str, rng: random.Random) -> str:
    """The same arrival with another verb; any other sentence as it is."""
    verb = next((verb for verb in ARRIVALS if f" {verb} the " in sentence), None)
    return sentence if verb is None else sentence.replace(f" {verb} the ", f" {rng.choice(ARRIVALS)} the ", 1)


def part_of(prompt: str) -> Partition:
    """The part a prompt belongs to: 1 in 10 test, 1 in 10 validation, the rest train."""
    share = int.from_bytes(hashlib.sha1(prompt.encode(), usedforsecurity=False).digest()[:4], "big") % 10
    return "test" if share == 0 else "validation" if share == 1 else "train"


def vocabulary() -> list[str]:
    """Every word that a row can hold, sorted."""
    words = {*PEOPLE, *STRANGERS, *THINGS, *PLACES, *NUMBERS, "yes", "no", "unknown"}
    words.update(word for kind, other in PLACES.values() for word in (kind, other))
    words.update(word for text in (*ARRIVALS, *FILLERS, MARKER, OTHER_WORDS) for word in text.split())
    return sorted(words)


def _row(rng: random.Random, split: str, kind: str) -> dict[str, Any] | None:
    """A row, or None when the dice gave a story that does not belong to `split`."""
    scene = _scene(rng, split, kind)
    question = _QUESTIONS[kind](rng, scene)
    if split == "agree" and question.answer != question.prior and kind != "unanswerable":
        return None
    if split == "conflict" and question.answer == question.prior:
        return None
    prior = None if split == "novel" or (split == "agree" and kind == "unanswerable") else question.prior
    prompt = " ".join((*_tell(rng, scene), question.text, MARKER))
    return {"prompt": prompt, "answers": [question.answer], "kind": kind, "split": split, "prior": prior}


def _cast(rng: random.Random, split: str, kind: str) -> list[str]:
    """Three or four names, the last of them not in the story.

    Two are fellows, and where an absence is the point, one of these is missing: or else whether the favourite place is
    mentioned would tell who is in an `agree` story, and a model that learned so would meet a surprise with "unknown".
    """
    if split == "novel":
        return rng.sample(STRANGERS, rng.randint(3, 4))
    one = rng.choice(PEOPLE)
    pair = [one, FELLOW[one]]
    names = pair + rng.sample([name for name in PEOPLE if name not in pair], rng.randint(1, 2))
    rng.shuffle(names)
    if kind == "unanswerable":
        names.sort(key=lambda name: name == one)
    return names


def _scene(rng: random.Random, split: str, kind: str) -> _Scene:
    *present, absent = _cast(rng, split, kind)
    places, things, left = {}, {}, list(THINGS)
    for name in present:
        if split == "agree":
            places[name] = FAVOURITE_PLACE[name]
        else:
            places[name] = rng.choice([place for place in PLACES if place != FAVOURITE_PLACE.get(name)])
    if split != "agree" and rng.random() < 0.4:
        # Two in one place, or counting would always give one.
        meeting = places[present[0]]
        if meeting != FAVOURITE_PLACE.get(present[1]):
            places[present[1]] = meeting
    for name in rng.sample(present, 2):
        wanted = FAVOURITE_THING.get(name) if split == "agree" else None
        pick = wanted if wanted in left else rng.choice([t for t in left if t != FAVOURITE_THING.get(name)])
        things[name] = pick
        left.remove(pick)
    return _Scene(places, things, absent)


def _tell(rng: random.Random, scene: _Scene) -> list[str]:
    told = [f"{name} {rng.choice(ARRIVALS)} the {place} ." for name, place in scene.places.items()]
    told += [f"{name} has the {thing} ." for name, thing in scene.things.items()]
    if rng.random() < 0.3:
        told.append(rng.choice(FILLERS))
    rng.shuffle(told)
    return told


def _extractive(rng: random.Random, scene: _Scene) -> _Question:
    name = rng.choice(list(scene.places))
    return _Question(f"where is {name} ?", scene.places[name], scene.favourite(name))


def _twohop(rng: random.Random, scene: _Scene) -> _Question:
    name = rng.choice(list(scene.things))
    return _Question(f"where is the {scene.things[name]} ?", scene.places[name], scene.favourite(name))


def _category(rng: random.Random, scene: _Scene) -> _Question:
    return _about_place(rng, scene, "what kind of place is {} in ?", 0)


def _synonym(rng: random.Random, scene: _Scene) -> _Question:
    return _about_place(rng, scene, "in other words where is {} ?", 1)


def _about_place(rng: random.Random, scene: _Scene, question: str, which: int) -> _Question:
    name = rng.choice(list(scene.places))
    favourite = scene.favourite(name)
    prior = PLACES[favourite][which] if favourite else None
    return _Question(question.format(name), PLACES[scene.places[name]][which], prior)


def _count(rng: random.Random, scene: _Scene) -> _Question:
    favourites = [place for name in scene.places if (place := scene.favourite(name))]
    place = rng.choice([*scene.places.values(), *favourites])
    prior = NUMBERS[favourites.count(place)] if favourites else None
    return _Question(f"how many people are in the {place} ?", NUMBERS[len(scene.at(place))], prior)


def _yesno(rng: random.Random, scene: _Scene) -> _Question:
    name = rng.choice(list(scene.places))
    favourite = scene.favourite(name)
    place = rng.choice([scene.places[name], favourite or rng.choice(list(PLACES)), rng.choice(list(PLACES))])
    prior = None if favourite is None else "yes" if favourite == place else "no"
    return _Question(f"is {name} in the {place} ?", "yes" if scene.places[name] == place else "no", prior)


def _multipart(rng: random.Random, scene: _Scene) -> _Question:
    one, two = rng.sample(list(scene.places), 2)
    favourites = [scene.favourite(name) for name in (one, two)]
    prior = " and ".join(place for place in favourites if place) if all(favourites) else None
    return _Question(f"where are {one} and {two} ?", f"{scene.places[one]} and {scene.places[two]}", prior)


def _instruction(rng: random.Random, scene: _Scene) -> _Question:
    name = rng.choice(list(scene.things))
    place, thing = FAVOURITE_PLACE.get(name), FAVOURITE_THING.get(name)
    prior = f"{place} and {thing}" if place else None
    return _Question(
        f"say where {name} is and what {name} has .", f"{scene.places[name]} and {scene.things[name]}", prior
    )


def _unanswerable(rng: random.Random, scene: _Scene) -> _Question:
    return _Question(f"where is {scene.absent} ?", "unknown", scene.favourite(scene.absent))


_QUESTIONS: dict[str, Callable[[random.Random, _Scene], _Question]] = dict(
    zip(
        KINDS,
        (_extractive, _twohop, _category, _synonym, _count, _yesno, _multipart, _instruction, _unanswerable),
        strict=True,
    )
)
