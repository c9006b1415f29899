"""Loading a checkpoint: every weight comes from the file and finds its place; what is damaged, missing, quantised or in
need of code of its own works or is told in one line that names the file; adapters are merged into their base. The same
wherever a network is loaded: policies, reward models and embedders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Qwen2Config, Qwen2ForCausalLM

from adhere.cli import main
from adhere.errors import UnsupportedModel, UserError
from adhere.measure.readers import Embedder
from adhere.model.load import load
from adhere.model.policy import Policy
from adhere.preferences.fit import PreferenceConfig, fit
from adhere.reward.preference import CARD, PreferenceModel
from tests.families import CAUSAL, SEQ2SEQ, build, save, tokenizer

PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 ?"]
BOTH = pytest.mark.parametrize("family", ["llama", "t5"])
AUTO = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4168512\n"
WEIGHTS, SHARD, INDEX = "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"

Change = Callable[[Path], Any]


def config(**more: Any) -> Change:
    return rewritten("config.json", **more)


def rewritten(name: str, **more: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def without(*parts: str) -> Change:
    return weights(lambda found: {name: w for name, w in found.items() if not any(part in name for part in parts)})


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, keep: float = 0.5) -> Change:
    def shorten(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(keep * len(whole))] if keep < 1 else whole[:-1])

    return shorten


def sharded(weight_map: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def layers(count: int) -> Change:
    return config(num_hidden_layers=count, num_layers=count, num_decoder_layers=count)


def quantised(method: str, **more: Any) -> Change:
    return config(quantization_config={"quant_method": method, **more})


REFUSED: dict[str, tuple[Change, str]] = {
    "untied head that the file lacks": (
        lambda folder: (without("lm_head")(folder), config(tie_word_embeddings=False)(folder)),
        r": lacks the weights lm_head\.weight; give the whole checkpoint",
    ),
    "layer that the file lacks": (
        without("layers.1.", "block.1."),
        r"lacks the weights (model\.layers\.1|decoder\.block\.1)\S+, .* and \d+ more",
    ),
    "more layers than the file has": (layers(5), r"lacks the weights (model\.layers|decoder\.block)\.3"),
    "fewer layers than the file has": (layers(2), r"no place for: (model\.layers|decoder\.block)\.2"),
    "a value head": (
        weights(lambda found: found | {"v_head.weight": torch.ones(2)}),
        r"holds weights that config\.json has no place for: v_head\.weight",
    ),
    "other sizes": (
        config(intermediate_size=52, d_ff=52),
        r"(down_proj|wi)\.weight is \[.*48.*\] in the file and \[.*52.*\] by config\.json, and \d+ more",
    ),
    "LFS pointer for weights": (text(WEIGHTS, POINTER), rf"{WEIGHTS}: is a Git LFS pointer.*; git lfs pull"),
    "LFS pointer for the tokenizer": (text("tokenizer.json", POINTER), r"tokenizer\.json: is a Git LFS pointer"),
    "LFS pointer for the configuration": (text("config.json", POINTER), r"config\.json: is a Git LFS pointer"),
    "half of the weights": (cut(WEIGHTS), rf"{WEIGHTS}: is damaged or cut short: .*download"),
    "all but a byte": (cut(WEIGHTS, 1), rf"{WEIGHTS}: is damaged or cut short"),
    "empty weights": (text(WEIGHTS, ""), rf"{WEIGHTS}: is damaged or cut short"),
    "garbage for weights": (text(WEIGHTS, "garbage " * 99), rf"{WEIGHTS}: is damaged or cut short"),
    "a missing shard": (
        sharded({"a": SHARD, "b": SHARD.replace("1", "2", 1)}),
        rf"{INDEX}: names model-00002-of-00002\.safetensors, which is not there",
    ),
    "an index of nothing": (sharded(["a"]), rf"{INDEX}: has no `weight_map`"),
    "shards without an index": (
        lambda folder: (folder / WEIGHTS).rename(folder / SHARD),
        rf"holds {SHARD}, but neither {WEIGHTS} nor {INDEX}",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    "half of the configuration": (cut("config.json"), r"config\.json: is not JSON: .*line \d+"),
    "a list for a configuration": (text("config.json", "[1]"), r"config\.json: holds a JSON list, not an object"),
    "ten million layers": (config(num_hidden_layers=10**7, num_layers=10**7), r"layers is 10,000,000, and the weights"),
    "a network far too wide": (config(hidden_size=10**6, d_model=10**6), r"describes a network of [\d,]+ numbers, and"),
    "a vocabulary far too large": (config(vocab_size=10**12), r"config\.json: describes a network of [\d,]+ numbers"),
    "a configuration of no family": (text("config.json", "{}"), r"config\.json: cannot be loaded: Unrecognized model"),
    "text for a size": (
        config(hidden_size="big", d_model="big"),
        r"config\.json: cannot be loaded: .*'(hidden_size|d_model)': .*expected int",
    ),
    "a dtype that is none": (config(dtype="float17"), r"config\.json: cannot be loaded: .*float17"),
    "no heads": (config(num_attention_heads=0, num_heads=0), r"config\.json: .*ZeroDivisionError"),
    "another activation": (
        config(hidden_act="nonesuch", dense_act_fn="nonesuch"),
        r"config\.json: no model can be made of it: KeyError 'nonesuch'",
    ),
    "half of the tokenizer": (cut("tokenizer.json"), r"tokenizer\.json: is not JSON"),
    "another tokenizer": (text("tokenizer.json", "{}"), r"tokenizer\.json: the tokenizer cannot be loaded: KeyError"),
    "half of its configuration": (cut("tokenizer_config.json"), r"tokenizer_config\.json: is not JSON"),
    "half of the generation configuration": (cut("generation_config.json"), r"generation_config\.json: is not JSON"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes\) and cannot be loaded"),
    "gptq": (quantised("gptq", bits=4), r"quantised \(gptq\) and cannot be loaded.*unquantised"),
    "awq": (quantised("awq", bits=4), r"quantised \(awq\) and cannot be loaded.*unquantised"),
    "flash attention, written": (
        config(attn_implementation="flash_attention_2"),
        r"config\.json asks for flash_attention_2, which is not installed; take attn_implementation out",
    ),
    "attention of another kind": (config(attn_implementation="nonesuch"), r"config\.json: .*\"nonesuch\""),
    "code of its own": (
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
        r"custom code.*; --trust-remote-code runs code",
    ),
}  # fmt: skip


class Checkpoints(dict[str, Path]):
    """A sound checkpoint of each family that a test asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, family: str) -> Path:
        self[family] = save(family, self.folder / family)
        return self[family]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("whole"))


