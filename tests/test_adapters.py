"""LoRA as PEFT knows it: what a run saves PEFT loads with the same log-probs, options mean what they mean there, and
what cannot be merged is refused before training."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from adhere.cli import main
from adhere.errors import UserError
from adhere.learn.train import Trainer, train
from adhere.model import adapters
from adhere.model.policy import Policy
from adhere.model.settings import Lora, Sampling
from tests.families import CAUSAL, build, save, tokenizer
from tests.test_train import config, rows

AUTO = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}
BOTH = pytest.mark.parametrize("family", ["llama", "t5"])
PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 ?"]
LORA = Lora(rank=4, alpha=8)


def said(policy: Policy) -> torch.Tensor:
    return policy.read(PROMPTS, ["w1 w2", "w3"]).logprobs


def trained(model: Path, run: Path, **changes) -> Policy:
    settings = config(model, run, **{"lora": LORA, "learning_rate": 2e-2, "steps": 3, **changes})
    policy = Policy.load(model, device="cpu", lora=settings.lora, dtype=settings.dtype, train=True)
    train(settings, policy, rows(), run)
    return policy


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@BOTH
def test_peft_loads_the_adapter_of_a_run_with_equal_log_probs(family: str, dtype: str, tmp_path: Path) -> None:
    model, run = save(family, tmp_path / "model"), tmp_path / "run"
    policy = trained(model, run, dtype=dtype)
    exact = 1e-4 if dtype == "auto" else 0.1
    base = AUTO[family].from_pretrained(model, dtype=policy.network.dtype)
    before = said(Policy(base, policy.tokenizer))
    again = said(Policy(PeftModel.from_pretrained(base, run / "adapter").eval(), policy.tokenizer))
    merged = Policy.load(run / "model", device="cpu")
    assert (again - before).abs().max() > 0.1
    assert torch.equal(again, said(policy))
    assert torch.allclose(said(merged), again, atol=exact)
    assert torch.allclose(said(Policy.load(run / "adapter", dtype="float32", device="cpu")), said(merged), atol=exact)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert {weight.dtype for weight in load_file(run / file).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("asked", "left"), [("merged", {"model"}), ("adapter", {"adapter"}), ("both", {"model", "adapter"})]
)
def test_a_run_leaves_what_it_was_asked_for(asked: str, left: set[str], tmp_path: Path) -> None:
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    trained(model, run, save=asked, steps=1)
    assert {name for name in ("model", "adapter") if (run / name).exists()} == left


def test_a_run_without_lora_leaves_no_adapter(tmp_path: Path) -> None:
    model, run = save("llama", tmp_path / "model"), tmp_path / "run"
    trained(model, run, lora=None, steps=1)
    assert (run / "model").exists() and not (run / "adapter").exists()


@BOTH
def test_options_are_those_of_peft(family: str, tmp_path: Path) -> None:
    names = ("q_proj", "v_proj") if family == "llama" else ("q", "v")
    lora = Lora(rank=4, alpha=8, dropout=0.25, use_rslora=True, target_modules=names)
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu", lora=lora)
    adapters.save(policy.model, tmp_path / "adapter")
    found = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 8, 0.25, True)
    assert set(found.target_modules) == set(lora.target_modules)
    assert found.base_model_name_or_path == str(model)
    changed = [module for name, module in policy.network.named_modules() if hasattr(module, "lora_A")]
    scales = {module.scaling["default"] for module in changed}
    assert scales == {8 / math.sqrt(4)}
    attentions = {"llama": 3, "t5": 9}  # three layers; T5: encoder, decoder and cross-attention of three each
    assert len(changed) == 2 * attentions[family]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_dropout_is_active_in_the_update_alone(family: str, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=8, dropout=0.5)
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu", lora=lora)
    trainer = Trainer(config(model, tmp_path, lora=lora), policy, rows(), tmp_path / "run")
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    rollout = policy.sample(policy.encode(PROMPTS), 3, sampling=Sampling(max_new_tokens=5), seed=3)
    assert torch.allclose(policy.read(rollout).logprobs, rollout.logprobs, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(trainer.learner(rollout).logprobs, rollout.logprobs, atol=1e-4)
    dropped = [trainer.learner(rollout).logprobs for _ in range(2)]
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-2)
    assert torch.allclose(policy.read(rollout).logprobs, rollout.logprobs, atol=1e-4)


def test_an_adapter_on_the_head_drops_nothing(tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=8, dropout=0.5, target_modules=("lm_head", "q_proj"))
    policy = Policy.load(save("llama", tmp_path / "model"), device="cpu", lora=lora)
    with adapters.dropout(policy.network):
        active = {name for name, module in policy.network.named_modules() if "lora_dropout" in name and module.training}
    assert active
    assert not [name for name in active if "lm_head" in name and "default" in name]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_without_dropout_the_first_update_reads_the_log_probs_of_the_sample(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu", lora=LORA)
    trainer = Trainer(config(model, tmp_path, lora=LORA), policy, rows(), tmp_path / "run")
    rollout = policy.sample(policy.encode(PROMPTS), 3, sampling=Sampling(max_new_tokens=5), seed=3)
    assert torch.allclose(trainer.learner(rollout).logprobs, rollout.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0; set it to 0 or above, below 1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"target_modules": ()}, "lora target_modules is empty"),
    ],
)
def test_options_that_make_no_adapter(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(**settings)


@pytest.mark.parametrize(("family", "names"), [("llama", "down_proj, gate_proj, k_proj"), ("t5", "k, o, q, v, wi, wo")])
def test_modules_that_are_not_there_are_told_with_those_that_are(family: str, names: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no adapter for target_modules nonesuch; choose among {names}"):
        Policy.load(save(family, tmp_path), device="cpu", lora=Lora(target_modules=("nonesuch",)))


def tied(family: str, folder: Path) -> Path:
    """A checkpoint whose head is its embedding."""
    model = build(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_tied_model_is_merged_with_its_head_still_tied(family: str, tmp_path: Path) -> None:
    model, run = tied(family, tmp_path / "model"), tmp_path / "run"
    policy = trained(model, run)
    merged = Policy.load(run / "model", device="cpu")
    assert merged.network.get_output_embeddings().weight is merged.network.get_input_embeddings().weight
    assert torch.allclose(said(merged), said(policy), atol=1e-4)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_is_refused(module: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"target_modules names {module}, which shares its weight with the embedding"):
        Policy.load(tied("llama", tmp_path), device="cpu", lora=Lora(target_modules=("q_proj", module)))


@BOTH
def test_quantised_weights_are_trained_by_an_adapter_that_is_not_merged(family: str, tmp_path: Path) -> None:
    """transformers marks such a network; what the mark means for training is the same for every method."""
    model = save(family, tmp_path / "model")
    policy = Policy.load(model, device="cpu")
    policy.network.is_quantized = True
    with pytest.raises(UserError, match="quantised weights cannot be trained; add --lora"):
        Trainer(config(model, tmp_path), policy, rows(), tmp_path / "run")
    policy = Policy.load(model, device="cpu", lora=LORA)
    policy.network.is_quantized = True
    with pytest.raises(UserError, match="cannot be merged into quantised weights; use --save adapter"):
        Trainer(config(model, tmp_path, lora=LORA), policy, rows(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    settings = config(model, tmp_path / "run", lora=LORA, save="adapter", steps=1)
    train(settings, policy, rows(), tmp_path / "run")
    assert (tmp_path / "run" / "adapter").exists()
    with pytest.raises(UserError, match="cannot be merged into quantised weights"):
        policy.save(tmp_path / "merged")


def test_a_network_in_four_bits_learns_by_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, run = tmp_path / "model", tmp_path / "run"
    sizes = {**CAUSAL["llama"], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks of 64 weights
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path / "whole")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=four)
    quantised.save_pretrained(model)
    tokenizer().save_pretrained(model)
    policy = trained(model, run, save="adapter")
    before = said(Policy.load(model, device="cpu"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run / "adapter").eval()
    apart = (said(Policy(again, policy.tokenizer)) - said(policy)).abs().max()
    assert apart < 0.02 < (said(policy) - before).abs().max()  # bitsandbytes computes in bfloat16 on a CPU
    with pytest.raises(UserError, match="its base is quantised: merging would round the adapter away"):
        Policy.load(run / "adapter", device="cpu")


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_run_with_adapters_causes_no_warning(family: str, tmp_path: Path, caplog) -> None:
    """Neither by Python's warnings nor in the logs of transformers and PEFT."""
    model, run = save(family, tmp_path / "model"), tmp_path / "run"
    for name in ("transformers", "peft"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained(model, run, steps=1)
            Policy.load(run / "model", device="cpu")
            Policy.load(run / "adapter", device="cpu", lora=LORA)
    finally:
        for name in ("transformers", "peft"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_command_line_says_what_a_run_left(tmp_path: Path, capsys) -> None:
    model, prompts, run = save("llama", tmp_path / "model"), tmp_path / "p.jsonl", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows()))
    places = ["--model", str(model), "--prompts", str(prompts), "--output", str(run), "--device", "cpu", "--json"]
    flags = ["--steps", "1", "--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "3", "--skip-audit"]
    more = ["--lora", "--lora-target-modules", "q_proj", "v_proj", "--lora-dropout", "0.1", "--save", "adapter"]
    assert main(["train", *places, *flags, "--reward", "length", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == str(run / "adapter") and found["model"] is None
    assert not (run / "model").exists() and (run / "report.html").exists()
