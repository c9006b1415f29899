"""Pairs that teach nothing: found in each form, counted, told once, and never the whole of what is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adhere.cli import main
from adhere.data import Row
from adhere.errors import UserError
from adhere.row_pairs import pair_fault, sound_pairs
from tests.families import save

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Where is Mary?"}]


@pytest.mark.parametrize(
    ("chosen", "rejected", "fault"),
    [
        ("garden", "hall", None),
        ("garden", "", None),
        ("garden", "Where is Mary?", None),
        ("Garden", "garden", None),
        ("garden", "garden", "with two equal texts"),
        ("garden ", " garden\n", "with two equal texts"),
        ("the  garden", "the\ngarden", "with two equal texts"),
        ("", " ", "with two equal texts"),
        (" ", "garden", "with an empty `chosen`"),
        ("Where is  Mary?\n", "garden", "whose `chosen` repeats the prompt (write what comes after it)"),
        ("Where is Mary? garden", "Where is Mary? hall", "whose `chosen` repeats the prompt"),
        ("Where is Mary?\n\ngarden", "hall", "whose `chosen` repeats the prompt"),
        ("I ask: Where is Mary?", "hall", None),
    ],
)
def test_what_a_pair_teaches(chosen: str, rejected: str, fault: str | None) -> None:
    for prompt in ("Where is Mary?", CHAT):
        found = pair_fault(Row(prompt, chosen=chosen, rejected=rejected))
        assert found is None if fault is None else (found or "").startswith(fault)


def test_a_greeting_may_open_a_response() -> None:
    assert pair_fault(Row("Hello", chosen="Hello, friend", rejected="Hello")) is None
    assert pair_fault(Row("Hello", chosen="Hello", rejected="Bye")) is not None


def test_they_are_left_out_counted_and_told_once() -> None:
    good = [Row(f"q{n}", chosen="a", rejected="b") for n in range(3)]
    bad = [Row("q", chosen="a", rejected="a", where=f"p.jsonl:{n}") for n in (4, 7)]
    told: list[str] = []
    echo = Row("q", chosen="q", rejected="b", where="p.jsonl:9")
    assert sound_pairs([good[0], *bad, *good[1:], echo], told.append) == good
    assert told == [
        "3 of 6 pairs are left out: 2 with two equal texts, the first: p.jsonl:4; "
        "1 whose `chosen` repeats the prompt (write what comes after it), the first: p.jsonl:9"
    ]
    assert sound_pairs(good, told.append) == good and sound_pairs([], told.append) == [] and len(told) == 1
    with pytest.raises(
        UserError, match=r"none of 2 pairs teaches anything: 2 with two equal texts, the first: p\.jsonl:4"
    ):
        sound_pairs(bad, told.append)
    with pytest.warns(UserWarning, match="2 of 5 pairs are left out"):
        sound_pairs([*good, *bad])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_reward_model_is_not_fitted_to_them(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    model, pairs = save(family, tmp_path / "model"), tmp_path / "pairs.jsonl"
    same = [{"prompt": f"w{n} ?", "chosen": "w1", "rejected": "w1 "} for n in range(3)]
    options = ["--model", str(model), "--pairs", str(pairs), "--device", "cpu", "--steps", "1", "--held-out", "0"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in same))
    assert main(["preferences", "fit", *options, "--output", str(tmp_path / "none")]) == 2
    assert f"none of 3 pairs teaches anything: 3 with two equal texts, the first: {pairs}:1" in _line(capsys)
    assert not (tmp_path / "none").exists()
    rows = [*same, {"prompt": "w9 ?", "chosen": "w1", "rejected": "w2"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["preferences", "fit", *options, "--output", str(tmp_path / "one"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pairs"] == 1 and " ".join(err.split()).count("3 of 4 pairs are left out") == 1


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())
