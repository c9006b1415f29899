"""Real rows, where they are: skipped in a clone that has no `../shared/data`."""

from __future__ import annotations

from pathlib import Path

import pytest

from adhere.data import read_rows

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = {"babi": "answers", "fairytaleqa": "answers", "squad_xquad": "answers", "self_instruct": "response"}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data here")


@pytest.mark.parametrize(("name", "known"), SETS.items())
def test_every_row_of_a_real_set_is_read(name: str, known: str) -> None:
    for file in sorted((DATA / name).glob("*.jsonl")):
        rows = read_rows(file)
        assert len(rows) == len(file.read_text().splitlines())
        for row in rows:
            assert isinstance(row.prompt, str) and row.prompt.strip()
            assert getattr(row, known) or name == "self_instruct"
            # The whole question and the whole context stand in the prompt, in the layout of their kind.
            asked = row.fields.get("question", row.fields.get("instruction"))
            assert asked in row.prompt and row.fields["context"].strip() in row.prompt
