"""The benchmark scripts start, say what they do, and refuse data that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("capture.py", "step.py", "real_model.py", "real_data.py", "reward_study/rank.py", "reward_study/train.py")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_how_it_is_run(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}" in done.stdout


def test_missing_data_is_one_line_and_exit_2(tmp_path: Path) -> None:
    for script, more in (("real_model.py", []), ("real_data.py", ["--base", str(tmp_path)])):
        done = run(script, "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"), *more)
        assert done.returncode == 2 and "babi" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
