"""What the bench of faithfulness puts to a reward, and what it makes of the scores: text and arithmetic, no model."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adhere.errors import UserError
from adhere.faithfulness.candidates import Builder, Case, Question, holding, kind_of, occurrences
from adhere.faithfulness.settings import CONTROLS, SPLITS, BenchConfig, reward_of, with_controls
from adhere.faithfulness.summary import best, in_order, summarise
from adhere.reward.named import NAMED
from adhere.text import contains_answer, normalise_answer, sentences

RAILWAY = (
    "The Marlow Valley railway opened in 1868. Its chief engineer was Edith Crane, who designed the stone viaduct. The "
    "money came from Samuel Holt, a wool merchant."
)
HARBOUR = "Kelm Point has a lighthouse. Tobias Raine built it in 1887. Whale oil burned there until the winter of 1921."
QUESTIONS = [
    Question(RAILWAY, "When did the railway open?", ("1868", "in 1868")),
    Question(RAILWAY, "Who designed the viaduct?", ("Edith Crane",)),
    Question(RAILWAY, "Who paid?", ("Samuel Holt", "a wool merchant")),
    Question(HARBOUR, "Who built the lighthouse?", ("Tobias Raine",)),
    Question(HARBOUR, "When was it built?", ("1887",)),
    Question(HARBOUR, "What burned?", ("whale oil",)),
]


def cases(question: Question, questions: list[Question] = QUESTIONS, **options: object) -> dict[str, Case]:
    return {case.split: case for case in Builder.of(questions, BenchConfig(**options)).cases(question)}


def wrong(case: Case) -> dict[str, str]:
    return {candidate.kind: candidate.response for candidate in case.candidates if not candidate.right}


def test_the_cases_of_a_question_by_hand() -> None:
    found = cases(QUESTIONS[1])
    assert list(found) == ["unchanged", "swapped", "distractor", "unanswerable"]
    # The only other name on another passage.
    assert wrong(found["unchanged"])["same kind"] == "Tobias Raine"
    assert wrong(found["unchanged"])["elsewhere"] in ("1887", "whale oil")
    assert wrong(found["unchanged"])["empty"] == ""
    assert found["swapped"].context == RAILWAY.replace("Edith Crane", "Tobias Raine")
    assert found["swapped"].answers == ("Tobias Raine",) and wrong(found["swapped"]) == {"old answer": "Edith Crane"}
    assert [c.response for c in found["distractor"].candidates] == ["Edith Crane", "1868", "Samuel Holt"]
    assert found["unanswerable"].context == (
        "The Marlow Valley railway opened in 1868. The money came from Samuel Holt, a wool merchant."
    )
    assert [c.response for c in found["unanswerable"].candidates] == ["The passage does not say.", "Edith Crane"]


def test_an_answer_is_swapped_as_it_stands_in_the_passage() -> None:
    found = cases(QUESTIONS[5], [*QUESTIONS, Question("He kept red wine.", "What?", ("red wine",))])["swapped"]
    assert "Red wine burned there" in found.context  # it begins a sentence
    assert wrong(found) == {"old answer": "Whale oil"}


def test_every_accepted_answer_is_swapped_the_longer_first() -> None:
    found = cases(QUESTIONS[0])["swapped"]
    assert "opened 1887." in found.context and "in 1868" not in found.context
    assert "Tobias Raine, Tobias Raine." in cases(QUESTIONS[2])["swapped"].context


def test_a_sentence_lends_its_words_without_its_full_stop() -> None:
    one = Question("Ann left. He ran away.", "What did he do?", ("He ran away.",))
    other = Question("Bo slept. She sang a song.", "What did she do?", ("She sang a song.",))
    assert cases(one, [one, other])["swapped"].context == "Ann left. She sang a song."


def test_what_has_no_place_in_a_split_is_not_in_it() -> None:
    implicit = Question(HARBOUR, "How did the keeper feel?", ("lonely",))
    alone = Question("Nothing else. Only this.", "What?", ("Only this",))
    assert list(cases(implicit, [*QUESTIONS, implicit])) == ["unchanged", "distractor"]
    assert list(cases(alone, [alone])) == ["unchanged", "unanswerable"]
    assert wrong(cases(alone, [alone])["unchanged"]) == {"empty": ""}
    named = Question("Ann sat in the garden. Garden paths are wet.", "Where?", ("the garden",))
    assert "swapped" not in cases(named, [*QUESTIONS, named])  # the old answer would still be there
    short = Question("Only this.", "What?", ("Only this",))
    assert "unanswerable" not in cases(short, [short])  # nothing would be left to read


def test_another_wording_of_the_answer_is_no_distractor() -> None:
    told = "He prays for forgiveness of his sins every day."
    first = Question(told, "What for?", ("forgiveness of his sins",))
    others = [
        Question(told, f"{n}?", (text,)) for n, text in enumerate(("for his sins' forgiveness", "sins", "every day"))
    ]
    assert wrong(cases(first, [first, *others])["distractor"]) == {"distractor": "every day"}


NAMES = ("Ann", "Bo Lind", "the Vatican", "Carl")
LOWER = ("red wine", "old maps", "sheep", "a tall tower")
DATES = ("1868", "May 1921", "in 1519")
COUNTS = ("12", "three", "4.5 %")
answer = st.sampled_from(NAMES + LOWER + DATES + COUNTS)


@st.composite
def passages(draw: st.DrawFn) -> list[Question]:
    """Two to four passages of three sentences, a question on each of them."""
    found = []
    for number in range(draw(st.integers(2, 4))):
        answers = draw(st.lists(answer, min_size=3, max_size=3))
        context = " ".join(f"In place {number} stands {text} here." for text in answers)
        found += [Question(context, f"What stands at {n}?", (text,)) for n, text in enumerate(dict.fromkeys(answers))]
    return found


@given(passages(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_makes_no_difference(questions: list[Question], seed: int, rng: random.Random) -> None:
    def made(order: list[Question]) -> dict[Question, list[object]]:
        builder = Builder.of(order, BenchConfig(seed=seed))
        plain = lambda case: replace(case, candidates=tuple(sorted(case.candidates, key=repr)))  # noqa: E731
        return {question: [plain(case) for case in builder.cases(question)] for question in order}

    assert made(questions) == made(rng.sample(questions, len(questions)))


@given(passages())
def test_a_swapped_passage_supports_the_new_answer_and_no_old_one(questions: list[Question]) -> None:
    for question in questions:
        if case := cases(question, questions).get("swapped"):
            (new,) = case.answers
            assert contains_answer(case.context, [new]) and not contains_answer(case.context, question.answers)
            assert not contains_answer(question.context, [new])
            assert kind_of(new) == kind_of(question.answers[0])
            places = [len(occurrences(text, known)) for text, known in
                      ((question.context, question.answers), (case.context, [new]))]  # fmt: skip
            assert places[0] == places[1] > 0
            assert occurrences(case.context, [new])[0][0] == occurrences(question.context, question.answers)[0][0]


@given(passages())
def test_without_its_sentence_the_answer_is_gone_and_the_rest_is_there(questions: list[Question]) -> None:
    for question in questions:
        if case := cases(question, questions).get("unanswerable"):
            assert not contains_answer(case.context, question.answers)
            left = Counter(case.context[a:b] for a, b in sentences(case.context))
            spans, holds = holding(question.context, question.answers)
            kept = [question.context[a:b] for (a, b), gone in zip(spans, holds, strict=True) if not gone]
            assert left == Counter(kept)


@given(passages())
def test_exactly_one_candidate_is_right_and_no_wrong_one_could_be(questions: list[Question]) -> None:
    for question in questions:
        for case in cases(question, questions).values():
            assert [c.right for c in case.candidates] == [True] + [False] * (len(case.candidates) - 1)
            assert len({normalise_answer(c.response) for c in case.candidates}) == len(case.candidates)
            right = case.candidates[0].response
            for candidate in case.candidates[1:]:
                assert not contains_answer(right, [candidate.response or "nothing"])


def test_an_answer_is_found_as_words_in_any_script() -> None:
    assert occurrences("A redcar, a red car.", ["red car"]) == [(12, 19)]
    assert occurrences("店主は花园に", ["花园"]) == [(3, 5)]
    assert occurrences("It costs 3.50, not 3.", ["3"]) == [(9, 10), (19, 20)]
    assert occurrences("nothing", ["…"]) == [] == occurrences("", ["x"])


def test_settings_that_make_no_sense_are_told_together() -> None:
    with pytest.raises(UserError, match=r"unknown split 'swaped'.*did you mean swapped"):
        BenchConfig(splits=("swaped",))
    with pytest.raises(UserError, match=r"splits is empty; name some of unchanged.*refusal is empty"):
        BenchConfig(splits=(), refusal=" ")


def test_every_table_has_the_default_and_the_controls() -> None:
    found = with_controls({"grounding": reward_of("grounding"), "overlap": reward_of("overlap")})
    assert list(found) == ["grounding", "overlap", "attention", *(name for name in CONTROLS if name != "overlap")]
    assert found["attention"] == NAMED["attention"]
    # A control is the bare signal, though a reward with gates is called the same.
    assert found["overlap"].gates == () and found["overlap"].normalise == "none" != NAMED["overlap"].normalise
    with pytest.raises(UserError, match="reward"):
        reward_of("no such thing")


def record(question: int, split: str, scored: list[tuple[str, bool, dict[str, float]]], **about: object) -> dict:
    marks = {"response": "", "ended": True}
    candidates = [{**marks, "kind": kind, "right": ok, "true": ok, "scores": scores} for kind, ok, scores in scored]
    passage = f"p{question // 2}"  # two questions a passage
    return {"candidates": candidates, "bench": {"question": question, "passage": passage, "split": split, **about}}


def test_pairs_in_order_by_hand() -> None:
    records = [
        record(0, "distractor", [("right", True, {"a": 2.0, "b": 0.0}), ("distractor", False, {"a": 1.0, "b": 0.0}),
                                 ("distractor", False, {"a": 3.0, "b": 0.0})]),
        record(1, "distractor", [("right", True, {"a": 2.0, "b": 0.0}), ("distractor", False, {"a": 1.0, "b": 1.0})]),
        record(1, "unchanged", [("right", True, {"a": 2.0, "b": 0.0}), ("empty", False, {"a": 1.0, "b": 1.0}),
                                ("elsewhere", False, {"a": 9.0, "b": 1.0})]),
    ]  # fmt: skip
    found = summarise(records)
    # Questions: 1 of 2 pairs, then 1 of 1; two ties, then none in order.
    assert found.pairs["distractor"]["a"].mean == 0.75 and found.pairs["distractor"]["b"].mean == 0.25
    assert found.differences["a"]["distractor"]["b"].mean == 0.5 == -found.differences["b"]["distractor"]["a"].mean
    assert found.pairs["empty"]["a"].mean == 1.0 and found.pairs["elsewhere"]["a"].mean == 0.0
    assert found.cases == {"distractor": 2, "unchanged": 1} and found.questions == 2
    # One passage: all draws are the same passage.
    assert (found.pairs["distractor"]["a"].low, found.pairs["distractor"]["a"].high) == (0.75, 0.75)
    assert "samples" not in found.pairs and found.choices == {}


def said(right: bool, true: bool) -> dict[str, object]:
    return {"response": "", "right": right, "true": true}


def test_correction_agreement_and_resistance_by_hand() -> None:
    """Question 0 is not known and mended by reading; 1 is known, and one of two samples forgets it; on its swapped
    passage the reward likes the sample that follows the passage."""
    one = [("sample", True, {"a": 1.0}), ("sample", False, {"a": 0.0})]
    records = [
        record(0, "samples", one, prior=said(False, False), greedy=said(False, False)),
        record(1, "samples", one[::-1], prior=said(True, True), greedy=said(True, True)),
        record(1, "swapped-samples", one, prior=said(False, True), greedy=said(False, True)),
    ]
    for candidate, true in zip(records[2]["candidates"], (False, True), strict=True):
        candidate["true"] = true
    found = {
        figure: {name: e.mean for name, e in named.items()} for figure, named in summarise(records).choices.items()
    }
    assert found["correction"] == {"a": 1.0, "greedy": 0.0, "sample": 0.5}
    assert found["agreement"] == {"a": 1.0, "greedy": 1.0, "sample": 0.5}
    assert found["resistance"] == {"a": 0.0, "greedy": 1.0, "sample": 0.5}
    assert found["swapped best of n"] == {"a": 1.0, "greedy": 0.0, "sample": 0.5}
    assert found["accuracy"] == {"a": 1.0, "greedy": 0.5, "sample": 0.5}
    records[0]["candidates"][0]["ended"] = False
    assert summarise(records).cut_off == pytest.approx(1 / 6)


def test_best_of_n_is_over_questions_that_leave_a_choice() -> None:
    def of(question: int, marks: str) -> dict:
        scored = [("sample", mark == "r", {"a": float(n)}) for n, mark in enumerate(marks)]
        return record(question, "samples", scored, prior=said(False, False), greedy=said(False, False))

    found = summarise([of(0, "rrr"), of(1, "www"), of(2, "wwr"), of(3, "rrw")])
    assert (found.choices["best of n"]["a"].mean, found.choices["best of n"]["a"].n) == (0.5, 2)
    assert found.choices["accuracy"]["a"].mean == 0.5 and found.choices["accuracy"]["a"].n == 4
    assert found.pairs["samples"]["a"].n == 2


def test_evidence_counts_the_right_answer_and_the_samples() -> None:
    def looked(record: dict, *hits: bool) -> dict:
        for candidate, hit in zip(record["candidates"], hits, strict=True):
            candidate["evidence_hit"] = {"copy heads": hit, "all heads": False}
        return record

    scored = [("right", True, {"a": 0.0}), ("empty", False, {"a": 0.0})]
    own = [("sample", False, {"a": 0.0})] * 2
    told = {"holding": 0.25, "prior": said(False, False), "greedy": said(False, False)}
    records = [
        looked(record(0, "unchanged", scored, holding=0.25), True, False),
        looked(record(0, "samples", own, **told), True, False),
    ]
    found = {kind: {k: e.mean for k, e in named.items()} for kind, named in summarise(records).evidence.items()}
    assert found == {
        "answer": {"copy heads": 1.0, "all heads": 0.0, "chance": 0.25},
        "samples": {"copy heads": 0.5, "all heads": 0.0, "chance": 0.25},
    }


def test_figures_survive_the_file() -> None:
    records = [
        record(n, "distractor", [("right", True, {"a": 1.0}), ("distractor", False, {"a": float(n)})]) for n in range(4)
    ]
    assert summarise(json.loads(json.dumps(records))).to_json() == summarise(records).to_json()


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1))
def test_a_reward_turned_round_orders_the_other_way_round(scored: list[tuple[int, bool]]) -> None:
    def share(sign: int) -> float | None:
        return in_order(*([sign * float(score) for score, mark in scored if mark == kind] for kind in (True, False)))

    if (one := share(1)) is not None:
        assert one + (share(-1) or 0.0) == pytest.approx(1.0)
    assert 0 <= best([float(score) for score, _ in scored], [mark for _, mark in scored]) <= 1


def test_all_splits_are_made_unless_told_otherwise() -> None:
    assert BenchConfig().splits == SPLITS
