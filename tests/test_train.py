"""The training loop: every algorithm raises the reward it is given, accumulation changes nothing, a run that
was killed and resumed ends bit-equal to an unbroken one, runs stop with a reason, and the run folder is complete."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adhere.config import load_config
from adhere.data import Row
from adhere.errors import RunFailed, UserError
from adhere.learn.settings import DPO, GRPO, PPO, RLOO, Reinforce, TrainConfig
from adhere.learn.stopping import Stopping, reason_to_stop
from adhere.learn.train import Trainer, _agreement, _one_text, train
from adhere.model.policy import Policy
from adhere.model.settings import Lora, Sampling
from adhere.options import options
from adhere.reward.heads import FILE_NAME, load_heads
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from adhere.types import Prompts, Role, Rollout
from tests.families import save

PROMPTS = [f"w{i} is in the w{i + 1} . where is w{i} ?" for i in range(12)]
ALGORITHMS = [PPO(), Reinforce(), RLOO(), GRPO(), DPO()]
EVERY_LOSS = ALGORITHMS + [GRPO(loss=loss) for loss in ("grpo", "dr_grpo", "gspo", "cispo")]


def called(algorithm):
    return getattr(algorithm, "loss", algorithm.name)


def rows():
    return [Row(prompt=text, answers=("w7",)) for text in PROMPTS]


def config(model, run, **changes):
    settings = {
        "model": str(model),
        "prompts": "",
        "output": str(run),
        "reward": "tests.test_train:says_garden",
        "steps": 4,
        "prompts_per_step": 4,
        "num_samples": 4,
        "sampling": Sampling(max_new_tokens=5),
        "learning_rate": 1e-3,
        "save_every": 100,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def says_garden(evidence):
    """A reward that training can only raise by changing what is said: the share of response tokens that are w7."""
    reading = evidence.reading
    word = (reading.response_ids == 19) & reading.response_mask
    return word.float().sum(-1) / reading.response_mask.sum(-1).clamp(min=1)


def says_w7(evidence):
    """1 where w7 was said: few groups of an untrained model tell their samples apart."""
    reading = evidence.reading
    return ((reading.response_ids == 19) & reading.response_mask).any(-1).float()


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=called)
def test_every_algorithm_raises_the_reward_it_is_given(family, algorithm, tmp_path):
    model = save(family, tmp_path / "model")
    seen = []
    free = algorithm if isinstance(algorithm, DPO) else replace(algorithm, kl_coef=0.0)
    train(
        config(model, tmp_path / "run", algorithm=free, steps=25, num_samples=8, learning_rate=5e-3),
        Policy.load(model, device="cpu"),
        rows(),
        tmp_path / "run",
        on_step=lambda m: seen.append(m["reward"]),
    )
    start, end = sum(seen[:5]) / 5, sum(seen[-5:]) / 5
    assert end > start + 0.1, f"{called(algorithm)}: {start:.3f} → {end:.3f}"


@pytest.mark.parametrize("algorithm", EVERY_LOSS, ids=called)
def test_accumulation_over_micro_batches_is_exact(algorithm, tmp_path):
    model = save("llama", tmp_path / "model")
    ends = []
    for name, budget in (("whole", 10_000), ("pieces", 1)):
        policy = Policy.load(model, device="cpu")
        trainer = Trainer(
            config(model, tmp_path, algorithm=algorithm, max_tokens=budget), policy, rows(), tmp_path / name
        )
        metrics = trainer.step()
        ends.append((metrics, torch.cat([p.detach().flatten() for p in policy.network.parameters()])))
    (whole, one), (pieces, other) = ends
    for key in ("loss", "entropy", "grad_norm"):
        assert whole[key] == pytest.approx(pieces[key], rel=1e-4, abs=1e-6), key
    # AdamW's first step is the sign of the gradient, so compare where the gradient is not rounding.
    assert ((one - other).abs() < 1e-4).float().mean() > 0.98


def test_a_run_folder_holds_what_the_design_says(tmp_path):
    model = save("llama", tmp_path / "model")
    run = tmp_path / "run"
    trained = train(config(model, run), Policy.load(model, device="cpu"), rows(), run)
    assert (trained.steps, trained.stopped, trained.interrupted) == (4, None, False)
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {
        "reward", "kl", "entropy", "completions/mean_length", "grad_norm", "tokens_per_second", "seconds/sample",
        "seconds/score", "seconds/update", "frac_reward_zero_std", "clip_ratio/low_mean",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
    assert not list(run.rglob("*.bin")) and not list(run.rglob("*.pt"))


def test_every_metric_of_a_run_is_defined_in_the_docs(tmp_path):
    model = save("llama", tmp_path / "model")
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    for algorithm in EVERY_LOSS:
        trainer = Trainer(
            config(model, tmp_path, algorithm=algorithm),
            Policy.load(model, device="cpu"),
            rows(),
            tmp_path / called(algorithm),
        )
        for key in trainer.step():
            name = key.split("/")[0] + "/*" if key.startswith("signals/") else key
            assert f"`{name}`" in text, name


def test_data_order_walks_every_prompt_once_an_epoch(tmp_path):
    model = save("llama", tmp_path / "model")
    trainer = Trainer(
        config(model, tmp_path, prompts_per_step=5), Policy.load(model, device="cpu"), rows(), tmp_path / "run"
    )
    walked = [i for step in range(12) for i in trainer._places(step).tolist()]
    for epoch in range(5):
        assert sorted(walked[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert walked[:12] != walked[12:24]


def test_a_resumed_run_takes_the_kl_coef_it_is_given(tmp_path):
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    settings = config(model, run, steps=2, algorithm=GRPO(kl_coef=0.0))
    train(settings, Policy.load(model, device="cpu"), rows(), run)
    seen = []
    longer = replace(settings, steps=3, algorithm=GRPO(kl_coef=0.2))
    train(longer, Policy.load(model, device="cpu"), rows(), run, resume=True, on_step=seen.append)
    assert [(m["step"], m["kl_coef"]) for m in seen] == [(3, 0.2)] and seen[0]["kl"] > 0


def test_the_heads_that_a_run_began_with_stay_with_it(tmp_path):
    model, run = model_path("causal"), tmp_path / "run"
    stories = [Row(row["prompt"]) for row in make_rows("conflict", "train", 8)]
    settings = config(model, run, steps=1, reward="certainty")
    train(settings, Policy.load(model, device="cpu"), stories, run)
    assert not (run / FILE_NAME).exists()
    kept = []
    for steps in (2, 3):
        later = replace(settings, steps=steps, reward="attention")
        train(later, Policy.load(model, device="cpu"), stories, run, resume=True)
        kept.append(load_heads(run))
    assert torch.equal(kept[0].scores, kept[1].scores)


COHERENCE = {"weights": {"coherence": 1.0}, "normalise": "none"}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    ("reward", "kl_coef", "frozen"),
    [("overlap", 0.0, 0), ("certainty", 0.0, 0), (COHERENCE, 0.0, 1), ("overlap", 0.04, 1), (COHERENCE, 0.04, 1)],
    ids=["text", "the policy reads", "the start reads", "text and KL", "the start reads, and KL"],
)
def test_training_holds_no_network_that_nothing_reads(family, reward, kl_coef, frozen, tmp_path):
    """A frozen start where the reward is read by it or KL is charged, one for both; else none."""
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu")
    gc.collect()
    before = sum(type(held) is type(policy.network) for held in gc.get_objects())
    settings = config(model, tmp_path, reward=reward, algorithm=GRPO(kl_coef=kl_coef))
    trainer = Trainer(settings, policy, rows(), tmp_path / "run")
    metrics = trainer.step()
    gc.collect()
    assert sum(type(held) is type(policy.network) for held in gc.get_objects()) - before == frozen
    assert ("kl" in metrics) == bool(frozen), "KL from the start costs nothing more where the start is held"


def test_a_reference_that_a_reward_brings_is_not_read_where_nothing_asks_for_it(tmp_path):
    model = save("llama", tmp_path / "model")
    policy = Policy.load(model, device="cpu")
    reward = Reward(config_of("overlap"), policy, reference=policy.reference())
    settings = config(model, tmp_path, reward="overlap", algorithm=GRPO(kl_coef=0.0))
    trainer = Trainer(settings, policy, rows(), tmp_path / "run", reward=reward)
    assert trainer.reference is None and "kl" not in trainer.step()


def test_kl_is_zero_at_the_start_and_grows(tmp_path):
    model = save("llama", tmp_path / "model")
    seen = []
    train(
        config(model, tmp_path / "run", steps=10),
        Policy.load(model, device="cpu"),
        rows(),
        tmp_path / "run",
        on_step=seen.append,
    )
    assert abs(seen[0]["kl"]) < 1e-4
    assert seen[-1]["kl"] > 0.01


def test_lora_trains_the_adapter_and_leaves_the_base(tmp_path):
    model = save("llama", tmp_path / "model")
    policy = Policy.load(model, device="cpu", lora=Lora(rank=4, alpha=8))
    before = policy.network.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    out = train(
        config(model, tmp_path / "run", lora=Lora(rank=4, alpha=8), learning_rate=1e-2),
        policy,
        rows(),
        tmp_path / "run",
    )
    assert out.steps == 4
    assert torch.equal(policy.network.model.layers[0].mlp.up_proj.base_layer.weight, before)
    trained = load_file(tmp_path / "run/checkpoints/step-4/trained.safetensors")
    assert trained and all("lora" in name for name in trained)


CHILD = """
import sys
from adhere.model.policy import Policy
from adhere.learn.train import train
from adhere.learn.settings import {algorithm}
from adhere.resume import new_run_dir
from tests.test_train import config, rows
import torch
torch.set_num_threads(1)
model, run, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
changes = dict(reward="tests.test_train:says_w7", dynamic_sampling=2, prompts_per_step=3) if {dynamic} else {{}}
settings = config(model, run, algorithm={algorithm}(kl_target=0.01), steps=14, save_every=3, **changes)
policy = Policy.load(model, device="cpu")
train(settings, policy, rows(), new_run_dir(run, resume), resume=resume, on_step=lambda m: print("step", flush=True))
"""


@pytest.mark.parametrize(
    ("family", "algorithm", "steps", "dynamic"),
    [
        ("llama", "PPO", 5, False),
        ("t5", "GRPO", 8, False),
        ("llama", "Reinforce", 11, False),
        ("llama", "GRPO", 7, True),
    ],
)
def test_killed_and_resumed_ends_bit_equal(family, algorithm, steps, dynamic, tmp_path):
    """`kill -9` after a few steps, wherever the process happens to be, then resume."""
    model = save(family, tmp_path / "model")
    code = CHILD.format(algorithm=algorithm, dynamic=dynamic)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(run, how):
        arguments = [sys.executable, "-c", code, str(model), str(run), how]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)

    whole = start(tmp_path / "whole", "new")
    killed = start(tmp_path / "killed", "new")
    assert killed.stdout is not None
    for _ in range(steps):
        assert killed.stdout.readline() == "step\n"
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    tables = tmp_path / "killed" / "completions"
    (tables / ".step-000012.parquet.1a2b3c4d.partial").write_bytes(b"as if it had been writing")
    (tables / "step-000013.parquet").write_bytes(b"of a step after the checkpoint")
    assert start(tmp_path / "killed", "resume").wait() == 0
    whole.communicate()
    assert whole.returncode == 0
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    every = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "completions").iterdir()}
        for name in ("whole", "killed")
    ]
    assert every[0] == every[1] and len(every[0]) == 14
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for left, right in zip(*logs, strict=True):
        timed = ("seconds", "tokens_per_second")
        assert {k: v for k, v in left.items() if not k.startswith(timed)} == {
            k: v for k, v in right.items() if not k.startswith(timed)
        }

    dropped = [line.get("dynamic_sampling/dropped", 0) for line in logs[0]]
    assert any(dropped) == dynamic and ("dynamic_sampling/drawn" in logs[0][0]) == dynamic


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_leave_a_checkpoint(number, tmp_path):
    before = signal.getsignal(number)
    model = save("llama", tmp_path / "model")
    run = tmp_path / "run"

    def press(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    trained = train(config(model, run, steps=50), Policy.load(model, device="cpu"), rows(), run, on_step=press)
    assert trained.interrupted and trained.steps == 2
    assert (run / "checkpoints" / "step-2" / "state.json").exists()
    assert not (run / "model").exists() and signal.getsignal(number) is before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model = save("llama", tmp_path / "model")
    run = tmp_path / "run"
    train(config(model, run), Policy.load(model, device="cpu"), rows(), run)
    with pytest.raises(UserError, match=r"trains other parameters.*value_head"):
        Trainer(config(model, run, algorithm=PPO()), Policy.load(model, device="cpu"), rows(), run, resume=True)


def test_weights_that_are_not_numbers_stop_the_run(tmp_path):
    model = save("llama", tmp_path / "model")
    policy = Policy.load(model, device="cpu")
    trainer = Trainer(config(model, tmp_path), policy, rows(), tmp_path / "run")
    trainer.step()
    with torch.no_grad():
        trainer.learner.network.lm_head.weight[5, 3] = float("nan")
    with pytest.raises(RunFailed, match="not numbers"):
        trainer.step()


def test_prompts_that_leave_no_room_to_answer_are_named(tmp_path):
    model = save("llama", tmp_path / "model")
    long = Row(prompt="w1 " * 126, where="prompts.jsonl:3")
    with pytest.raises(UserError, match=r"prompts.jsonl:3: .*max_new_tokens to 2"):
        Trainer(config(model, tmp_path), Policy.load(model, device="cpu"), [*rows(), long], tmp_path / "run")


STEADY = {
    "kl": 0.5,
    "completions/mean_length": 10.0,
    "completions/agreement": 0.5,
    "completions/one_text": 0.1,
    "entropy": 1.0,
    "frac_reward_zero_std": 0.2,
}


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ({"kl": 50.0}, "KL from the start is 50.00"),
        ({"completions/mean_length": 1.0}, "length fell from 10.0 to 1.0"),
        ({"completions/mean_length": 60.0}, "length rose from 10.0 to 60.0"),
        ({"entropy": 0.01, "completions/agreement": 0.9}, "to 0.010 nats a token, agreement among samples is 90%"),
        ({"frac_reward_zero_std": 1.0}, "100% of the groups"),
        ({"completions/one_text": 0.4}, "one text makes up 40% of the responses to different prompts, from 10%"),
    ],
)
def test_runs_that_go_wrong_stop_with_a_reason(late, reason):
    limits = Stopping(window=3)
    history = [STEADY] * 6
    assert reason_to_stop(history, limits) is None
    assert reason in reason_to_stop([*history, *[{**STEADY, **late}] * 3], limits)


def test_agreement_is_the_share_that_says_what_most_say():
    prompts = Prompts(("a", "b"), torch.zeros(2, 1), torch.full((2, 1), Role.USER), ((), ()))
    said = ("x", "x", "y", "x", "p", "q", "q", "p")
    ids = torch.zeros(8, 1)
    rollout = Rollout(prompts, torch.tensor([0] * 4 + [1] * 4), ids, ids.bool(), ids[:, 0].bool(), said)
    assert _agreement(rollout) == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_one_text_counts_only_where_it_answers_different_prompts():
    prompts = Prompts(("a", "b"), torch.zeros(2, 1), torch.full((2, 1), Role.USER), ((), ()))
    said = ("x", "x", "x", "1921", "1921.", "q", "q", "p")
    ids = torch.zeros(8, 1)
    rollout = Rollout(prompts, torch.tensor([0] * 4 + [1] * 4), ids, ids.bool(), ids[:, 0].bool(), said)
    assert _one_text(rollout) == pytest.approx(2 / 8)


def test_answers_that_were_alike_from_the_start_are_no_collapse():
    """As where prompts ask for yes or no."""
    often = {**STEADY, "completions/one_text": 0.5}
    assert reason_to_stop([often] * 4 + [{**often, "completions/one_text": 0.9}] * 3, Stopping(window=3)) is None


def test_one_text_stops_a_run_after_half_a_window():
    history = [STEADY] * 5 + [{**STEADY, "completions/one_text": 0.6}] * 5
    assert "one text" in reason_to_stop(history, Stopping(window=10))
    assert reason_to_stop(history[:9], Stopping(window=10)) is None
    assert reason_to_stop(history, Stopping(window=10, max_one_text=1.0)) is None


def test_an_early_stop_ends_the_run_with_a_model(tmp_path):
    model = save("llama", tmp_path / "model")
    run = tmp_path / "run"
    settings = config(model, run, steps=30, stopping=Stopping(max_kl=1e-9, window=2))
    trained = train(settings, Policy.load(model, device="cpu"), rows(), run)
    assert trained.steps == 4 and trained.stopped is not None and "KL" in trained.stopped
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"num_samples": 1}, "num_samples is 1"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"schedule": "cosin"}, "unknown `schedule` 'cosin'; did you mean cosine"),
        ({"num_samples": 1, "algorithm": DPO()}, "dpo compares samples of one prompt"),
        ({"steps": 0, "trackers": ("wand",)}, "steps is 0; .*; unknown tracker 'wand'"),
        ({"sampling": Sampling(temperature=0)}, "greedily"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        config("m", "o", **changes)


@pytest.mark.parametrize("algorithm", [PPO(), Reinforce()], ids=lambda a: a.name)
def test_one_sample_is_enough_where_none_are_compared(algorithm):
    assert config("m", "o", num_samples=1, algorithm=algorithm).num_samples == 1


def test_kl_is_charged_by_the_algorithms_that_take_its_options(tmp_path):
    """`--kl-coef` is a flag of theirs; DPO, whose `beta` does that work, refuses it."""
    given = {"model": "m", "prompts": "p", "output": "o", "algorithm.kl_coef": "0.2", "algorithm.kl_target": "3"}
    assert load_config(TrainConfig, None, given).algorithm == GRPO(kl_coef=0.2, kl_target=3.0)
    assert {option.flag for option in options(TrainConfig)} >= {"--kl-coef", "--kl-target", "--kl-in"}
    with pytest.raises(UserError, match=r"`kl_coef` is an option of ppo and reinforce and rloo and grpo, not of dpo"):
        load_config(TrainConfig, None, {**given, "algorithm": "dpo"})
    old = tmp_path / "run.yaml"
    old.write_text("{model: m, prompts: p, output: o, kl_coef: 0.1}")
    with pytest.raises(UserError, match=r"unknown option 'kl_coef'; did you mean algorithm\.kl_coef"):
        load_config(TrainConfig, old)


def test_options_are_known_without_torch():
    """So that help, and errors in options, come at once."""
    code = "import sys, adhere.learn.settings as s; s.TrainConfig('m', 'p', 'o'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout == "False\n"


def test_the_learning_rate_warms_up_and_falls():
    settings = replace(config("m", "o"), steps=10, warmup_steps=2, learning_rate=1.0)
    assert [round(settings.rate(step), 3) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


def test_an_encoder_decoder_run_loads_with_automodel(tmp_path):
    model = save("bart", tmp_path / "model")
    run = tmp_path / "run"
    train(config(model, run, steps=2), Policy.load(model, device="cpu"), rows(), run)
    assert AutoModelForSeq2SeqLM.from_pretrained(run / "model").config.is_encoder_decoder


PAIR = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from adhere.data import Row
from adhere.learn.settings import {algorithm}
from adhere.learn.train import Trainer
from adhere.model.policy import Policy
from adhere.model.settings import Lora
from adhere.toy import make_rows
from tests.test_train import config, rows
torch.set_num_threads(1)
model, run = sys.argv[1], Path(sys.argv[2])
state = PartialState(cpu=True)
torch.manual_seed(state.process_index)  # so that fresh adapters differ until they are made equal
policy = Policy.load(model, device="cpu", lora=Lora(rank=2, alpha=4))
# A budget of one group a micro-batch, and groups of unequal cost on the two processes.
changes = dict(max_tokens={tokens}, lora=Lora(rank=2, alpha=4), reward="{reward}")
settings = config(model, run, algorithm={algorithm}(), **changes)
stories = [Row(row["prompt"]) for row in make_rows("conflict", "train", 12)]
trainer = Trainer(settings, policy, stories if settings.reward == "attention" else rows(), run)
for _ in range(3):
    metrics = trainer.step()
weights = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
heads = None if trainer.reward.heads is None else trainer.reward.heads.scores.tolist()
torch.save((weights, metrics["loss"], metrics["reward"], heads), run / f"rank-{{state.process_index}}.pt")
state.wait_for_everyone()
state.destroy_process_group()  # a process that ends with its group alive may abort
"""


@pytest.mark.parametrize(
    ("algorithm", "reward", "tokens"),
    [("GRPO", "attention", 512), ("PPO", "tests.test_train:says_garden", 40)],
    ids=["GRPO", "PPO"],
)
def test_two_processes_stay_in_step(algorithm, reward, tokens, tmp_path):
    """`torchrun` on two CPU processes: the same weights, loss, reward and copy heads on both after three steps; one
    log."""
    own = reward == "attention"  # an untrained model has no copy heads
    model, run = model_path("causal") if own else save("llama", tmp_path / "model"), tmp_path / "run"
    run.mkdir()
    script = tmp_path / "pair.py"
    script.write_text(PAIR.format(algorithm=algorithm, reward=reward, tokens=tokens))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(script), str(model), str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (one, *figures), (other, *same) = (torch.load(run / f"rank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other)
    assert figures == same and (figures[-1] is not None) == own
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert pandas.read_parquet(run / "completions").groupby(["step", "prompt"]).size().tolist() == [4] * 12  # of both
