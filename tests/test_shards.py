"""Parts: cut at batches, done in any order, again and resumed, they are the lines of one process. No Ray here."""

from __future__ import annotations

import csv
import json
import random
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from adhere.cli import main
from adhere.commands import rank as rank_command
from adhere.commands import score as score_command
from adhere.commands.common import reward_config
from adhere.commands.parser import Parser
from adhere.commands.sharded import copy_heads
from adhere.data import Row, iter_rows
from adhere.errors import RunFailed, UserError
from adhere.model.policy import Policy
from adhere.ranking import _groups, group_starts, scattered
from adhere.ranking_settings import RankConfig
from adhere.resume import JOURNAL
from adhere.row_files import positions
from adhere.shards import AIM, MOST, SUCCESS, ShardedRows, shard_rows
from adhere.toy import make_rows, model_path

MODEL = str(model_path("causal"))
STORIES = make_rows("conflict", "test", 12)
RESPONSES = [{**row, "response": word} for row in STORIES for word in ("garden", "office", "kitchen")]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(command, *more):
    parser = Parser()
    command.arguments(parser)
    return parser.parse_args(["--model", MODEL, "--device", "cpu", *map(str, more)])


def joined(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))


def done_in_parts(output, make, source, starts, total):
    """As workers do it: in some order, one part twice."""
    work = make()
    parts = output.begin(str(source), starts, total)
    random.Random(0).shuffle(parts)
    for part in [parts[0], *parts]:
        written = work(part)
        output.add({**written, "attempts": part.attempt(output.folder)})
    output.finish(total)
    return parts


def scored_in_parts(source, folder, size=6, batch=4, reward="attention"):
    given = options(score_command.SCORE, "--input", source, "--output", folder, "--batch-size", batch)
    spec = reward_config(reward)
    rows = partial(iter_rows, source, need=("response",))
    output = ShardedRows(folder, {})
    heads = copy_heads(given, spec, rows)
    make = partial(score_command.scorer, given, spec, heads, output.rows_file(str(source)), output.folder)
    starts, _ = group_starts(rows(), batch, size)
    return done_in_parts(output, make, source, starts, len(list(rows())))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_scored_in_parts_the_lines_are_those_of_one_process(tmp_path, kind):
    source, whole = tmp_path / f"rows.{kind}", tmp_path / "whole"
    rows = [{"prompt": row["prompt"], "response": row["response"], "n": i} for i, row in enumerate(RESPONSES)]
    if kind == "jsonl":  # a byte order mark, blank lines, Windows line ends
        lines = [json.dumps(row) for row in rows]
        source.write_bytes(
            b"\xef\xbb\xbf" + "\r\n\n".join(lines[:7]).encode() + b"\n  \n" + "\n".join(lines[7:]).encode()
        )
    elif kind == "csv":
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response", "n"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    given = ["score", "--model", MODEL, "--input", str(source), "--device", "cpu", "--batch-size", "4", "--quiet"]
    assert main([*given, "--output", str(whole)]) == 0
    parts = scored_in_parts(source, tmp_path / "out")
    assert len(parts) > 3 and all(part.rows % 3 == 0 for part in parts)  # no group is cut
    assert joined(tmp_path / "out") == whole.read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {SUCCESS, *(f"part-{n:05d}.jsonl" for n in range(len(parts)))}
    told = json.loads((tmp_path / "out" / SUCCESS).read_text())
    assert told["rows"] == told["lines"] == 36 and sum(part["rows"] for part in told["parts"]) == 36


@pytest.mark.parametrize("keep", ["best", "pairs"])
def test_ranked_in_parts_the_lines_are_those_of_one_process(tmp_path, keep):
    source = jsonl(tmp_path / "rows.jsonl", STORIES)
    given = ["rank", "--model", MODEL, "--prompts", str(source), "--device", "cpu", "--quiet", "--keep", keep]
    given += ["--batch-size", "3", "--num-samples", "4", "--max-new-tokens", "6"]
    assert main([*given, "--output", str(tmp_path / "whole")]) == 0
    parsed = options(rank_command.RANK, "--prompts", source, "--output", tmp_path / "out")
    config = RankConfig(
        num_samples=4, keep=keep, batch_size=3, sampling=RankConfig().sampling.__class__(max_new_tokens=6)
    )
    spec = reward_config("attention")
    output = ShardedRows(tmp_path / "out", {})
    rows = partial(iter_rows, source)
    heads = copy_heads(parsed, spec, rows)
    make = partial(
        rank_command.ranker, parsed, config, spec, heads, False, output.rows_file(str(source)), output.folder
    )
    done_in_parts(output, make, source, range(0, 12, 3), 12)
    assert joined(tmp_path / "out") == (tmp_path / "whole").read_bytes()


def test_what_was_written_is_read_again_as_a_folder(tmp_path):
    scored_in_parts(jsonl(tmp_path / "rows.jsonl", RESPONSES), tmp_path / "out", reward="certainty")
    found = list(iter_rows(tmp_path / "out"))
    assert [row.prompt for row in found] == [row["prompt"] for row in RESPONSES]


prompts = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40)


