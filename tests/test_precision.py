"""Numbers: what is trained is float32 whatever the checkpoint and `dtype` are, nothing that is not finite is ever
saved, a run goes on only with the numbers it began with, and what accelerate asks for is followed or refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adhere.cli import main
from adhere.errors import RunFailed, UserError
from adhere.learn.settings import GRPO, TrainConfig
from adhere.learn.train import Trainer, train
from adhere.model.policy import Policy
from adhere.model.precision import require_finite
from adhere.model.settings import Lora, Sampling
from tests.families import save, tokenizer
from tests.test_train import config, rows

AUTO = {"llama": AutoModelForCausalLM, "bart": AutoModelForSeq2SeqLM, "t5": AutoModelForSeq2SeqLM}
PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 ?"]


def stored_as(dtype: torch.dtype, family: str, folder: Path) -> Path:
    """A checkpoint whose weights are stored in `dtype`."""
    AUTO[family].from_pretrained(save(family, folder)).to(dtype).save_pretrained(folder)
    return folder


def varied(evidence):
    """A reward that no two responses share, so that every group has a gradient."""
    reading = evidence.reading
    return (reading.response_ids * reading.response_mask).sum(-1).float()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows()))
    return path


def test_weights_that_a_step_has_broken_stop_the_run_at_that_step(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model")
    policy = Policy.load(model, device="cpu")
    trainer = Trainer(config(model, tmp_path), policy, rows(), tmp_path / "run")
    trainer.step()
    # What the second moment of AdamW is after an overflow: the loss and the gradient of this step are sound.
    for group in trainer.optimizer.state.values():
        group["exp_avg"].fill_(torch.inf)
    with pytest.raises(RunFailed, match=r"^step 2: .* is not finite, so nothing is saved; lower learning_rate"):
        trainer.step()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_checkpoint_trains_as_its_float32_copy_does(dtype, family: str, tmp_path: Path) -> None:
    half = stored_as(dtype, family, tmp_path / "half")
    whole = shutil.copytree(half, tmp_path / "whole")
    AUTO[family].from_pretrained(half, dtype=torch.float32).save_pretrained(whole)
    ends = {}
    for model in (half, whole):
        run = tmp_path / f"run-{model.name}"
        settings = config(model, run, learning_rate=1e-5, reward="tests.test_precision:varied")
        train(settings, Policy.load(model, device="cpu"), rows(), run)
        ends[model.name] = load_file(run / "model" / "model.safetensors")
    start = load_file(whole / "model.safetensors")
    assert all(torch.equal(ends["half"][name], weight) for name, weight in ends["whole"].items())
    assert {weight.dtype for weight in ends["half"].values()} == {torch.float32}
    matrices = [name for name in start if "proj" in name]
    moved = sum(int((ends["half"][name] != start[name]).sum()) for name in matrices)
    assert moved > 0.9 * sum(start[name].numel() for name in matrices)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bfloat16_is_what_is_computed_in_and_never_what_is_trained(family: str, tmp_path: Path) -> None:
    """Eight steps of 1e-6 on weights near 0.2, whose last bit in bfloat16 is 1e-3: each would be rounded away."""
    model, run = save(family, tmp_path / "model"), tmp_path / "run"
    more = {"learning_rate": 1e-6, "warmup_steps": 0, "schedule": "constant", "steps": 8}
    settings = config(model, run, dtype="bfloat16", reward="tests.test_precision:varied", **more)
    policy = Policy.load(model, dtype="bfloat16", device="cpu", train=True)
    start = {name: weight.clone() for name, weight in policy.network.named_parameters()}
    stored = load_file(model / "model.safetensors")
    assert all(torch.equal(start[name], weight) for name, weight in stored.items() if name in start)
    train(settings, policy, rows(), run)
    assert {weight.dtype for weight in policy.network.parameters()} == {torch.float32}
    trained = load_file(run / "model" / "model.safetensors")
    moved = {name: (trained[name] - weight.detach()).abs().median().item() for name, weight in start.items()
             if re.search(r"(proj|\.[qkvo]|wi|wo)\.weight$", name)}  # fmt: skip
    assert moved and all(1e-6 < distance < 1e-5 for distance in moved.values()), moved


@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_a_policy_that_computes_in_bfloat16_samples_replays_and_learns_alike(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, dtype="bfloat16", device="cpu", train=True)
    trainer = Trainer(config(model, tmp_path, dtype="bfloat16"), policy, rows(), tmp_path / "run")
    prompts = policy.encode(PROMPTS)
    rollout = policy.sample(prompts, 4, sampling=Sampling(max_new_tokens=6), seed=2)
    replay = policy.read(rollout).logprobs
    learned = trainer.learner(rollout).logprobs
    exact = Policy.load(model, device="cpu").read(rollout).logprobs
    kept = rollout.response_mask
    reference = policy.reference().read(rollout).logprobs
    for found in (replay, learned.detach(), reference):
        assert (found - rollout.logprobs)[kept].abs().max() < 0.05  # 2⁻⁸ of logits near 5
    assert 0 < (replay - exact)[kept].abs().max() < 0.05
    assert learned.requires_grad


def test_scoring_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    folder = stored_as(torch.bfloat16, "llama", tmp_path / "m")
    assert Policy.load(folder, device="cpu").network.dtype == torch.bfloat16
    assert Policy.load(folder, device="cpu", train=True).network.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_float16_checkpoint_leaves_numbers(family: str, tmp_path: Path) -> None:
    model = stored_as(torch.float16, family, tmp_path / "m")
    run = tmp_path / "r"
    places = ["--model", str(model), "--prompts", str(write_prompts(tmp_path / "p.jsonl")), "--output", str(run)]
    flags = ["--steps", "1", "--prompts-per-step", "4", "--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    assert main(["train", *places, *flags, "--reward", "length", "--skip-audit"]) == 0
    require_finite(load_file(run / "model" / "model.safetensors").items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "float16 cannot be trained in.*use --dtype bfloat16"),
        ({"dtype": "float64"}, "unknown dtype 'float64'; use one of auto, float32, bfloat16"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; set it to 0 or above, at most 10"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"kl_coef": float("inf")}, "kl_coef is inf"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; set it above 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf; set it above 0, finite"),
        ({"prompts_per_step": 10**12}, r"prompts_per_step is 1000000000000; set it to 1 or above, at most 1,000,000"),
        ({"prompts_per_step": 10**5, "num_samples": 1000}, r"is 6,400,000,000 tokens a step; lower one of them"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; set it above 0"),
        ({"save": "adapter"}, "save is adapter, but no adapter is trained; add --lora"),
    ],
)
def test_numbers_that_cannot_be_trained_with_are_refused(changes, message: str) -> None:
    make = GRPO if "kl_coef" in changes else partial(TrainConfig, "m", "p", "o")
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_policy_is_not_prepared_for_float16(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16 cannot be trained in"):
        Policy.load(save("llama", tmp_path), dtype="float16", device="cpu", train=True)


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_not_finite_is_never_saved(family: str, lora, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu", lora=lora)
    trainer = Trainer(config(model, tmp_path, lora=lora), policy, rows(), tmp_path / "run")
    trainer.step()
    trainer.save()
    name, weight = list(trainer.parameters.items())[-1]
    with torch.no_grad():
        weight.view(-1)[0] = torch.inf
    trainer.state.step += 1
    before = files(tmp_path / "run")
    for write in (trainer.save, trainer.save_model):
        with pytest.raises(RunFailed, match=r"is not finite, so nothing is saved; lower learning_rate") as caught:
            write()
        assert name.removeprefix("network.").split(".")[-2] in str(caught.value)
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "bfloat16"], "began with other settings: dtype was float32, is bfloat16"),
        (["--lora"], "lora was False, is True"),
        (["--algorithm", "ppo"], r"trains other parameters.*value_head"),
    ],
    ids=["dtype", "lora", "algorithm"],
)
def test_a_run_goes_on_only_as_it_began(more, message: str, family: str, tmp_path: Path, capsys) -> None:
    model, run = save(family, tmp_path / "model"), tmp_path / "run"
    places = ["--model", str(model), "--prompts", str(write_prompts(tmp_path / "p.jsonl")), "--output", str(run)]
    flags = ["--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "3", "--device", "cpu", "--quiet"]
    assert main(["train", *places, *flags, "--reward", "length", "--steps", "1", "--skip-audit"]) == 0
    before = files(run)
    again = ["train", "--output", str(run), "--resume", "--quiet", "--steps", "2"]
    assert main([*again, *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and files(run) == before
    assert re.search(message, said[0])
    assert main([*again, "--dtype", "float32"]) == 0  # what auto has meant all along
    assert (run / "checkpoints" / "step-2").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"alpha": 8}, "lora_alpha was 4, is 8"), ({"use_rslora": True}, "lora_use_rslora was False, is True")],
)
def test_an_adapter_is_resumed_with_its_own_scale(change, message: str, tmp_path: Path) -> None:
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    lora = Lora(rank=2, alpha=4)
    settings = config(model, run, steps=1, lora=lora)
    train(settings, Policy.load(model, device="cpu", lora=lora), rows(), run)
    other = replace(lora, **change)
    with pytest.raises(UserError, match=message):
        Trainer(replace(settings, lora=other), Policy.load(model, device="cpu", lora=other), rows(), run, resume=True)


def test_a_checkpoint_of_other_shapes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    settings = config(model, run, steps=1)
    train(settings, Policy.load(model, device="cpu"), rows(), run)
    before = files(run)
    wider = AutoModelForCausalLM.from_pretrained(model)
    wider.resize_token_embeddings(80)
    wider.save_pretrained(tmp_path / "wider")
    tokenizer().save_pretrained(tmp_path / "wider")
    policy = Policy.load(tmp_path / "wider", device="cpu")
    with pytest.raises(UserError, match=r"is float32 \[64, 32\] in the checkpoint, float32 \[80, 32\]"):
        Trainer(settings, policy, rows(), run, resume=True)
    assert files(run) == before


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told(name: str, tmp_path: Path) -> None:
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    train(config(model, run, steps=1), Policy.load(model, device="cpu"), rows(), run)
    file = run / "checkpoints" / "step-1" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"step-1.*: damaged, as every checkpoint of the run is; put back a sound copy"):
        Trainer(config(model, run), Policy.load(model, device="cpu"), rows(), run, resume=True)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "use --dtype bfloat16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "use --dtype bfloat16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set max_tokens"),
        ("ACCELERATE_USE_FSDP", "true", "plain data parallelism"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "plain data parallelism"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "plain data parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "without --dynamo_backend"),
    ],
)
def test_what_accelerate_asks_for_is_not_left_undone(name: str, value: str, fix: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    model = save("llama", tmp_path / "model")
    with pytest.raises(UserError, match=rf"{name} is {value}, which training does not follow; unset it; .*{fix}"):
        Trainer(config(model, tmp_path), Policy.load(model, device="cpu"), rows(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_accelerate_always_sets_is_fine(tmp_path: Path, monkeypatch) -> None:
    """And bf16 where `dtype` says the same; the optimiser's weights are float32 all the same."""
    model = save("llama", tmp_path / "model")
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    Trainer(config(model, tmp_path), Policy.load(model, device="cpu"), rows(), tmp_path / "run").step()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settings = config(model, tmp_path, dtype="bfloat16")
    trainer = Trainer(settings, Policy.load(model, device="cpu", train=True), rows(), tmp_path / "other")
    trainer.step()
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
