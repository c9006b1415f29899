"""Damaged checkpoints, runs killed before their first, folders that vanish in mid-run: told by name, and the weights
in the end are those of an unbroken run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adhere.errors import RunFailed, UserError
from adhere.learn import checkpoint
from adhere.learn.settings import TrainConfig
from adhere.learn.train import Trainer, train
from adhere.model.policy import Policy
from adhere.resume import new_run_dir
from tests.families import save
from tests.test_train import config, rows

FILES = ["trained.safetensors", "optimizer.safetensors", "state.json", "checksums.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "model")


def settings(model: Path, run: Path, steps: int) -> TrainConfig:
    return config(model, run, steps=steps, save_every=1, keep_checkpoints=9)


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(model, run, 3), Policy.load(model, device="cpu"), rows(), run)
    return run


def gone_on(model: Path, run: Path, said: list[str]) -> dict[str, torch.Tensor]:
    """The weights after a fourth step, of a run that is resumed."""
    train(settings(model, run, 4), Policy.load(model, device="cpu"), rows(), run, resume=True, warn=said.append)
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "how"),
    # A sum that was flipped is told as damage of the file that it is of.
    [(file, how) for file in FILES for how in ("flipped", "cut", "removed") if (file, how) != (FILES[-1], "flipped")],
)
def test_the_last_sound_checkpoint_is_taken_and_damage_is_told_by_file(
    file: str, how: str, model: Path, stopped: Path, tmp_path: Path
) -> None:
    for name in ("whole", "run"):
        shutil.copytree(stopped, tmp_path / name)
    checkpoints = tmp_path / "run" / "checkpoints"
    path = checkpoints / "step-3" / file
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found if how == "flipped" else found[:-1])
    if how == "removed":
        path.unlink()
    said: list[str] = []
    whole = gone_on(model, tmp_path / "whole", said)
    again = gone_on(model, tmp_path / "run", said)
    assert said == [f"damaged: {path}; going on from step-2, and what came after it is done again"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert {folder.name for folder in checkpoints.iterdir()} == {*(f"step-{n}" for n in range(1, 5)), "damaged-step-3"}
    assert checkpoint.damage(checkpoints / "step-3") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(model: Path, stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"step-3/state\.json, .*step-1/state\.json: damaged, as every checkpoint"):
        gone_on(model, run, [])
    assert sorted(run.rglob("*")) == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(model: Path, stopped: Path, tmp_path: Path) -> None:
    told = replace(settings(model, tmp_path / "run", 3), save_every=100)
    trainer = Trainer(told, Policy.load(model, device="cpu"), rows(), tmp_path / "run")
    trainer.step()
    trainer.step()  # and then it was killed
    said: list[str] = []
    run = new_run_dir(tmp_path / "run", resume=True)
    train(told, Policy.load(model, device="cpu"), rows(), run, resume=True, warn=said.append)
    assert said == [f"{run} holds no checkpoint yet: the run starts over"]
    one, other = (load_file(path / "model" / "model.safetensors") for path in (stopped, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_folder_removed_in_mid_run_is_an_error(steps: int, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(config(model, run), Policy.load(model, device="cpu"), rows(), run)
    for _ in range(steps):
        trainer.step()
    shutil.rmtree(run)
    for write in (trainer.step, trainer.save):
        with pytest.raises(RunFailed, match=r"run: was removed while the run was writing to it"):
            write()
    assert not run.exists()


def test_a_tampered_log_is_not_extended(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(config(model, run), Policy.load(model, device="cpu"), rows(), run)
    trainer.step()
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.raises(RunFailed, match=r"metrics\.jsonl: is not as it was written"):
        trainer.step()
