"""What a run leaves behind, read back as users do: TensorBoard through its own reader, the file of an offline W&B run,
trackio's database; each broken off and resumed. A Parquet table of every completion of a step (after `kill -9`: see
test_train)."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pytest
import torch

from adhere.cli import main
from adhere.errors import UserError
from adhere.learn.settings import DPO, PPO
from adhere.learn.trackers import check_login
from adhere.learn.train import Trainer, train
from adhere.model.policy import Policy
from tests.families import save
from tests.test_train import config, rows

DOCS = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text("utf-8")

CHILD = """
import sys
import torch
from adhere.resume import new_run_dir
from adhere.learn.train import train
from adhere.model.policy import Policy
from tests.test_train import config, rows
torch.set_num_threads(1)
model, run, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"

def watch(metrics):
    print("step", flush=True)
    if "break" in sys.argv and metrics["step"] == 3:
        raise KeyboardInterrupt

settings = config(model, run, steps=4, save_every=2, trackers={trackers})
train(settings, Policy.load(model, device="cpu"), rows(), new_run_dir(run, resume), resume=resume, on_step=watch)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "model")


def child(cwd, model, run, *how, trackers):
    """A run in a process of its own, as it is for users: trackers keep state for as long as a process lives."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "WANDB_MODE": "offline"}
    code = CHILD.format(trackers=trackers)
    arguments = [sys.executable, "-c", code, str(model), str(run), *how]
    return subprocess.Popen(
        arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# Trackers


@pytest.fixture(scope="module")
def tracked(model, tmp_path_factory):
    """The folder of a run with every tracker that broke off at step 3, went on from step 2, and ended at step 4."""
    cwd = tmp_path_factory.mktemp("cwd")
    all_of_them = ("tensorboard", "wandb", "trackio")
    broken = child(cwd, model, "run", "new", "break", trackers=all_of_them)
    assert "KeyboardInterrupt" in broken.communicate()[1]
    resumed = child(cwd, model, "run", "resume", trackers=all_of_them)
    assert resumed.communicate() and resumed.returncode == 0
    assert [item.name for item in cwd.iterdir()] == ["run"]  # nothing beside it
    return cwd / "run"


@pytest.fixture(scope="module")
def logged(tracked):
    """{step: metrics} as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


def test_tensorboard_shows_every_step_once(tracked, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tracked / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set(logged[1])
    for name in logged[1]:
        events = {event.step: event.value for event in board.Scalars(name)}
        assert [event.step for event in board.Scalars(name)] == [1, 2, 3, 4]
        assert events == pytest.approx({step: row[name] for step, row in logged.items()}, rel=1e-6), name


def test_wandb_goes_on_in_the_same_run(tracked, logged):
    from wandb.proto import wandb_internal_pb2

    histories, runs = [], []
    for file in sorted(tracked.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(file)]
        runs += [record.run for record in records if record.WhichOneof("record_type") == "run"]
        of_file = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        histories.append(
            {h.step.num: {i.key or i.nested_key[0]: json.loads(i.value_json) for i in h.item} for h in of_file}
        )
    identity = (tracked / "tracker-id").read_text().strip()
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(identity, "adhere", "run")}
    assert [list(history) for history in histories] == [[1, 2, 3], [3, 4]]
    for step, row in {**histories[0], **histories[1]}.items():
        ours = {name: value for name, value in row.items() if not name.startswith("_")}
        assert ours == pytest.approx(logged[step]), step
    steady = [{k: v for k, v in h[3].items() if not k.startswith(("_", "seconds", "tokens"))} for h in histories]
    assert steady[0] == steady[1]  # so that it does not matter which of the two W&B keeps


def leveldb_records(file):
    """The records of a .wandb file: seven bytes of W&B's own, then the log format of LevelDB."""
    data, at, record = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of its parts
            yield record
            record = b""


def test_trackio_keeps_every_step_once(tracked, logged):
    base = sqlite3.connect(tracked / "trackio" / "adhere.db")
    found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in found} == {"run-" + (tracked / "tracker-id").read_text().strip()}
    assert [step for _, step, _ in found] == [1, 2, 3, 4]
    for _, step, metrics in found:
        fixed = {k: v for k, v in json.loads(metrics).items() if not k.startswith(("seconds", "tokens"))}
        assert fixed == pytest.approx({name: logged[step][name] for name in fixed})
        assert "reward" in fixed and "kl" in fixed and "signals/tests.test_train:says_garden" in fixed


