"""How the command line is used: help and usage errors at once, rows from standard input, embedded models by name,
nothing overwritten, completion."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import pytest

from adhere.cli import main
from adhere.commands import COMMANDS
from adhere.model.policy import Policy
from adhere.reward.named import NAMED
from adhere.row_files import records
from tests.families import save

HEAVY = ("torch", "transformers", "numpy", "pyarrow", "datasets", "peft", "accelerate")
"""Libraries that take seconds to import."""
ROWS = [{"prompt": f"w{i} is in the w{i + 1} .", "response": f"w{i}", "answers": [f"w{i}"]} for i in range(5)]
PAIR = {"prompt": "w1 is in the w2 .", "chosen": "w1", "rejected": "w2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save("llama", tmp_path_factory.mktemp("models") / "model"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def say(monkeypatch, text):
    """Put `text` on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def alone(*arguments):
    """Exit code, output and errors of a process of its own, and the heavy libraries that it imported."""
    code = (
        "import sys; from adhere.cli import main; code = main(sys.argv[1:]); "
        f"sys.stderr.write('\\n' + ' '.join(name for name in {HEAVY} if name in sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    errors, _, heavy = done.stderr.rpartition("\n")
    return done.returncode, done.stdout, errors, heavy.split()


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "adhere", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"adhere \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), ("preferences", "make"), ("preferences", "fit")])
def test_help_imports_no_heavy_library(command):
    code, out, errors, heavy = alone(*command, "--help")
    assert code == 0 and out.startswith(f"usage: adhere {' '.join(command)}") and errors == ""
    assert heavy == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --promts x", "unknown option --promts; did you mean --prompts?"),
        ("train --model m --prompts p --output o --steps ten", "--steps: `steps` must be a whole number, not 'ten'"),
        ("train --model m --prompts p --output o --reward attentoin", "did you mean attention"),
        ("train --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("train --model ./none --prompts p.jsonl --output o", "./none: is not a folder"),
        ("train --config none.yaml", "none.yaml: no such file"),
        ("score --model m --input none.jsonl --output o", "none.jsonl: no such file"),
        ("score --model m --input p --output o --limit 0", "--limit: 0 is too small"),
        ("rank --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("rank --model m --prompts p --output o --num-samples 0", "--num-samples: num_samples is 0"),
        ("eval --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("eval --model m --baseline ./none --prompts p --output o", "./none: is not a folder"),
        ("audit --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("inspect --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("calibrate --model m --pairs none.jsonl --output o", "none.jsonl: no such file"),
        ("preferences make --model m --prompts none.jsonl --output o", "none.jsonl: no such file"),
        ("preferences fit --model m --pairs none.jsonl --output o", "none.jsonl: no such file"),
        ("compare none.yaml --output o", "none.yaml: no such file"),
        ("serve --model m --timeout 0", "--timeout: timeout is 0.0"),
        ("serve --model ./none", "./none: is not a folder"),
        ("demo --steps 0", "--steps: 0 is too small"),
    ],
)
def test_usage_errors_and_missing_files_are_told_before_any_heavy_import(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    code, out, errors, heavy = alone(*line.split())
    assert code == 2 and out == "" and message in errors and len(errors.splitlines()) == 1
    assert heavy == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("score --modle m", "--model"),
        ("score --model=m --inptu=f", "--input"),
        ("rank --nmu-samples 3", "--num-samples"),
        ("preferences make --promts p", "--prompts"),
        ("preferences fit --hold-out 0.1", "--held-out"),
        ("serve --prot 1", "--port"),
        ("train --no-loar", "--no-lora"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(capsys, line, near):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"did you mean {near}?\n") and len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["-1", "-0.5", "- a list", "-"])
def test_a_value_that_begins_with_a_dash_is_no_flag(capsys, value):
    assert main(["inspect", "--model", "./none", "--prompt", value, "--output", "o"]) == 2
    assert "./none: is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "compare", "preferences")])
def test_help_comes_in_groups_and_names_the_rewards(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.find(title) for title in ("\nrequired", "\ncommon options:", "\nadvanced options:", "\noptions of ")]
    assert places == sorted(places) and places[0] > 0
    if name not in ("heads", "check"):
        assert all(reward in text[text.index("\nrewards:") :] for reward in NAMED)


@pytest.mark.parametrize("name", ["toy-causal", "toy-encdec"])
def test_an_embedded_model_is_loaded_by_its_name(tmp_path, capsys, name):
    assert Policy.load(name, device="cpu").is_encoder_decoder == (name == "toy-encdec")
    given = jsonl(
        tmp_path / "in.jsonl", [{"prompt": "mary went to the garden . where is mary ?", "response": "garden"}]
    )
    given = ["score", "--model", name, "--input", given, "--output", str(tmp_path / "out"), "--reward", "certainty"]
    assert main([*given, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "out").read_text())["reward"] > 0


def test_a_folder_of_ones_own_goes_before_an_embedded_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "toy-causal")
    assert Policy.load("toy-causal", device="cpu").kind == Policy.load(model, device="cpu").kind


TAKES_ROWS = {
    "score": ["--input", "-", "--reward", "length"],
    "rank": ["--prompts", "-", "--reward", "length", "--num-samples", "2", "--max-new-tokens", "2"],
    "eval": ["--prompts", "-", "--num-samples", "2", "--max-new-tokens", "2"],
    "audit": ["--prompts", "-", "--reward", "length", "--num-samples", "2", "--max-new-tokens", "2"],
    "inspect": ["--prompts", "-"],
    "train": ["--prompts", "-", "--reward", "length", "--steps", "1", "--prompts-per-step", "2", "--num-samples", "2",
              "--max-new-tokens", "2", "--skip-audit"],
    "preferences make": ["--prompts", "-", "--max-new-tokens", "2"],
}  # fmt: skip


@pytest.mark.parametrize("command", TAKES_ROWS)
def test_rows_come_from_standard_input_and_a_limit_is_kept(model, tmp_path, monkeypatch, capsys, command):
    flags = [*TAKES_ROWS[command], "--model", model, "--device", "cpu", "--seed", "0"]
    if command in ("score", "inspect"):
        flags = flags[:-2]
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)

    def run(text, name, *more):
        say(monkeypatch, text)
        code = main([*command.split(), *flags, "--output", str(tmp_path / name), *more])
        return code, capsys.readouterr().err

    code, errors = run(rows, "whole", "--limit", "4")
    assert code in (0, 3), errors  # 3: the audit finds `length` gameable
    same, _ = run("".join(rows.splitlines(keepends=True)[:4]), "four")
    assert same == code
    for file in ("", "results.json", "audit.json", "model/model.safetensors"):
        whole, four = tmp_path / "whole" / file, tmp_path / "four" / file
        if whole.is_file() and command != "inspect":  # its page holds a nonce
            assert whole.read_bytes() == four.read_bytes()
    code, errors = run(rows + "{", "broken")
    assert code == 2 and "standard input:6: not JSON" in errors and not (tmp_path / "broken").exists()
    code, errors = run("", "empty")
    assert code == 2 and "standard input: holds no rows" in errors and not (tmp_path / "empty").exists()


def test_standard_input_can_be_gone_through_twice(monkeypatch):
    say(monkeypatch, '{"prompt": "a"}\n\n{"prompt": "b"}\n')
    twice = [list(records("-", None)) for _ in range(2)]
    assert twice[0] == twice[1] == [("standard input:1", {"prompt": "a"}), ("standard input:3", {"prompt": "b"})]


@pytest.mark.parametrize(
    ("line", "mark"),
    [
        ("score --input {rows} --reward length", ""),
        ("rank --prompts {rows} --reward length", ""),
        ("inspect --prompt w1", ""),
        ("calibrate --pairs {pairs}", ""),
        ("calibrate --suggest 2 --prompts {rows}", ""),
        ("preferences make --prompts {rows}", ""),
        ("preferences fit --pairs {pairs}", "config.json"),
        ("eval --prompts {rows}", "results.json"),
        ("audit --prompts {rows}", "audit.json"),
        ("train --prompts {rows} --reward length --steps 1 --skip-audit", "config.yaml"),
        ("demo", "results.json"),
    ],
)
def test_what_is_there_is_never_overwritten(model, tmp_path, capsys, line, mark):
    rows, pairs = jsonl(tmp_path / "rows.jsonl", ROWS), jsonl(tmp_path / "pairs.jsonl", [PAIR])
    mine = tmp_path / "out" / mark
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    words = line.format(rows=rows, pairs=pairs).split()
    given = [] if words[0] == "demo" else ["--model", model, "--device", "cpu"]
    assert main([*words, *given, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "choose another --output" in err and len(err.splitlines()) == 1
    assert mine.read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder_are_told(model, tmp_path, capsys):
    rows = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert main(["score", "--model", model, "--input", rows, "--output", str(tmp_path)]) == 2
    assert "is a folder, and a file is to be written" in capsys.readouterr().err
    assert main(["eval", "--model", model, "--prompts", rows, "--output", rows]) == 2
    assert "is a file, and a folder is to be written" in capsys.readouterr().err


def test_verbose_shows_where_an_error_comes_from(capsys):
    given = ["score", "--model", "m", "--input", "none.jsonl", "--output", "o"]
    assert main(given) == 2
    assert "Traceback" not in capsys.readouterr().err
    code, out, errors, _ = alone(*given, "--verbose")
    assert code == 2 and out == "" and "Traceback" in errors and "row_files.py" in errors
    assert errors.splitlines()[-1].startswith("error: none.jsonl: no such file")


def test_a_reward_in_a_file_trains_as_its_weights_do(model, tmp_path):
    rows, file = jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "reward.yaml"
    file.write_text("reward: {weights: {length: 1.0}, gates: [ended]}\n")
    given = [
        "--prompts",
        rows,
        "--steps",
        "1",
        "--prompts-per-step",
        "2",
        "--num-samples",
        "2",
        "--max-new-tokens",
        "2",
    ]
    given += ["--model", model, "--device", "cpu", "--skip-audit"]
    for name, reward in (("file", str(file)), ("name", "length")):
        assert main(["train", *given, "--reward", reward, "--output", str(tmp_path / name)]) == 0
    file, name = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("file", "name"))
    assert file == name
    assert "length: 1.0" in (tmp_path / "file" / "config.yaml").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        (["score", "--in"], {"--input"}),
        (["rank", "--num"], {"--num-samples"}),
        (["demo", "--model", ""], {"toy-causal", "toy-encdec"}),
        (["preferences", "f"], {"fit"}),
        (["preferences", "fit", "--held"], {"--held-out"}),
    ],
)
def test_bash_completes_commands_flags_and_choices(capsys, words, offered):
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    listed = " ".join(f"'{word}'" for word in ("adhere", *words))
    script += f'\nCOMP_WORDS=({listed}); COMP_CWORD={len(words)}; _shtab_adhere; echo "${{COMPREPLY[@]}}"\n'
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_zsh_completion_names_every_command_and_other_shells_are_refused(capsys):
    assert main(["--print-completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef adhere") and all(f"    {name}:'" in text for name in COMMANDS)
    assert main(["--print-completion", "cmd"]) == 2
