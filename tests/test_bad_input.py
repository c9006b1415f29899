"""Bad input, as data: every case of tests/bad_input is one command that must be refused in words, with exit code 2 and
nothing written; none may end in a traceback, run on, or be taken for good."""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adhere.cli import main
from adhere.commands import COMMANDS

CASES: list[dict[str, Any]] = [
    case
    for file in sorted((Path(__file__).parent / "bad_input").glob("*.yaml"))
    for case in yaml.safe_load(file.read_text())
]
SECONDS = 60
"""After which a case counts as hanging."""


def text_of(given: Any) -> Any:
    """A text, or one that is repeated: {repeat, times, before}; within rows too."""
    if isinstance(given, dict) and "repeat" in given:
        return given.get("before", "") + given["repeat"] * given["times"]
    return {name: text_of(value) for name, value in given.items()} if isinstance(given, dict) else given


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict) and "hex" in content:
        path.write_bytes(bytes.fromhex(content["hex"]))
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(text_of(row)) + "\n" for row in content))
    else:
        path.write_text(text_of(content))


def everything() -> dict[Path, bytes | None]:
    """All that is in the working folder, folders with None."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_bad_input_is_told_and_nothing_is_written(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in case.get("folders", ()):
        Path(folder).mkdir()
    for name, content in case.get("files", {}).items():
        write(Path(name), content)
    before = everything()
    words = shlex.split(case["command"])
    writes = bool(words) and words[0] in COMMANDS and case.get("output", True)
    assert main([*words, *(["--output", "out"] if writes else [])]) == case.get("exit", 2)
    out, err = capsys.readouterr()
    assert case["message"] in err and "Traceback" not in err
    assert out == "" or case.get("prints")
    assert everything() == before


def test_every_command_has_its_cases_and_no_name_is_there_twice() -> None:
    assert {case["command"].split(" ")[0] for case in CASES} >= COMMANDS.keys()
    assert [name for name, count in Counter(case["name"] for case in CASES).items() if count > 1] == []
    assert len(CASES) >= 180
