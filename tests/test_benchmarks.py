"""The benchmark scripts start, say what they do, and refuse data that is not there."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from adhere.data import Row, read_rows
from adhere.faithfulness.run import questions_of
from adhere.prompt import Role

ROOT = Path(__file__).parents[1]
STUDY = tuple(f"reward_study/{name}.py" for name in ("analyse", "credit", "ideas", "limits", "rank", "train"))
REAL = ("real_model.py", "real_data.py", "supporting.py", "human_preferences.py", "faithfulness/run.py")
SCRIPTS = (
    "best_of_n.py",
    "anatomy.py",
    "capture.py",
    "memory.py",
    "own_samples.py",
    "rank.py",
    "ray_data.py",
    "sampling.py",
    "serve.py",
    "step.py",
    "trl_rollout.py",
    *REAL,
    *STUDY,
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_how_it_is_run(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "benchmarks" / script
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(path.parent))  # as `python SCRIPT` does, in a process that has torch already
    for name in {file.stem for file in (ROOT / "benchmarks").rglob("*.py")}:  # two folders have a `rank` and a `train`
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert f"python benchmarks/{script}" in capsys.readouterr().out


def test_missing_data_is_one_line_and_exit_2(tmp_path: Path) -> None:
    for script, more in (("real_model.py", []), ("real_data.py", ["--base", str(tmp_path)])):
        done = run(script, "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"), *more)
        assert done.returncode == 2 and "babi" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    done = run("rank.py", "--data", str(tmp_path / "none"), "--model", str(tmp_path))
    assert done.returncode == 2 and "squad_xquad" in done.stderr and "Traceback" not in done.stderr


def test_the_bench_of_faithfulness_shows_an_example_and_keeps_the_roles(tmp_path: Path) -> None:
    done = run("faithfulness/run.py", "--data", str(tmp_path), "--model", "m", "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "fairytaleqa" in done.stderr and not (tmp_path / "out").exists()
    prepared = runpy.run_path(str(ROOT / "benchmarks" / "faithfulness" / "run.py"))["prepared"]
    row = {"context": "Ann sat.", "question": "Who sat?", "answers": ["Ann"], "title": "t"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for base in (False, True):
        prepared(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", base)
        (found,) = read_rows(tmp_path / "out.jsonl")
        last = found.prompt if base else found.prompt[-1]["content"]
        assert [part.text for part in last.parts if part.role == Role.DOCUMENT] == ["Ann sat."]
        assert [part.text for part in last.parts if part.role == Role.QUESTION] == ["Who sat?"]
        assert found.answers == ("Ann",) and found.fields["title"] == "t" and questions_of([found])


def test_supporting_sentences_are_found_in_the_prompt() -> None:
    spec = importlib.util.spec_from_file_location("supporting", ROOT / "benchmarks" / "supporting.py")
    assert spec is not None and spec.loader is not None
    supporting = importlib.util.module_from_spec(spec)
    sys.modules["supporting"] = supporting  # a dataclass looks its module up
    spec.loader.exec_module(supporting)
    passage = "Mary is here. John left. Ann sat."
    row = Row(f"{passage}\n\nQuestion: who?", fields={"context": passage, "supporting": [0, 2]})
    whole, named = supporting.spans(row)
    assert row.prompt[slice(*whole)] == passage
    assert [row.prompt[slice(*span)].strip() for span in named] == ["Mary is here.", "Ann sat."]
    with pytest.raises(ValueError, match="of 3 sentences"):
        supporting.spans(Row(row.prompt, fields={"context": passage, "supporting": [3]}))
