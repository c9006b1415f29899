"""`--engine ray`, by Ray itself: the lines of one process, whoever dies; one clear line where it cannot be done."""

from __future__ import annotations

import json
import os
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from adhere.cli import main
from adhere.errors import RunFailed
from adhere.integrations import ray as integration
from adhere.shards import SUCCESS, ShardedRows
from adhere.toy import make_rows, model_path
from tests.test_shards import RESPONSES, joined, jsonl

ROOT = Path(__file__).parents[1]
ROW = {"prompt": "where is mary ?", "response": "garden"}
OTHER = {"prompt": "where is john ?", "response": "office"}

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def ray():
    """Ray on two cores, for as long as this module runs; what its workers import is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        with integration.cluster(cores=2):
            yield


def given(command, source, output, *more):
    rows = "--prompts" if command == "rank" else "--input"
    options = ["--model", str(model_path("causal")), rows, str(source), "--output", str(output), "--device", "cpu"]
    return [command, *options, *more]


def run(command, source, output, *more, workers=2):
    return main([*given(command, source, output, *more), "--engine", "ray", "--workers", str(workers)])


@needs_ray
@pytest.mark.slow
def test_scored_by_two_workers_the_lines_are_those_of_one_process(ray, tmp_path, capfd):
    source = jsonl(tmp_path / "rows.jsonl", RESPONSES)
    small = ["--batch-size", "3"]
    assert main([*given("score", source, tmp_path / "whole", *small), "--quiet"]) == 0
    capfd.readouterr()
    assert run("score", source, tmp_path / "out", *small, "--json", "--quiet") == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["rows"] == 36 and shown.err == ""
    assert joined(tmp_path / "out") == (tmp_path / "whole").read_bytes()
    assert len(json.loads((tmp_path / "out" / SUCCESS).read_text())["parts"]) == 12


def kill_one_at_work(output):
    """Kill one of two workers in the middle of a part; none if they are not both known, and at work just now."""
    found = sorted({written["pid"] for written in output.done.values()})
    for worker in found:
        os.kill(worker, signal.SIGSTOP)
    begun = {path.name.removesuffix(".attempts") for path in output.work.glob("part-*.attempts")}
    at_work = [name for name in begun if not (output.folder / name).exists()]
    victims = found[:1] if len(found) == len(at_work) == 2 else []
    for worker in found:
        os.kill(worker, signal.SIGKILL if worker in victims else signal.SIGCONT)
    return victims


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_loses_no_row(ray, tmp_path, monkeypatch, capfd):
    source = jsonl(tmp_path / "stories.jsonl", make_rows("conflict", "test", 120))
    options = ["--max-new-tokens", "6", "--batch-size", "4", "--keep", "all"]
    assert main([*given("rank", source, tmp_path / "whole", *options), "--quiet"]) == 0
    killed = []
    add = ShardedRows.add

    def add_and_kill(self, written):
        add(self, written)
        if len(self.done) >= 2 and not killed:
            killed.extend(kill_one_at_work(self))

    monkeypatch.setattr(ShardedRows, "add", add_and_kill)
    capfd.readouterr()
    assert run("rank", source, tmp_path / "out", *options) == 0
    shown = capfd.readouterr()
    assert killed and "begun again" in shown.err and "raylet" not in shown.out + shown.err
    assert joined(tmp_path / "out") == (tmp_path / "whole").read_bytes()


@needs_ray
@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_lines(ray, tmp_path, monkeypatch, capfd):
    source = jsonl(tmp_path / "stories.jsonl", make_rows("conflict", "test", 24))
    options = ["--max-new-tokens", "6", "--batch-size", "4", "--reward", "certainty"]
    assert main([*given("rank", source, tmp_path / "whole", *options), "--quiet"]) == 0
    add = ShardedRows.add

    def add_and_stop(self, written):
        add(self, written)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ShardedRows, "add", add_and_stop)
            assert run("rank", source, tmp_path / "out", *options) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted at row 4 of 24; the same command with --resume" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("rank", source, tmp_path / "out", *options) == 2
    assert "is unfinished" in capfd.readouterr().err
    assert run("rank", source, tmp_path / "out", *options, "--resume") == 0
    assert joined(tmp_path / "out") == (tmp_path / "whole").read_bytes()


@needs_ray
@pytest.mark.slow
def test_bad_work_of_a_worker_is_one_clear_line(ray, tmp_path, monkeypatch, capfd):
    (tmp_path / "own_reward.py").write_text("def shape(evidence):\n    return evidence.reading.logprobs\n")
    monkeypatch.chdir(tmp_path)  # where a worker finds it too
    source = jsonl(tmp_path / "rows.jsonl", RESPONSES)
    assert run("score", source, tmp_path / "out", "--quiet", "--reward", "own_reward:shape", workers=1) == 2
    error = capfd.readouterr().err
    assert "'own_reward:shape' returned" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def in_parts(tmp_path, work, resume=False):
    """Six rows in three parts, done by `work(part, folder)`."""
    output = ShardedRows(tmp_path / "out", {}, resume=resume)
    parts = output.begin(str(jsonl(tmp_path / "rows.jsonl", [ROW] * 6)), [0, 2, 4], 6)
    folder = output.folder

    def make():
        return lambda part: work(part, folder)

    for _ in integration.do_shards(make, parts, output, 1, gpu=False):
        pass
    output.finish(6)
    return output


@needs_ray
@pytest.mark.slow
def test_a_part_that_kills_every_worker_ends_the_run_and_the_rest_is_kept(ray, tmp_path):
    mended = tmp_path / "mended"

    def work(part, folder):
        if part.number == 1 and not mended.exists():
            os._exit(1)
        return part.write(folder, [{"row": part.first + n} for n in range(part.rows)], {})

    with pytest.raises(RunFailed, match=r"part 1 \(rows 3 to 4\) failed 3 times: its worker died"):
        in_parts(tmp_path, work)
    assert not (tmp_path / "out").exists()
    mended.touch()
    assert in_parts(tmp_path, work, resume=True).rows_done() == 6
    assert [json.loads(line)["row"] for line in joined(tmp_path / "out").splitlines()] == list(range(6))


@needs_ray
@pytest.mark.slow
def test_a_part_that_fails_is_tried_again_and_then_told(ray, tmp_path):
    def work(part, folder):
        seen = folder / ".work" / f"seen{part.number}"
        if part.number == 2 or (part.number == 0 and not seen.exists()):
            seen.touch()
            raise OSError("the disk was away")
        return part.write(folder, [{}] * part.rows, {})

    with pytest.raises(RunFailed, match=r"part 2 \(rows 5 to 6\) failed 3 times: OSError: the disk was away"):
        in_parts(tmp_path, work)
    kept = ShardedRows(tmp_path / "out", {}, resume=True).done
    assert {number: written["attempts"] for number, written in kept.items()} == {0: 2, 1: 1}


@needs_ray
def test_more_workers_than_cores_are_refused_before_anything_is_written(ray, tmp_path, capfd):
    source = jsonl(tmp_path / "rows.jsonl", RESPONSES)
    assert run("score", source, tmp_path / "out", "--reward", "overlap", workers=3) == 2
    assert "3 workers need a CPU each, and Ray has 2; set --workers to 2 or less" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@needs_ray
@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([ROW, OTHER, ROW], [], "rows.jsonl:3: the prompt of "),
        ([ROW, {"prompt": "a"}, {"text": "a"}], [], "rows.jsonl:2: no `response`"),
        ([ROW, {"prompt": "mary " * 3000, "response": "a"}], [], "rows.jsonl:2: the prompt has 3000 tokens"),
        ([ROW], ["--workers", "0"], "--workers: 0 is too small"),
        ([ROW], ["--batch-size", "0"], "--batch-size: 0 is too small"),
        ([ROW], ["--resume"], "nothing to resume"),
        ([ROW], ["--engine", "local", "--workers", "2"], "--workers without --engine ray"),
        ([ROW], ["--engine", "local", "--resume"], "--resume goes on with what --engine ray left"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, rows, flags, message):
    source = jsonl(tmp_path / "rows.jsonl", rows)
    assert main([*given("score", source, tmp_path / "out"), "--engine", "ray", *flags]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@needs_ray
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path, capfd, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    source = jsonl(tmp_path / "rows.jsonl", RESPONSES)
    assert run("score", source, tmp_path / "out", "--reward", "overlap") == 2
    assert f"RAY_ADDRESS={address}: no Ray cluster there" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("command", ["score", "rank"])
def test_without_ray_the_line_that_installs_it_is_told(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(integration, "find_spec", lambda name: None)
    source = jsonl(tmp_path / "rows.jsonl", [ROW])
    assert run(command, source, tmp_path / "out") == 2
    assert "Ray is not installed, and --engine ray needs it; pip install 'adhere[ray]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
