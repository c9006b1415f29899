"""The command line, in process, on tiny models: every command end to end, and every bad input as one clear line on
standard error, exit 2 (1 while running), nothing written."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from adhere.cli import main
from tests.families import save, tokenizer

ROWS = [
    {"prompt": f"w{i} is in the w{i + 1} . where is w{i} ?", "answers": [f"w{i + 1}"], "kind": "one", "split": "agree"}
    for i in range(6)
]
SMALL = ["--steps", "2", "--prompts-per-step", "2", "--num-samples", "3", "--max-new-tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def prompts(tmp_path):
    return jsonl(tmp_path / "prompts.jsonl", ROWS)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(model, prompts, run, *more):
    return main(["train", "--model", str(model), "--prompts", str(prompts), "--output", str(run), *SMALL, *more])


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("demo", "train", "audit", "score", "rank", "inspect", "eval"):
        assert command in text
        assert main([command, "--help"]) == 0
        assert "usage: adhere " + command in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize("reward", ["certainty", "exact", "overlap"])
def test_train_leaves_a_run_that_resumes_and_a_model_that_loads(model, prompts, tmp_path, reward, capsys):
    run = tmp_path / "run"
    assert train(model, prompts, run, "--reward", reward, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 and found["stopped"] is None
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
    assert "<html" in (run / "report.html").read_text()
    assert main(["train", "--resume", "--output", str(run), "--steps", "3"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_train_reads_a_reward_and_an_algorithm_from_yaml(model, prompts, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "reward:\n  weights: {coherence: 1.0, repetition: -0.5}\n  gates: [ended]\n"
        "algorithm: {name: rloo, epsilon_high: 0.3}\nlearning_rate: 1e-4\n"
    )
    assert train(model, prompts, tmp_path / "run", "--config", str(config)) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    kl = {"kl_coef": 0.04, "kl_target": None, "kl_in": "reward"}
    assert kept["algorithm"] == {"name": "rloo", **kl, "epochs": 1, "epsilon": 0.2, "epsilon_high": 0.3}
    assert kept["reward"]["weights"] == {"coherence": 1.0, "repetition": -0.5} and kept["learning_rate"] == 1e-4
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"signals/coherence", "signals/repetition"} <= row.keys()


def test_train_with_adapters_and_tensorboard(model, prompts, tmp_path):
    more = ["--reward", "certainty", "--lora", "--lora-rank", "2", "--trackers", "tensorboard"]
    assert train(model, prompts, tmp_path / "run", *more) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_audit_tells_a_gameable_reward_by_its_exit_code(model, prompts, tmp_path, capsys):
    given = ["audit", "--model", str(model), "--prompts", str(prompts), "--device", "cpu", "--max-new-tokens", "6"]
    assert main([*given, "--reward", "length", "--output", str(tmp_path / "a"), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["gameable"] and found == json.loads((tmp_path / "a" / "audit.json").read_text())
    assert "<html" in (tmp_path / "a" / "audit.html").read_text()
    assert main([*given, "--reward", "exact", "--output", str(tmp_path / "b"), "--quiet"]) == 0
    assert "beats the best own sample" in capsys.readouterr().out
    assert main([*given, "--reward", "exact", "--output", str(tmp_path / "b")]) == 2
    file = tmp_path / "reward.yaml"
    file.write_text("reward: {weights: {lenght: 1.0}}\n")
    assert main([*given, "--reward", str(file), "--output", str(tmp_path / "c")]) == 2
    assert "length" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_train_warns_of_a_gameable_reward_first(model, prompts, tmp_path, capsys):
    assert train(model, prompts, tmp_path / "a", "--reward", "length") == 0
    assert "Gameable" in capsys.readouterr().err
    assert train(model, prompts, tmp_path / "b", "--reward", "length", "--skip-audit") == 0
    assert "Gameable" not in capsys.readouterr().err
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("a", "b")]
    assert last[0]["loss"] == last[1]["loss"]  # looking changes nothing


def test_score_keeps_order_and_adds_reward_and_signals(model, tmp_path, capsys):
    rows = [{**ROWS[i % 2], "response": f"w{i}", "id": i} for i in range(6)]
    given, out = jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["score", "--model", str(model), "--input", str(given), "--output", str(out), "--device", "cpu"]
    assert main([*arguments, "--reward", "certainty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in scored] == list(range(6))
    for before, after in zip(rows, scored, strict=True):
        assert before.items() <= after.items()
        assert isinstance(after["reward"], float) and after["signals"].keys() == {"certainty"}


def test_scores_do_not_depend_on_the_batch(model, tmp_path):
    rows = [{**ROWS[i % 3], "response": f"w{i} w1"} for i in range(9)]
    given = jsonl(tmp_path / "in.jsonl", rows)
    found = []
    for size in ("1", "64"):
        out = tmp_path / f"{size}.jsonl"
        arguments = ["--model", str(model), "--input", str(given), "--output", str(out), "--batch-size", size]
        assert main(["score", *arguments, "--reward", "length", "--device", "cpu"]) == 0
        found.append([json.loads(line)["signals"] for line in out.read_text().splitlines()])
    assert found[0] == found[1]


def test_single_responses_under_a_comparing_reward_are_pointed_out(model, tmp_path, capsys):
    given = jsonl(tmp_path / "in.jsonl", [{**row, "response": "w1"} for row in ROWS])
    arguments = ["--model", str(model), "--input", str(given), "--output", str(tmp_path / "o"), "--reward", "overlap"]
    assert main(["score", *arguments, "--device", "cpu"]) == 0
    assert "each reward is 0" in capsys.readouterr().err


def test_eval_compares_two_models(model, prompts, tmp_path, capsys):
    out = tmp_path / "eval"
    arguments = ["eval", "--model", str(model), "--prompts", str(prompts), "--output", str(out), "--device", "cpu"]
    arguments += ["--max-new-tokens", "4", "--num-samples", "2", "--json"]
    assert main([*arguments, "--baseline", str(model)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    match = printed["metrics"]["exact_match"]
    assert match["difference"]["mean"] == 0.0 and match["after"]["n"] == 6
    assert (out / "report.html").exists()
    assert main(arguments) == 2
    assert "already holds results" in capsys.readouterr().err


def test_demo_tells_the_whole_story(tmp_path, capsys):
    run = tmp_path / "demo"
    assert main(["demo", "--output", str(run), "--steps", "2", "--eval-prompts", "4"]) == 0
    text = capsys.readouterr().out
    assert all(split in text for split in ("agree", "conflict", "novel"))
    written = {"report.html", "results.json", "origin.json", "model", "prompts.jsonl"}
    assert written <= {path.name for path in run.iterdir()}
    command = f"adhere demo --output {shlex.quote(str(run))} --steps 2 --eval-prompts 4"
    assert json.loads((run / "origin.json").read_text())["commands"] == [command]
    assert "answers" not in (run / "prompts.jsonl").read_text()


def broken(folder, model, how):
    """A copy of the model with one thing wrong."""
    shutil.copytree(model, folder)
    words = tokenizer()
    if how == "no tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif how == "no end":
        words.eos_token = None
        words.save_pretrained(folder)
    elif how == "vocabulary":
        words.add_tokens(["brand", "new"])
        words.save_pretrained(folder)
    elif how == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tokenizer", "holds no tokenizer"),
        ("no end", "no end-of-sequence token"),
        ("vocabulary", "ids up to 65, the model embeds 64"),
        ("pickle", "pickle weights only"),
    ],
)
def test_models_that_cannot_be_used(model, prompts, tmp_path, capsys, how, message):
    assert train(broken(tmp_path / "broken", model, how), prompts, tmp_path / "run") == 2
    refused(capsys, tmp_path / "run", message)


def refused(capsys, run, message):
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert shown.out == ""
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "prompts.jsonl: no such file"),
        ("", "prompts.jsonl: holds no rows"),
        ('{"prompt": "w1"}\n{"prompt": \n', "prompts.jsonl:2: "),
        ('{"prompt": "w1"}\n{"text": "w1"}\n', "prompts.jsonl:2: no `prompt`"),
        ('{"prompt": 7}\n', "prompts.jsonl:1: `prompt`"),
        ('{"prompt": "  "}\n', "prompts.jsonl:1: "),
        ('{"prompt": "w1"}\n{"prompt": "' + "w1 " * 200 + '"}\n', "prompts.jsonl:2: the prompt has 200 tokens"),
        ('{"prompt": "w1"}\n{"prompt": "' + "w1 " * 126 + '"}\n', "prompts.jsonl:2: prompt and 4 new tokens"),
        ('{"messages": [{"role": "user", "content": "w1"}]}\n', "prompts.jsonl:1: messages, but the tokenizer has no"),
    ],
)
def test_prompts_that_cannot_be_read(model, tmp_path, capsys, text, message):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    assert train(model, path, tmp_path / "run", "--reward", "length") == 2
    refused(capsys, tmp_path / "run", message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "attentoin"], "did you mean attention"),
        (["--reward", "nothing.here:function"], "cannot be imported"),
        (["--algorithm", "grop"], "did you mean grpo"),
        (["--algorithm", "grpo", "--gae-lambda", "0.9"], "is an option of ppo, not of grpo"),
        (["--steps", "0"], "steps is 0"),
        (["--num-samples", "1"], "num_samples is 1"),
        (["--temperature", "0"], "greedily"),
        (["--dtype", "float3"], "unknown dtype"),
        (["--device", "toaster"], "unknown device"),
        (["--device", "cuda:99"], "no device 'cuda:99' on this machine"),
        (["--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
        (["--trackers", "tensorbord"], "did you mean tensorboard"),
    ],
)
def test_options_that_make_no_sense(model, prompts, tmp_path, capsys, flags, message):
    assert train(model, prompts, tmp_path / "run", *flags) == 2
    refused(capsys, tmp_path / "run", message)


def test_a_tracker_that_is_not_installed(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adhere.learn.trackers.find_spec", lambda name: None)
    assert train(model, prompts, tmp_path / "run", "--trackers", "wandb") == 2
    refused(capsys, tmp_path / "run", "wandb is not installed; pip install wandb")


def test_an_unknown_signal_in_yaml_is_named_with_its_neighbours(model, prompts, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("reward:\n  weights: {groundin: 1.0}\n")
    assert train(model, prompts, tmp_path / "run", "--config", str(config)) == 2
    refused(capsys, tmp_path / "run", "did you mean grounding")


def test_exact_without_answers_names_the_row(model, tmp_path, capsys):
    path = jsonl(tmp_path / "prompts.jsonl", [ROWS[0], {"prompt": "w1"}])
    assert train(model, path, tmp_path / "run", "--reward", "exact") == 2
    refused(capsys, tmp_path / "run", "prompts.jsonl:2: ")


def test_an_output_that_holds_a_run_is_left_alone(model, prompts, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(model, prompts, run, "--reward", "certainty") == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(model, prompts, run, "--reward", "certainty") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_nothing_to_resume(model, prompts, tmp_path, capsys):
    assert train(model, prompts, tmp_path / "run", "--resume") == 2
    refused(capsys, tmp_path / "run", "nothing to resume")


def test_a_full_disk_fails_while_running(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adhere.files._free", lambda path: 1000)
    assert train(model, prompts, tmp_path / "run", "--reward", "certainty") == 1
    assert "no room on disk" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run" / "model").exists()


def test_an_unknown_command_offers_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err


def test_score_without_responses_names_the_row(model, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["score", "--model", str(model), "--input", str(prompts), "--output", str(out)]) == 2
    refused(capsys, out, "prompts.jsonl:1: ")
