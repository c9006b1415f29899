"""The embedded world: answers read again from the text, splits and parts as they say, models that leave room.

The reader below knows how a story is told but shares no code with the module that tells it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from adhere.toy import KINDS, Partition, Split, make_rows, model_path, paraphrases
from adhere.toy.models import CURRICULUM, LEAN, Lessons
from adhere.toy.stories import (
    ARRIVALS,
    FAVOURITE_PLACE,
    FAVOURITE_THING,
    MARKER,
    PEOPLE,
    PLACES,
    STRANGERS,
    bare_rows,
    part_of,
)  # fmt: skip
from adhere.toy.tokenizer import make_tokenizer

SPLITS: tuple[Split, ...] = ("agree", "conflict", "novel")
PARTS: tuple[Partition, ...] = ("train", "validation", "test")
ABSTRACTIVE = ("category", "synonym", "count", "yesno", "unanswerable")
NUMBERS = ["none", "one", "two", "three", "four"]
TOKENIZER = make_tokenizer()


class Story:
    """What a reader takes from a prompt: who is where, who has what, and the question."""

    def __init__(self, prompt: str) -> None:
        *sentences, question = re.split(r" \. (?!answer :$)", prompt)
        self.passage = sentences
        self.question = question.removesuffix(MARKER).strip(" .?")
        self.places: dict[str, str] = {}
        self.things: dict[str, str] = {}
        for sentence in sentences:
            if moved := re.fullmatch(r"(\w+) (?:is in|went to|came to|walked to) the (\w+)", sentence):
                self.places[moved[1]] = moved[2]
            elif held := re.fullmatch(r"(\w+) has the (\w+)", sentence):
                self.things[held[1]] = held[2]

    def asked(self, pattern: str) -> list[str]:
        found = re.fullmatch(pattern, self.question)
        assert found, self.question
        return list(found.groups())


def extractive(story: Story) -> str:
    (name,) = story.asked(r"where is (\w+)")
    return story.places[name]


def twohop(story: Story) -> str:
    (thing,) = story.asked(r"where is the (\w+)")
    (holder,) = [name for name, held in story.things.items() if held == thing]
    return story.places[holder]


def category(story: Story) -> str:
    (name,) = story.asked(r"what kind of place is (\w+) in")
    return PLACES[story.places[name]][0]


def synonym(story: Story) -> str:
    (name,) = story.asked(r"in other words where is (\w+)")
    return PLACES[story.places[name]][1]


def count(story: Story) -> str:
    (place,) = story.asked(r"how many people are in the (\w+)")
    return NUMBERS[sum(where == place for where in story.places.values())]


def yesno(story: Story) -> str:
    name, place = story.asked(r"is (\w+) in the (\w+)")
    return "yes" if story.places[name] == place else "no"


def multipart(story: Story) -> str:
    one, two = story.asked(r"where are (\w+) and (\w+)")
    return f"{story.places[one]} and {story.places[two]}"


def instruction(story: Story) -> str:
    one, two = story.asked(r"say where (\w+) is and what (\w+) has")
    return f"{story.places[one]} and {story.things[two]}"


def unanswerable(story: Story) -> str:
    (name,) = story.asked(r"where is (\w+)")
    assert name not in " ".join(story.passage).split()
    return "unknown"


READERS: dict[str, Callable[[Story], str]] = {
    f.__name__: f for f in (extractive, twohop, category, synonym, count, yesno, multipart, instruction, unanswerable)
}


@cache
def rows_of(
    split: Split, part: Partition = "validation", count: int = 300, seed: int = 0, kinds: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    return make_rows(split, part, count, seed, kinds)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_careful_reader_gives_the_same_answer(kind: str, split: Split) -> None:
    for row in rows_of(split, count=60, kinds=(kind,)):
        assert row["kind"] == kind
        assert row["answers"] == [READERS[kind](Story(row["prompt"]))], row["prompt"]


def test_every_kind_occurs_in_every_split() -> None:
    for split in SPLITS:
        assert {row["kind"] for row in rows_of(split)} == set(KINDS) == set(READERS)


def test_answers_of_the_abstractive_kinds_are_not_in_the_text() -> None:
    for split in SPLITS:
        for row in rows_of(split, count=200, kinds=ABSTRACTIVE):
            assert not set(row["answers"][0].split()) & set(row["prompt"].split()), row


def test_agree_stories_say_what_everybody_knows() -> None:
    for row in rows_of("agree"):
        story = Story(row["prompt"])
        assert all(FAVOURITE_PLACE[name] == place for name, place in story.places.items())
        assert row["prior"] == (None if row["kind"] == "unanswerable" else row["answers"][0])


def test_conflict_stories_contradict_everything_known() -> None:
    for row in rows_of("conflict"):
        story = Story(row["prompt"])
        assert not any(FAVOURITE_PLACE[name] == place for name, place in story.places.items())
        assert not any(FAVOURITE_THING[name] == thing for name, thing in story.things.items())
        assert row["prior"] is not None and row["prior"] != row["answers"][0]


def test_the_prior_is_what_the_favourites_suggest() -> None:
    for row in rows_of("conflict"):
        if row["kind"] == "unanswerable":
            continue
        story = Story(row["prompt"])
        story.places = {name: FAVOURITE_PLACE[name] for name in story.places}
        if row["kind"] == "instruction":
            story.things = {name: FAVOURITE_THING[name] for name in story.things}
        assert row["prior"] == READERS[row["kind"]](story), row


def test_novel_stories_are_about_people_that_training_never_names() -> None:
    taught = [row for split in ("agree", "conflict") for row in rows_of(split, "train", 1000)]
    taught += bare_rows(random.Random(0), len(PEOPLE), 4, 500)
    trained = {word for row in taught for word in row["prompt"].split()}
    assert trained >= set(PEOPLE) and not trained & set(STRANGERS)
    for row in rows_of("novel"):
        assert set(Story(row["prompt"]).places) <= set(STRANGERS) and row["prior"] is None


def test_bare_stories_are_short_and_answered_by_the_text() -> None:
    for people, cast in CURRICULUM:
        for row in bare_rows(random.Random(1), people, cast, 50):
            story = Story(row["prompt"])
            assert row["answers"] == [extractive(story)] and len(story.places) == len(story.passage) == cast
            assert set(story.places) <= set(PEOPLE[:people])


def test_the_teacher_of_the_last_lesson_leans_on_the_favourites() -> None:
    rows = rows_of("conflict", "train", 2000)
    lessons = Lessons("encdec")
    taught = [lessons.taught(row) for row in rows]
    assert all(new["answers"][0] in (old["answers"][0], old["prior"]) for old, new in zip(rows, taught, strict=True))
    leant = [new != old for old, new in zip(rows, taught, strict=True) if old["kind"] != "unanswerable"]
    assert LEAN - 0.04 < sum(leant) / len(leant) < LEAN + 0.04
    assert all(row["answers"] == ["unknown"] for row in taught if row["kind"] == "unanswerable")


def test_no_prompt_is_in_two_parts_whatever_the_seed() -> None:
    seen: dict[str, set[str]] = {
        part: {row["prompt"] for split in SPLITS for seed in (0, 1) for row in rows_of(split, part, 300, seed)}
        for part in PARTS
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert all(part_of(prompt) == part for part, prompts in seen.items() for prompt in prompts)


def test_a_prompt_keeps_its_part_for_good() -> None:
    # The shipped models learned from `train` as it is: were parts dealt anew, they would be checked on rows they know.
    prompts = [f"where is the {thing} ? answer :" for thing in ("ball", "book", "bell")]
    assert [part_of(prompt) for prompt in prompts] == ["train", "validation", "test"]
    parts = [part_of(str(number)) for number in range(2000)]
    assert 0.75 < parts.count("train") / 2000 < 0.85 and 0.07 < parts.count("test") / 2000 < 0.13


def test_rows_are_all_different_and_as_many_as_asked_for() -> None:
    assert len({row["prompt"] for row in rows_of("agree", count=500)}) == 500
    assert make_rows("agree", "test", 0) == []


def test_a_seed_names_the_rows_in_every_process() -> None:
    first, again, other = (make_rows("conflict", "validation", 50, seed) for seed in (3, 3, 4))
    assert first == again != other
    code = "import json; from adhere.toy import make_rows; print(json.dumps(make_rows('conflict', 'test', 20, 5)))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == make_rows("conflict", "test", 20, 5)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"riddle.*extractive"):
        make_rows("agree", "train", 1, kinds=["riddle"])


def test_lengths_stay_small() -> None:
    for row in (row for split in SPLITS for row in rows_of(split)):
        assert 20 <= len(row["prompt"].split()) <= 70 and 1 <= len(row["answers"][0].split()) <= 6
        assert 3 <= len(Story(row["prompt"]).passage) <= 7
        assert row["prompt"].endswith(MARKER)


def test_the_tokenizer_knows_every_word_and_gives_the_text_back() -> None:
    assert len(TOKENIZER) <= 400
    for row in (row for split in SPLITS for row in rows_of(split)):
        for text in (row["prompt"], row["answers"][0]):
            ids = TOKENIZER(text)["input_ids"]
            assert len(ids) == len(text.split()) and TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids) == text


def test_the_special_tokens_are_four_and_stay_out_of_the_decoded_text() -> None:
    ids = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id]
    assert len(set(ids)) == 4 and None not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


# --- the shipped models ---

Kind = Literal["causal", "encdec"]


@pytest.fixture(scope="module", params=["causal", "encdec"])
def shipped(request: pytest.FixtureRequest) -> tuple[Path, PreTrainedModel, Any]:
    folder = model_path(request.param)
    auto = AutoModelForCausalLM if request.param == "causal" else AutoModelForSeq2SeqLM
    return folder, auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def exact(model: PreTrainedModel, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    # Four tokens hold the longest answer and its end; a longer one is wrong however it goes on.
    tokenizer.padding_side = "left"
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False
    )
    start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return sum(text in row["answers"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def test_a_shipped_model_is_small_and_float32(shipped: tuple[Path, PreTrainedModel, Any]) -> None:
    folder, model, _ = shipped
    assert (folder / "model.safetensors").stat().st_size <= 6_000_000
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_a_shipped_model_speaks_the_words_of_the_world(shipped: tuple[Path, PreTrainedModel, Any]) -> None:
    _, model, tokenizer = shipped
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab() and len(tokenizer) <= model.config.vocab_size
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if model.config.is_encoder_decoder:
        assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    else:
        assert model.config.max_position_embeddings >= 512


def test_a_shipped_model_knows_the_favourites_and_leaves_room(shipped: tuple[Path, PreTrainedModel, Any]) -> None:
    _, model, tokenizer = shipped
    assert exact(model, tokenizer, rows_of("agree", count=100)) >= 0.80
    assert 0.15 <= exact(model, tokenizer, rows_of("conflict", count=100)) <= 0.70


def test_a_shipped_model_has_a_card_that_says_how_it_was_made(shipped: tuple[Path, PreTrainedModel, Any]) -> None:
    folder, model, _ = shipped
    card = (folder / "README.md").read_text()
    assert f"python -m adhere.toy.models --kind {folder.name}" in card
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card


def test_paraphrases_change_the_wording_and_not_the_story():
    for row in make_rows("conflict", "train", 60, seed=2):
        for text in paraphrases(row, 2):
            assert text != row["prompt"] and text.endswith(MARKER)
            assert set(text.split()) - set(row["prompt"].split()) <= set(" ".join(ARRIVALS).split())
            asked = row["prompt"].removesuffix(f" {MARKER}").rstrip(" ?.").rpartition(" . ")[2]
            assert asked in text and len(text.split(" . ")) == len(row["prompt"].split(" . "))
    assert paraphrases(row, 2) == paraphrases(row, 2)
