"""Going on with an evaluation: killed, resumed, and equal to an unbroken one bit by bit; and all that is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adhere.cli import main
from tests.families import save

ROWS = [
    {
        "prompt": f"w{i} is in the w{i + 1} . where is w{i} ?",
        "answers": [f"w{i + 1}"],
        "follow_up": "w3 w4",
        "paraphrases": [f"where is w{i} ?"],
    }
    for i in range(24)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen2", tmp_path_factory.mktemp("models") / "other")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def given(model: Path, other: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    flags = ["--num-samples", "2", "--max-new-tokens", "16", "--batch-size", "1", "--judge", "certainty"]
    paths = ["--model", str(model), "--baseline", str(other), "--prompts", str(prompts), "--output", str(out)]
    return ["eval", *paths, *flags, "--device", "cpu", "--quiet", *more]


def test_a_killed_evaluation_goes_on_to_the_very_same_bytes(
    model: Path, other: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    kept = broken / "unfinished.jsonl"
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    code = threads + "import sys; from adhere.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given(model, other, prompts, broken)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if kept.exists() and kept.read_bytes().count(b"\n") > 3:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (broken / "results.json").exists()
    done = [json.loads(line)["name"] for line in kept.read_bytes().splitlines()[1:-1]]
    assert 2 <= len(done) < 72 and done[0] == "before/0"
    with kept.open("ab") as file:  # as if it had been killed while it wrote
        file.write(b'{"name": "after 23", "ba')

    arguments = given(model, other, prompts, broken)
    assert main(arguments) == 2
    assert "holds an unfinished evaluation; add --resume" in capsys.readouterr().err
    for changed in (["--seed", "9"], ["--limit", "3"], ["--judge", "length"]):
        assert main([*arguments, "--resume", *changed]) == 2
        assert "holds another evaluation" in capsys.readouterr().err
    assert main(given(other, model, prompts, broken, "--resume")) == 2
    assert "holds another evaluation" in capsys.readouterr().err

    assert main([*arguments, "--resume"]) == 0
    assert main(given(model, other, prompts, whole)) == 0
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert {path.name for path in broken.iterdir()} == {"results.json", "report.html"}
    assert main([*arguments, "--resume"]) == 2
    assert "already holds results" in capsys.readouterr().err
