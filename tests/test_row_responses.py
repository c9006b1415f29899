"""What a row says of responses: conversations that end with the answer, parts of messages, each message of a fault."""

from __future__ import annotations

from typing import Any

import pytest

from adhere.row_files import Fault
from adhere.row_responses import answers, candidates, pair

USER, OTHER = {"role": "user", "content": "q"}, {"role": "user", "content": "r"}
GOOD = {"role": "assistant", "content": "good"}
SYSTEM = {"role": "system", "content": "be kind"}


def said(chosen: Any, prompt: Any = "q", rejected: Any = "bad") -> str | None:
    return pair({"chosen": chosen, "rejected": rejected}, prompt)[0]


@pytest.mark.parametrize(
    ("chosen", "prompt", "expected"),
    [
        ("good", "q", "good"),
        (None, "q", None),
        ([GOOD], "q", "good"),
        ([USER, GOOD], "q", "good"),
        ([SYSTEM, USER, GOOD], " q\n", "good"),
        ([USER, GOOD], [SYSTEM, USER], "good"),
        ([USER, GOOD, OTHER, GOOD], [USER, GOOD, OTHER], "good"),
        ([OTHER, GOOD], [USER, GOOD, OTHER], "good"),
        ([USER, GOOD], None, "good"),  # a prompt laid out from other fields
        ([{"role": "assistant", "content": [{"type": "text", "text": "go"}, {"text": "od"}]}], "q", "good"),
        ([{**GOOD, "tool_calls": [{"id": "1"}]}], "q", "good"),
    ],
)
def test_the_last_turn_of_a_conversation_is_the_response(chosen: Any, prompt: Any, expected: str | None) -> None:
    assert said(chosen, prompt) == expected


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([USER, GOOD, OTHER], "`chosen` ends with a turn of user, not of the assistant; end it with the response"),
        ([USER], "`chosen` ends with a turn of user"),
        ([GOOD, SYSTEM], "`chosen` ends with a turn of system"),
        ([], '`chosen` is an empty list; write text, e.g. "chosen": "…"'),
        (3, "`chosen` is a number; write text"),
        ({"role": "assistant", "content": "good"}, "`chosen` is an object; write text"),
        (["good"], "`chosen` 1 has no role"),
        ([USER, {"content": "good"}], "`chosen` 2 has no role"),
        ([USER, {"role": "bot", "content": "good"}], "`chosen` 2: unknown role 'bot'"),
        ([USER, {"role": "assistant"}], "`chosen` 2: `content` is null; write text"),
        ([USER, {"role": "assistant", "content": 3}], "`chosen` 2: `content` is a number"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "`chosen` 2 is a tool call without text"),
        ([{"role": "assistant", "content": [{"type": "image_url", "image_url": "…"}]}],
         "`chosen` 1: `content` holds a part of type 'image_url'; only text is read"),
        ([{"role": "assistant", "content": [{"type": "reasoning", "text": "…"}]}], "a part of type 'reasoning'"),
        ([{"role": "assistant", "content": ["good"]}], "`chosen` 1: `content` holds text; write text"),
        ([{"role": "assistant", "content": "a\ud800"}], "`content` holds half of a surrogate pair at character 2"),
        ("a\ud800", "`chosen` holds half of a surrogate pair"),
        ([OTHER, GOOD], "`chosen` answers another conversation than the prompt's; write the last turn alone"),
        ([USER, GOOD, OTHER, GOOD], "`chosen` answers another conversation"),
    ],
)  # fmt: skip
def test_what_is_no_response_says_what_to_write(chosen: Any, message: str) -> None:
    with pytest.raises(Fault) as caught:
        said(chosen)
    assert message in str(caught.value)


def test_both_responses_answer_the_same_conversation() -> None:
    assert said([USER, GOOD], rejected=[USER, {**GOOD, "content": "bad"}]) == "good"
    with pytest.raises(Fault, match="`chosen` and `rejected` answer different conversations"):
        said([USER, GOOD], rejected=[OTHER, GOOD])
    with pytest.raises(Fault, match="`rejected` ends with a turn of user"):
        said("good", rejected=[GOOD, USER])


def test_answers_and_candidates_in_each_form() -> None:
    assert answers({"answer": "a"}) == answers({"answers": ["a"]}) == answers({"gold": "a"}, "gold") == ("a",)
    assert answers({"answers": None, "answer": "a"}) == ("a",) and answers({}) == ()
    assert candidates({"candidates": ["a", {"response": "b", "reward": 1}]}) == ("a", "b") and candidates({}) == ()