@drawn(prompts, st.integers(1, 6), st.integers(1, 12))
def test_parts_begin_where_a_batch_of_the_whole_file_does(letters, batch, size):
    rows = [Row(letter) for letter in sorted(letters)]
    starts, groups = group_starts(rows, batch, size)
    assert {0, *starts} <= {places[0] for places in _groups(rows, batch)}
    assert groups == len(set(letters)) and starts[0] == 0
    assert all(after - before >= size for before, after in pairwise(starts))


@drawn(prompts)
def test_a_prompt_that_comes_again_is_found(letters):
    rows = [Row(letter, where=str(place)) for place, letter in enumerate(letters)]
    again = [
        place
        for place in range(1, len(rows))
        if letters[place] != letters[place - 1] and letters[place] in letters[:place]
    ]
    found = scattered(lambda: rows)
    assert (found is None) == (not again)
    if found is not None:
        assert found[0].where == str(again[0]) and found[1].where == str(letters.index(letters[again[0]]))


@drawn(st.lists(st.sampled_from(["{}", "", "  ", '{"a": 1}']), max_size=12), st.booleans(), st.booleans())
def test_places_are_where_the_rows_begin(tmp_path_factory, lines, mark, windows):
    path = tmp_path_factory.mktemp("places") / "rows.jsonl"
    data = (("\r\n" if windows else "\n").join(lines)).encode()
    path.write_bytes(b"\xef\xbb\xbf" * mark + data)
    expected = [n for n, line in enumerate(lines) if line.strip()]
    found = list(positions(path, range(len(expected))))
    assert [place.line for place in found] == expected
    for place, line in zip(found, expected, strict=True):
        rest = path.read_bytes()[place.byte :].removeprefix(b"\xef\xbb\xbf")
        assert rest.decode().splitlines()[0] == lines[line]


@pytest.mark.parametrize(
    ("total", "batch", "size"),
    [(1, 8, 8), (2000, 8, 8), (10_000, 8, 40), (10_000_000, 8, MOST), (10_000_000, 1000, 4000), (10, 9000, 9000)],
)
def test_a_part_is_whole_batches(total, batch, size):
    assert shard_rows(total, batch) == size
    assert total / size <= AIM or size + batch > MOST


def begun(tmp_path, settings=None, resume=False):
    output = ShardedRows(tmp_path / "out", settings or {"a": 1}, resume=resume)
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 4)
    return output, output.begin(str(source), [0, 2], 4)


def write(output, part, text="x"):
    output.add({**part.write(output.folder, [{"text": text}] * part.rows, {"sum": 1.0}), "attempts": 1})


def test_resumed_it_does_what_is_left(tmp_path):
    output, parts = begun(tmp_path)
    write(output, parts[1])
    with (output.folder / JOURNAL).open("a") as file:
        file.write('{"part": 0, "ro')  # what a process killed as it wrote leaves
    (output.folder / ".part-00000.jsonl.ab.partial").write_text("half")
    with pytest.raises(UserError, match="is unfinished"):
        begun(tmp_path)
    with pytest.raises(UserError, match="a was 1, is 2"):
        begun(tmp_path, {"a": 2}, resume=True)
    output, parts = begun(tmp_path, resume=True)
    assert [part.number for part in parts] == [0] and output.rows_done() == 2
    write(output, parts[0])
    output.finish(4)
    assert output.tally() == {"sum": 2.0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        SUCCESS,
        "part-00000.jsonl",
        "part-00001.jsonl",
    ]
    with pytest.raises(UserError, match="already exists"):
        begun(tmp_path)


def test_a_part_that_is_not_as_it_was_written_is_told(tmp_path):
    output, parts = begun(tmp_path)
    for part in parts:
        write(output, part)
    (output.folder / "part-00001.jsonl").write_text("")
    with pytest.raises(RunFailed, match=r"part-00001.jsonl: is not as it was written"):
        output.finish(4)
    assert not (tmp_path / "out").exists()


def test_a_part_done_again_takes_the_place_of_the_first(tmp_path):
    output, parts = begun(tmp_path)
    for text in ("first", "second"):
        for part in parts:
            write(output, part, text)
    output.finish(4)
    assert joined(tmp_path / "out") == b'{"text": "second"}\n' * 4


def test_nothing_to_resume_and_damage_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        begun(tmp_path, resume=True)
    output, _ = begun(tmp_path)
    (output.folder / JOURNAL).write_text("{\n")
    with pytest.raises(UserError, match="damaged"):
        begun(tmp_path, resume=True)


def test_a_policy_is_loaded_by_each_worker_alone(tmp_path, monkeypatch):
    """Copy heads come from outside: a worker that measured its own would score its rows by other weights."""
    source = jsonl(tmp_path / "rows.jsonl", RESPONSES)
    given = options(score_command.SCORE, "--input", source, "--output", tmp_path / "out")
    spec = reward_config("attention")
    heads = copy_heads(given, spec)
    assert heads is not None
    monkeypatch.setattr("adhere.reward.reward.copy_heads", lambda *_: pytest.fail("measured by a worker"))
    monkeypatch.setattr(Policy, "reference", lambda *_: pytest.fail("a second copy of the model"))
    output = ShardedRows(tmp_path / "out", {})
    work = score_command.scorer(given, spec, heads, output.rows_file(str(source)), output.folder)
    for part in output.begin(str(source), [0, 18], 36):
        assert work(part)["lines"] == 18