@BOTH
@pytest.mark.parametrize("fault", REFUSED)
def test_a_checkpoint_that_is_not_whole_is_refused_in_a_line(fault: str, family: str, whole, tmp_path: Path) -> None:
    change, message = REFUSED[fault]
    folder = shutil.copytree(whole[family], tmp_path / "model")
    change(folder)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load(str(folder), device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


WORKS: dict[str, Change] = {
    "flash attention, left over": config(_attn_implementation="flash_attention_2"),
    "one shard": lambda folder: sharded(dict.fromkeys(load_file(folder / WEIGHTS), SHARD))(folder),
    "no quantisation": config(quantization_config=None),
    "another file beside": lambda folder: save_file({"a": torch.ones(1)}, folder / "consolidated.safetensors"),
}


@BOTH
@pytest.mark.parametrize("name", WORKS)
def test_a_checkpoint_that_only_looks_odd_is_the_same_model(name: str, family: str, whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[family], tmp_path / "model")
    WORKS[name](folder)
    found, sound = (Policy.load(place, device="cpu") for place in (folder, whole[family]))
    assert found.network.config._attn_implementation == "sdpa"
    assert torch.equal(found.read(PROMPTS, ["w1", "w2"]).logprobs, sound.read(PROMPTS, ["w1", "w2"]).logprobs)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_nothing_is_missed_in_what_transformers_itself_saved(family: str, tmp_path: Path) -> None:
    """Tied weights and buffers that are not stored are no fault, whatever the family."""
    model, _ = load(str(save(family, tmp_path)), device="cpu")
    expected = build(family).state_dict()
    stored = {name for name in expected if "embed_positions" not in name}  # Marian computes its sinusoids anew
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in stored)