def test_wandb_without_a_login_is_told_before_anything_is_done(model, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1"}\n')
    given = ["--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    assert main(["train", *given, "--trackers", "wandb"]) == 2
    assert "error: wandb needs a login; run `wandb login`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"wandb: .*WANDB_MODE=offline"):
        check_login(("tensorboard", "wandb"))
    check_login(("tensorboard", "trackio"))


def test_names_that_trl_has_too_are_in_its_trainer():
    """Where the docs say that a name is TRL's, GRPOTrainer logs it; where they say it differs, that is told."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    theirs = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    } | {"loss", "grad_norm", "learning_rate"}  # these three come from transformers' Trainer
    table = DOCS.split("## What an evaluation measures")[0]
    same = re.findall(r"^\| `([^`]+)` \|.*\| same \|$", table, re.MULTILINE)
    assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy"} <= set(same)
    assert [name for name in same if name not in theirs] == []
    other = re.findall(r"^\| `(.+?)` \|.*\| (?!same)[^|]*\|$", table, re.MULTILINE)
    assert [name for name in other if name in theirs - {"step"}] == ["kl"]  # said there to be another estimate
    assert "k3" in next(line for line in table.splitlines() if line.startswith("| `kl`"))


def test_reward_std_is_of_the_reward_before_it_is_normalised(model, tmp_path):
    weights = {"weights": {"length": 2.0, "tests.test_train:says_garden": 0.0}, "normalise": "group"}
    run = tmp_path / "run"
    trainer = Trainer(config(model, run, reward=weights), Policy.load(model, device="cpu"), rows(), run)
    metrics = trainer.step()
    lengths = 2 * torch.tensor(pandas.read_parquet(run / "completions/step-000001.parquet")["signals/length"])
    assert metrics["reward"] == pytest.approx(float(lengths.mean()))
    assert metrics["reward_std"] == pytest.approx(float(lengths.std()))


# Completions


def test_every_completion_of_every_step_is_in_one_table(model, tmp_path):
    run = tmp_path / "run"
    settings = config(model, run, reward={"weights": {"length": 1.0, "random": 0.0}}, steps=3)
    train(settings, Policy.load(model, device="cpu"), rows(), run)
    found = datasets.load_dataset("parquet", data_dir=str(run / "completions"), cache_dir=str(tmp_path))["train"]
    assert len(found) == 3 * 4 * 4
    assert found.column_names == [
        "step", "prompt", "completion", "ended", "reward", "advantage", "signals/length", "signals/random",
    ]  # fmt: skip
    frame = found.to_pandas()
    assert frame["step"].tolist() == [step for step in (1, 2, 3) for _ in range(16)]
    assert frame.groupby(["step", "prompt"]).size().tolist() == [4] * 12
    # A group's rewards and advantages are both around its mean: GRPO divides by the deviation.
    for _, group in frame.groupby(["step", "prompt"]):
        assert group["advantage"].mean() == pytest.approx(0, abs=1e-5)
        order = group.sort_values("reward")
        assert order["advantage"].is_monotonic_increasing
    metrics = pandas.read_json(run / "metrics.jsonl", lines=True)
    means = frame.groupby("step")["signals/length"].mean()
    assert means.tolist() == pytest.approx(metrics["reward"].tolist())
    samples = pandas.read_json(run / "samples.jsonl", lines=True)
    first = frame.groupby("step").head(settings.log_samples)
    assert samples["response"].tolist() == first["completion"].tolist()
    assert samples["reward"].tolist() == pytest.approx(first["reward"].tolist())
    assert pandas.read_parquet(run / "completions").shape == frame.shape  # pandas reads the folder as one table too


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [2, 4])])
def test_tables_are_as_rare_as_asked(model, tmp_path, every, steps):
    run = tmp_path / "run"
    train(config(model, run, completions_every=every), Policy.load(model, device="cpu"), rows(), run)
    assert [file.name for file in sorted(run.glob("completions/*"))] == [f"step-{n:06d}.parquet" for n in steps]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 4 * 4  # as ever


def test_advantages_are_left_out_where_there_are_none(model, tmp_path):
    for algorithm, there in ((DPO(), False), (PPO(), True)):
        run = tmp_path / algorithm.name
        Trainer(config(model, run, algorithm=algorithm), Policy.load(model, device="cpu"), rows(), run).step()
        assert ("advantage" in pandas.read_parquet(run / "completions").columns) == there


def test_text_that_is_no_unicode_is_kept_readable(model, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config(model, run), Policy.load(model, device="cpu"), rows(), run)
    rollout = trainer.policy.sample(trainer.prompts.select(torch.tensor([0])), 2, seed=0)
    rollout = replace(rollout, responses=("a\ud800", "\x00\U0001f600"))
    trainer.log.responses(1, rollout, trainer.reward(rollout, trainer.policy), None)
    assert pandas.read_parquet(run / "completions")["completion"].tolist() == ["a\\ud800", "\x00\U0001f600"]
