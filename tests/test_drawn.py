"""Dynamic sampling: which prompts are dropped, what takes their place, what is learned from and what is reported; on
one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pandas
import pytest
import torch

from adhere.errors import UserError
from adhere.learn.settings import DPO, GRPO, PPO, RLOO, Reinforce
from adhere.learn.train import Trainer
from adhere.model.policy import Policy
from tests.families import save
from tests.test_train import PROMPTS, config, rows

EVEN = "tests.test_drawn:evens_differ"
FLAT = "tests.test_drawn:all_the_same"


def evens_differ(evidence):
    """Samples of every second prompt of the file (w0, w2, …) earn 1, 2, 3, …; those of the others all earn 7."""
    rollout = evidence.reading.rollout
    place = torch.tensor([PROMPTS.index(rollout.prompts.texts[prompt]) for prompt in rollout.prompt_index.tolist()])
    among = torch.arange(len(place)) - torch.searchsorted(rollout.prompt_index, rollout.prompt_index)
    return torch.where(place % 2 == 0, among + 1.0, 7.0)


def all_the_same(evidence):
    return torch.ones(len(evidence.reading.rollout))


def trainer(folder, family="llama", run="run", **changes):
    settings = {"reward": EVEN, "prompts_per_step": 6, "num_samples": 3, "algorithm": GRPO(kl_coef=0.0), **changes}
    model = save(family, folder / f"model-{family}")
    return Trainer(config(model, folder, **settings), Policy.load(model, device="cpu"), rows(), folder / run)


def weights(made):
    return torch.cat([parameter.detach().flatten() for parameter in made.parameters.values()])


def responses_of(made, step=1):
    """The table of a step, a row a response."""
    table = pandas.read_parquet(made.run / "completions" / f"step-{step:06d}.parquet")
    return table.assign(place=table["prompt"].map(PROMPTS.index))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_prompts_whose_responses_all_earn_the_same_give_way_to_others(family, tmp_path):
    made = trainer(tmp_path, family, dynamic_sampling=9)
    metrics = made.step()
    table = responses_of(made)
    places = table["place"].unique()
    # 6 of the 12 prompts teach something, and 6 are wanted: it goes on until it has them all, never drawing one twice.
    assert {place for place in places if place % 2 == 0} == {0, 2, 4, 6, 8, 10}
    assert table.groupby("place").size().eq(3).all()
    assert metrics["dynamic_sampling/drawn"] == len(places)
    assert metrics["dynamic_sampling/dropped"] == len(places) - 6 == (places % 2).sum()
    assert metrics["frac_reward_zero_std"] == pytest.approx((places % 2).mean())
    assert table[table["place"] % 2 == 1]["advantage"].eq(0).all()
    # Rewards 1, 2, 3 give the advantages −1, 0, 1.
    assert table[table["place"] % 2 == 0]["advantage"].tolist() == pytest.approx([-1, 0, 1] * 6, abs=1e-3)
    assert metrics["reward"] == pytest.approx(table[f"signals/{EVEN}"].mean()), "over all that was drawn"


def test_the_number_of_tries_is_bounded(tmp_path):
    first = trainer(tmp_path, run="none")._places(0).tolist()
    for tries in (1, 2):
        made = trainer(tmp_path, run=f"run-{tries}", dynamic_sampling=tries)
        drawn, found = list(first), 0
        spare = made._spare(0, torch.tensor(first)).tolist()
        assert sorted(first + spare) == list(range(12))
        for _ in range(tries):
            found = sum(place % 2 == 0 for place in drawn)
            drawn, spare = drawn + spare[: 6 - found], spare[6 - found :]
        assert made.step()["dynamic_sampling/drawn"] == len(drawn)
        assert responses_of(made)["place"].unique().tolist() == drawn


def test_a_step_learns_from_what_is_left_as_if_the_rest_had_not_been_drawn(tmp_path):
    """Without a KL term a group with equal rewards has no gradient; dropped, it does not count in the mean either."""
    kept, dropped = (
        trainer(tmp_path, run=name, algorithm=GRPO(kl_coef=0.0, loss="grpo"), dynamic_sampling=tries, num_samples=3)
        for name, tries in (("kept", 0), ("dropped", 1))
    )
    for made in (kept, dropped):
        made._spare = lambda step, places: places[:0]  # nothing to take their place
    whole, less = kept.step(), dropped.step()
    flat = whole["frac_reward_zero_std"]
    assert 0 < flat < 1 and less["dynamic_sampling/dropped"] == round(6 * flat)
    assert less["grad_norm"] == pytest.approx(whole["grad_norm"] / (1 - flat), rel=1e-3)
    assert less["loss"] == pytest.approx(whole["loss"] / (1 - flat), abs=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO(), RLOO(), DPO()], ids=lambda a: a.name)
def test_where_no_prompt_teaches_anything_a_step_is_taken_all_the_same(algorithm, tmp_path):
    made = trainer(tmp_path, reward=FLAT, algorithm=algorithm, dynamic_sampling=2)
    metrics = made.step()
    assert metrics["dynamic_sampling/drawn"] == 12, "there are no more"
    assert metrics["dynamic_sampling/dropped"] == 11 and metrics["frac_reward_zero_std"] == 1
    assert made.state.step == 1 and torch.isfinite(weights(made)).all()


def test_where_every_prompt_teaches_something_nothing_changes(tmp_path):
    plain, dynamic = (
        trainer(tmp_path, run=f"run-{tries}", reward={"weights": {"random": 1.0}}, dynamic_sampling=tries)
        for tries in (0, 3)
    )
    one, other = plain.step(), dynamic.step()
    assert torch.equal(weights(plain), weights(dynamic))
    assert other["dynamic_sampling/drawn"] == 6 and other["dynamic_sampling/dropped"] == 0
    assert one["loss"] == other["loss"] and "dynamic_sampling/drawn" not in one


@pytest.mark.parametrize("algorithm", [PPO(), Reinforce()], ids=lambda a: a.name)
def test_algorithms_that_compare_no_samples_refuse_it_by_name(algorithm):
    with pytest.raises(UserError, match=rf"dynamic_sampling drops .*, but {algorithm.name} learns from them"):
        config("m", "o", algorithm=algorithm, dynamic_sampling=1)
    with pytest.raises(UserError, match=r"dynamic_sampling is -1; set it to 0 or above"):
        replace(config("m", "o"), dynamic_sampling=-1)


PAIR = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from tests.test_drawn import trainer, weights
torch.set_num_threads(1)
state = PartialState(cpu=True)
folder, rank = Path(sys.argv[1]), state.process_index
made = trainer(folder, dynamic_sampling=1)
order = [(made._places(step).tolist(), made._spare(step, made._places(step)).tolist()) for step in range(2)]
found = [made.step() for _ in range(2)]
torch.save((weights(made), found, order), folder / f"rank-{rank}.pt")
state.wait_for_everyone()
state.destroy_process_group()  # a process that ends with its group alive may abort
"""


def test_two_processes_draw_equally_many_and_stay_in_step(tmp_path):
    save("llama", tmp_path / "model-llama")
    script = tmp_path / "pair.py"
    script.write_text(PAIR)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (one, figures, order), (other, same, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other)
    for step, (left, right, (places, spare)) in enumerate(zip(figures, same, order, strict=True), 1):
        # As many as both together lack, and one more where that is an odd number.
        lacking = sum(place % 2 for place in places)
        drawn = {*places, *spare[: lacking + lacking % 2]}
        for row in (left, right):
            assert row["dynamic_sampling/drawn"] == len(drawn) > 6
            assert row["dynamic_sampling/dropped"] == sum(place % 2 for place in drawn)
        table = pandas.read_parquet(tmp_path / "run" / "completions" / f"step-{step:06d}.parquet")
        assert table.groupby("prompt").size().eq(3).all()
        assert set(table["prompt"].map(PROMPTS.index)) == drawn