def test_a_layer_that_a_small_model_does_not_have_may_be_named(tmp_path: Path) -> None:
    """Qwen 2 counts windows from layer 28, whatever its size."""
    folder = save("llama", tmp_path)
    few = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for file in folder.glob("*.safetensors"):
        file.unlink()
    Qwen2ForCausalLM(few).save_pretrained(folder)
    assert few.max_window_layers > len(load_file(folder / "model.safetensors"))
    load(str(folder), device="cpu")


def test_tables_that_old_checkpoints_carry_are_no_fault(whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole["llama"], tmp_path / "model")
    weights(lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(folder)
    load(str(folder), device="cpu")


def test_a_model_with_code_of_its_own_runs_it_only_when_told(whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole["llama"], tmp_path / "model")
    config(
        model_type="mine", auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    )(folder)  # fmt: skip
    lines = [
        "from transformers import LlamaConfig, LlamaForCausalLM",
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'",
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig",
    ]
    (folder / "mine.py").write_text("\n".join(lines))
    model, _ = load(str(folder), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    (folder / "mine.py").write_text("\n".join([*lines, "raise LookupError('broken')"]))
    with pytest.raises(UnsupportedModel, match=r"cannot be loaded: LookupError broken"):
        load(str(folder), device="cpu", trust_remote_code=True)


@pytest.mark.parametrize("name", ["nobody/nothing", "no such/name?", "nothing"])
def test_a_hub_id_that_cannot_be_had_is_told_in_a_line(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot be loaded: ") as caught:
        load(name, device="cpu")
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


def adapted(base: Path, family: str, folder: Path, **settings: Any) -> PeftModel:
    """An adapter of `base` that changes what it says, in `folder`."""
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    setting = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": task, **settings})
    model = get_peft_model(AUTO[family].from_pretrained(base), setting).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def same(policy: Policy, model: PeftModel) -> bool:
    """Whether `policy` says what `model` does, and not what its base does."""
    ours = policy.read(PROMPTS, ["w1 w2", "w3"]).logprobs
    theirs = Policy(model, policy.tokenizer).read(PROMPTS, ["w1 w2", "w3"]).logprobs
    base = Policy(model, policy.tokenizer).reference().read(PROMPTS, ["w1 w2", "w3"]).logprobs
    assert not torch.allclose(base, theirs, atol=1e-2)
    return torch.allclose(ours, theirs, atol=1e-4)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_an_adapter_folder_is_its_base_with_the_adapter(family: str, settings, whole, tmp_path: Path) -> None:
    expected = adapted(whole[family], family, tmp_path / "adapter", **settings)
    policy = Policy.load(tmp_path / "adapter", device="cpu")
    assert same(policy, expected)
    assert all(parameter.requires_grad for parameter in policy.network.parameters())
    assert torch.equal(  # what it was when it was loaded, not the base
        policy.reference().read(PROMPTS, ["w1", "w2"]).logprobs, policy.read(PROMPTS, ["w1", "w2"]).logprobs
    )


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers before 5.23 applies an adapter beside a model by itself",
)
@BOTH
def test_an_adapter_beside_its_base_is_applied_and_trained_with_it(family: str, whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[family], tmp_path / "m")
    expected = adapted(folder, family, folder)
    assert same(Policy.load(folder, device="cpu"), expected)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for more in ([], ["--lora-rank", "2"]):
        run = tmp_path / f"r{len(more)}"
        flags = ["--steps", "1", "--prompts-per-step", "2", "--num-samples", "4", "--max-new-tokens", "4"]
        places = ["--model", str(folder), "--prompts", str(prompts), "--output", str(run), "--device", "cpu"]
        assert main(["train", *places, *flags, "--reward", "length", "--skip-audit", "--quiet", *more]) == 0
        assert (run / "adapter").exists() == bool(more)


@pytest.mark.parametrize("named", ["absolute", "beside the adapter", "from here"])
def test_a_base_is_found_by_its_path(named: str, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = shutil.copytree(whole["llama"], tmp_path / "work" / "base")
    expected = adapted(base, "llama", tmp_path / "work" / "adapter")
    path = {"absolute": str(base), "beside the adapter": "../base", "from here": "base"}[named]
    rewritten("adapter_config.json", base_model_name_or_path=path)(tmp_path / "work" / "adapter")
    monkeypatch.chdir(tmp_path / "work" if named == "from here" else tmp_path)
    assert same(Policy.load(tmp_path / "work" / "adapter", device="cpu"), expected)


def other_adapter(**settings: Any) -> Change:
    return lambda folder: adapted(folder.parent / "base", "llama", folder, **settings)


def of_kind(setting: Any) -> Change:
    def change(folder: Path) -> None:
        get_peft_model(build("llama"), setting).save_pretrained(folder)
        rewritten("adapter_config.json", base_model_name_or_path=str(folder.parent / "base"))(folder)

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def adapter_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    path = "adapter_model.safetensors"
    return lambda folder: save_file(change(load_file(folder / path)), folder / path, metadata={"format": "pt"})


ADAPTERS: dict[str, tuple[Change, str]] = {
    "no such base": (
        rewritten("adapter_config.json", base_model_name_or_path="/no/such/base"),
        r"adapter_config\.json: its base model /no/such/base is not there; set base_model_name_or_path",
    ),
    "a base that the hub does not have": (
        rewritten("adapter_config.json", base_model_name_or_path="nobody/nothing"),
        r"adapter, its base nobody/nothing: cannot be loaded",
    ),
    "no base named": (rewritten("adapter_config.json", base_model_name_or_path=None), "names no base model"),
    "itself as base": (
        lambda folder: rewritten("adapter_config.json", base_model_name_or_path=str(folder))(folder),
        r"its base model /\S+/adapter is not there",
    ),
    "a model beside it": (
        lambda folder: shutil.copytree(folder.parent / "base", folder, dirs_exist_ok=True),
        r"is an adapter for .*base, but a model lies beside it.*; move one of the two",
    ),
    "prompt tuning": (
        of_kind(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        r"the adapter is PROMPT_TUNING, not LoRA",
    ),
    "another method": (
        of_kind(IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
        r"the adapter is IA3, not LoRA",
    ),
    "an unknown method": (rewritten("adapter_config.json", peft_type="NEW"), r"adapter cannot be read: .*NEW"),
    "half of its configuration": (cut("adapter_config.json"), r"adapter_config\.json: is not JSON"),
    "half of its weights": (cut("adapter_model.safetensors"), r"adapter_model\.safetensors: is damaged or cut short"),
    "LFS pointer": (text("adapter_model.safetensors", POINTER), r"adapter_model\.safetensors: is a Git LFS pointer"),
    "pickled": (pickled, "holds a pickled adapter only"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"holds no adapter_model"),
    "modules that the base lacks": (
        adapter_weights(lambda found: {name.replace("q_proj", "query"): w for name, w in found.items()}),
        r"the adapter (lacks|holds, but).*(q_proj|query)",
    ),
    "another rank": (rewritten("adapter_config.json", r=8), r"the adapter does not fit its base: .*size mismatch"),
    "modules of another family": (
        rewritten("adapter_config.json", target_modules=["c_attn"]),
        r"the adapter does not fit its base: .*c_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ADAPTERS)
def test_an_adapter_that_cannot_be_applied_is_refused_in_a_line(fault: str, whole, tmp_path: Path) -> None:
    change, message = ADAPTERS[fault]
    base = shutil.copytree(whole["llama"], tmp_path / "base")
    adapted(base, "llama", tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load(str(tmp_path / "adapter"), device="cpu")
    assert str(tmp_path / "adapter") in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    """A folder as `adhere preferences fit` writes it."""
    from transformers import AutoModelForSequenceClassification

    backbone = save("bart", tmp_path / "backbone")
    AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1).save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / CARD).write_text("{}")
    return tmp_path / "rm"


EVERYWHERE = {
    "LFS pointer": (text(WEIGHTS, POINTER), rf"{WEIGHTS}: is a Git LFS pointer"),
    "cut": (cut(WEIGHTS), rf"{WEIGHTS}: is damaged or cut short"),
    "layer": (without("layers.1."), r"lacks the weights \S*decoder\.layers\.1"),
    "sizes": (config(decoder_ffn_dim=52), r"fc1\.bias is \[48\] in the file and \[52\] by config\.json, and \d+ more"),
    "gptq": (quantised("gptq", bits=4), r"quantised \(gptq\)"),
    "configuration": (cut("config.json"), r"config\.json: is not JSON"),
    "tokenizer": (cut("tokenizer.json"), r"tokenizer\.json: is not JSON"),
}


@pytest.mark.parametrize("fault", EVERYWHERE)
def test_a_reward_model_is_loaded_with_the_same_care(fault: str, reward_model: Path) -> None:
    PreferenceModel.load(reward_model)
    change, message = EVERYWHERE[fault]
    change(reward_model)
    with pytest.raises(UserError, match=message):
        PreferenceModel.load(reward_model)


@pytest.mark.parametrize("fault", EVERYWHERE)
def test_the_backbone_of_a_reward_model_is_loaded_with_the_same_care(fault: str, tmp_path: Path) -> None:
    backbone = save("bart", tmp_path / "backbone")
    change, message = EVERYWHERE[fault]
    change(backbone)
    with pytest.raises(UserError, match=message):
        fit(PreferenceConfig(str(backbone), str(tmp_path / "rm")), [])


def test_a_reward_model_without_its_head_is_refused(reward_model: Path) -> None:
    without("classification_head")(reward_model)
    with pytest.raises(UserError, match=r"lacks the weights classification_head\.dense"):
        PreferenceModel.load(reward_model)


@pytest.mark.parametrize("fault", EVERYWHERE)
def test_an_embedder_is_loaded_with_the_same_care(fault: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = save("bart", tmp_path / "embedder")
    Embedder(str(folder))
    change, message = EVERYWHERE[fault]
    change(folder)
    with pytest.raises(UserError, match=message):
        Embedder(str(folder))


def test_the_command_line_scores_nothing_with_a_model_that_is_not_whole(whole, tmp_path: Path, capsys) -> None:
    rows, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPTS[0], "response": "garden"}) + "\n")
    for fault in ("untied head that the file lacks", "LFS pointer for weights", "bitsandbytes", "code of its own"):
        change, message = REFUSED[fault]
        folder = shutil.copytree(whole["llama"], tmp_path / fault.replace(" ", "-"))
        change(folder)
        assert main(["score", "--quiet", "--model", str(folder), "--input", str(rows), "--output", str(out)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("error: ") and str(folder) in said[0], message
        assert not out.exists()


HUB = """
import sys
from adhere.errors import UserError
from adhere.model.load import load
for name in sys.argv[1:]:
    try:
        model, tokenizer = load(name, device="cpu")
        print("loaded", type(model).__name__)
    except UserError as error:
        print(error)
"""


def test_what_the_cache_of_the_hub_holds_is_loaded_with_the_same_care(whole, tmp_path: Path) -> None:
    """Without a network: a repository that is whole, one cut short, an adapter and its base."""

    def cached(name: str) -> Path:
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        return place / "snapshots" / ("a" * 40)

    for name in ("me/whole", "me/cut"):
        shutil.copytree(whole["llama"], cached(name))
    cut(WEIGHTS)(tmp_path / "hub" / "models--me--cut" / "snapshots" / ("a" * 40))
    adapted(whole["llama"], "llama", adapter := cached("me/adapter"))
    rewritten("adapter_config.json", base_model_name_or_path="me/whole")(adapter)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": os.pathsep.join(sys.path)}
    names = ["me/whole", "me/cut", "me/adapter", "me/nothing"]
    done = subprocess.run([sys.executable, "-c", HUB, *names], env=environment, capture_output=True, text=True)
    sound, broken, adapter_said, nothing = done.stdout.splitlines()
    assert sound == adapter_said == "loaded LlamaForCausalLM"
    assert "model.safetensors: is damaged or cut short" in broken
    assert nothing.startswith("me/nothing: cannot be loaded: ")
