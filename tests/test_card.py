"""The card of a trained model: front matter that the hub's own reader takes, the run's settings and results, code that
runs as it stands; no path of this machine, and no text that could be markup."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from adhere.cli import main
from adhere.config import dump_yaml
from adhere.learn.settings import DPO
from adhere.learn.stopping import Stopping
from adhere.learn.train import train
from adhere.markup import markdown
from adhere.model.policy import Policy
from adhere.model.settings import Lora, Sampling
from adhere.report.card import write_card
from tests.families import save
from tests.test_train import config, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "base")


def trained(model, run, **changes):
    settings = config(model, run, **{"sampling": Sampling(max_new_tokens=3), "steps": 2, **changes})
    train(settings, Policy.load(model, device="cpu", lora=settings.lora), rows(), run)
    return settings


def card_of(run, repo=None):
    return ModelCard(write_card(run, repo).read_text("utf-8"))


def run_its_code(card, folder, monkeypatch, capsys):
    """What the code block prints."""
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code[1].replace("…", "w1 is in the w2 ."), "card", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "lora", "auto"),
    [
        ("llama", None, "AutoModelForCausalLM"),
        ("t5", None, "AutoModelForSeq2SeqLM"),
        ("llama", Lora(rank=2, alpha=4), "AutoModelForCausalLM"),
    ],
)
def test_the_card_says_how_to_load_the_model_and_the_code_runs(family, lora, auto, tmp_path, monkeypatch, capsys):
    run = tmp_path / "story"
    trained(save(family, tmp_path / "base"), run, lora=lora)
    card = card_of(run)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["adhere", "reinforcement-learning", "grpo", *(["lora"] if lora else [])],
    }
    assert auto in card.text and card.text.lstrip().startswith("# story\n\n**base**, post-trained with adhere")
    assert ("| weights | LoRA of rank 2, alpha 4, merged |" in card.text) == bool(lora)
    printed = run_its_code(card, run / "model", monkeypatch, capsys)
    assert printed.endswith("\n") and "is in the" not in printed  # the answer without its prompt
    assert str(tmp_path) not in card.content and "adapter" not in os.listdir(run / "model")


def test_a_model_trained_on_messages_is_asked_with_messages(model, tmp_path):
    trained(model, tmp_path / "run")
    told = [write_card(tmp_path / "run", chat=chat).read_text("utf-8") for chat in (False, True)]
    assert ["apply_chat_template" in text for text in told] == [False, True]


def test_settings_and_the_way_from_first_to_last_step(model, tmp_path):
    run = tmp_path / "run"
    settings = trained(model, run, steps=8, reward={"weights": {"length": -1.5, "random": 0.0}, "gates": ["ended"]})
    text = card_of(run).text
    for line in (
        "| reward | of weighted signals |",
        "| its signals | −1.5 · length |",
        "| gated on | ended |",
        "| steps | 8 |",
        "| a step | 4 prompts × 4 samples |",
        "| learning rate | 0.001, linear, 5 steps of warm-up |",
        f"| KL coefficient | {settings.algorithm.kl_coef:g} |",
        "| weights | all |",
    ):
        assert line in text
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [f"{(a['kl'] + b['kl']) / 2:.4g}" for a, b in (steps[:2], steps[-2:])]
    assert f"| KL from the start, nats a response | {ends[0]} | {ends[1]} |" in text
    assert "| on the prompts it trained on | first 2 steps, mean | last 2 steps, mean |" in text
    assert "signal length" in text and "## Evaluation" not in text and "## Audit" not in text
    assert "No labels" in text and "not a check of truth" in text


def test_hub_names_are_linked_and_paths_are_cut(model, tmp_path):
    run = tmp_path / "run"
    settings = trained(model, run)
    changed = replace(settings, model="owner/small-1b", prompts="owner/stories:plain:train", algorithm=DPO())
    (run / "config.yaml").write_text(dump_yaml(changed))
    card = card_of(run, "me/story")
    assert card.data.base_model == "owner/small-1b" and card.data.datasets == ["owner/stories"]
    assert "# me/story" in card.text and "(https://huggingface.co/owner/small-1b)" in card.text
    assert "name = 'me/story'  # on the hub" in card.text
    (tmp_path / "prompts.jsonl").write_text("")
    changed = replace(settings, prompts=str(tmp_path / "prompts.jsonl"), reward=f"preference:{tmp_path}/judge")
    (run / "config.yaml").write_text(dump_yaml(changed))
    card = card_of(run)
    assert card.data.datasets is None and "| prompts | prompts.jsonl |" in card.text
    assert "| reward | preference:judge |" in card.text and "fitted to pairs" in card.text
    assert str(tmp_path) not in card.content


def test_what_was_measured_stands_in_it(model, tmp_path):
    run = tmp_path / "run"
    trained(model, run)
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    gain = {"mean": 0.125, "low": -0.05, "high": 0.3, "n": 8}
    found = {
        "exact_match": {"after": figure, "before": figure, "difference": gain, "p": 0.2},
        "odd|one": {"after": figure},
    }
    (run / "results.json").write_text(json.dumps({"metrics": found}))
    text = card_of(run).text
    assert "| Exact match | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] | +0.125 [-0.050, +0.300] |" in text
    assert "| odd\\|one |  | 0.500 [0.250, 0.750] |  |" in text
    (run / "results.json").write_text(json.dumps({"metrics": {"f1": {"after": figure}}}))
    assert "|  | value |\n| --- | --- |\n| Answer F1 | 0.500 [0.250, 0.750] |" in card_of(run).text


def test_an_early_stop_says_why(model, tmp_path):
    run = tmp_path / "run"
    trained(model, run, steps=30, stopping=Stopping(max_kl=1e-9, window=2))
    text = card_of(run).text
    assert "| steps | 4 of 30 |" in text and "| stopped early | KL from the start is" in text


def test_text_of_a_user_is_no_markup(model, tmp_path):
    run = tmp_path / "*run* <b>|x|\n# big"
    settings = trained(model, run)
    bad = tmp_path / "a|b_c_ [d](http:e) `f`.jsonl"
    bad.write_text("")
    (run / "config.yaml").write_text(dump_yaml(replace(settings, prompts=str(bad))))
    (run / "audit-before.json").write_text(
        json.dumps({"prompts": 3, "verdict": "Gameable: <i>|*loop*", "gameable": True})
    )
    text = card_of(run).text
    assert "# \\*run\\* \\<b\\>\\|x\\| \\# big\n" in text
    assert "| prompts | a\\|b\\_c\\_ \\[d\\](http:e) \\`f\\`.jsonl |" in text
    assert "on 3 prompts. Gameable: \\<i\\>\\|\\*loop\\*" in text
    assert markdown("a\x1b\u202e") == "a\\\\u001b\\\\u202e"


def test_train_and_demo_write_it(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows()))
    run = tmp_path / "run"
    given = [
        "--model",
        str(model),
        "--prompts",
        str(prompts),
        "--output",
        str(run),
        "--reward",
        "length",
        "--steps",
        "2",
    ]
    given += ["--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(["train", *given]) == 0
    verdict = re.search(r"prompts: (Gameable: .*?)\. Training may", capsys.readouterr().err)[1]
    assert markdown(verdict) in (run / "model" / "README.md").read_text("utf-8")
    assert json.loads((run / "audit-before.json").read_text())["rewards"].keys() == {"length"}
    assert main(["demo", "--output", str(tmp_path / "demo"), "--steps", "2", "--eval-prompts", "4"]) == 0
    text = (tmp_path / "demo" / "model" / "README.md").read_text("utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert "| Exact match |" in text and "| base model | toy-causal |" in text and str(tmp_path) not in text
