"""One output, one writer: the other is refused in a line that names the process; a killed owner holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adhere.cli import main
from adhere.commands import COMMANDS
from adhere.errors import UserError
from adhere.locking import writing

HOLD = """
import sys, time
from adhere.locking import writing
with writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=-1, text=True, env=environment) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        try:
            yield owner
        finally:
            owner.kill()


LINES = {
    "score": "--model m --input none.jsonl",
    "rank": "--model m --prompts none.jsonl",
    "check": "--model m --input none.jsonl",
    "inspect": "--model m --prompt w1",
    "calibrate": "--model m --pairs none.jsonl",
    "heads": "--model m",
    "preferences make": "--model m --prompts none.jsonl",
    "preferences fit": "--model m --pairs none.jsonl",
    "eval": "--model m --prompts none.jsonl",
    "audit": "--model m --prompts none.jsonl",
    "bench": "--model m --data none.jsonl",
    "train": "--model m --prompts none.jsonl",
    "demo": "",
    "compare": "none.yaml",
}


def test_every_command_that_writes_an_output_is_refused_while_another_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name.split()[0] for name in LINES} | {"serve"} == COMMANDS.keys()
    out = tmp_path / "out"
    settings = tmp_path / "run.yaml"
    settings.write_text(f"output: {out}\nmodel: m\nprompts: none.jsonl\n")
    lines = [[*name.split(), *words.split(), "--output", str(out)] for name, words in LINES.items()]
    lines.append(["train", "--config", str(settings)])  # the output is told in the file
    with held(out) as owner:
        for line in lines:
            assert main(line) == 2, line
            told = f"error: {out}: process {owner.pid} is writing it; wait for it, or choose another --output\n"
            assert capsys.readouterr().err == told, line
    assert list(tmp_path.iterdir()) == [settings]


def test_a_killed_owner_holds_nothing_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADHERE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.jsonl"
    with held(out) as owner:
        with (
            pytest.raises(UserError, match=f"process {owner.pid} is writing it"),
            writing(tmp_path / "." / "out.jsonl"),
        ):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    for _ in range(2):
        with writing(out):
            pass
    assert not out.exists() and list((tmp_path / "cache" / "locks").iterdir()) == []


def test_what_a_process_holds_it_may_hold_again(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ask = [sys.executable, "-m", "adhere", "heads", "--model", "m", "--output", str(tmp_path / "a")]
    with writing(tmp_path / "a"):
        with writing(tmp_path / "a"):
            pass
        refused = subprocess.run(ask, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and f"process {os.getpid()} is writing it" in refused.stderr


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADHERE_CACHE", str(tmp_path / "file"))
    told = r"file/locks: no lock can be made there \(Not a directory\); set ADHERE_CACHE to a folder"
    with pytest.raises(UserError, match=told), writing(tmp_path / "a"):
        pass


def test_devices_other_outputs_and_later_processes_of_one_run_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(tmp_path / "a"), writing(tmp_path / "b"), writing("/dev/null"), writing("/dev/null"), writing(None):
        monkeypatch.setenv("RANK", "1")
        with writing(tmp_path / "a"):
            pass
