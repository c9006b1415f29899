"""The card of a trained model, `model/README.md`: what it is, how it was made, what training and evaluation showed.

Reads the run directory alone, as the page does. It goes where the model goes, so of a path it keeps the last name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCardData

from adhere.config import load_config
from adhere.files import atomic_write
from adhere.integrations.hub import is_name
from adhere.learn.settings import GRPO, Algorithm, TrainConfig
from adhere.learn.stopping import reason_to_stop
from adhere.markup import markdown, visible
from adhere.measure.stats import Estimate
from adhere.model.embedded import EMBEDDED
from adhere.report.run import AUDIT, Run, is_number, read_run
from adhere.reward.named import CALIBRATED, PREFERENCE, RewardConfig, config_of

WINDOW = 10
"""Steps at either end of training that a figure of the table is a mean over, at most a quarter of all."""
SHOWN = {
    "reward": "reward",
    "kl": "KL from the start, nats a response",
    "entropy": "entropy, nats a token",
    "completions/mean_length": "response length, tokens",
    "completions/clipped_ratio": "responses cut at the length limit, share",
}

LIMITS = """\
A reward is not a check of truth: a response that scores well can be wrong, and what a reward does not see may have got
worse. Measure this model on prompts of your own before you rely on it. What the base model's licence and card ask for
holds for this model too."""


def write_card(run_dir: Path, repo: str | None = None, *, chat: bool = False) -> Path:
    """Write the card of the model in `run_dir/model` and return where it is.

    `repo`: its name on the hub, if any. `chat`: whether it was trained on messages, and is to be asked so.

    Raises `UserError` as `read_run` does.
    """
    run = read_run(run_dir)
    config = load_config(TrainConfig, run_dir / "config.yaml")
    path = run_dir / "model" / "README.md"
    atomic_write(path, _card(run, config, run_dir, repo, chat))
    return path


def _card(run: Run, config: TrainConfig, folder: Path, repo: str | None, chat: bool) -> str:
    network = json.loads((folder / "model" / "config.json").read_text("utf-8"))
    sections = [
        f"---\n{_front_matter(config)}\n---",
        f"# {markdown(repo or run.name)}",
        _summary(config),
        "## Use\n\n" + _use(config, bool(network.get("is_encoder_decoder")), repo, chat),
        "## Training\n\n" + _training(run, config),
        _progress(run.steps),
        _evaluation(run),
        _audit(folder / AUDIT),
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: TrainConfig) -> str:
    source = config.prompts.split(":")[0]
    data = ModelCardData(
        base_model=config.model if _on_hub(config.model) else None,
        datasets=[source] if _on_hub(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adhere", "reinforcement-learning", config.algorithm.name, *(["lora"] if config.lora else [])],
    )
    return str(data.to_yaml()).strip()


def _summary(config: TrainConfig) -> str:
    base = f"[{config.model}](https://huggingface.co/{config.model})" if _on_hub(config.model) else _name(config.model)
    return (
        f"**{base}**, post-trained with adhere: reinforcement learning ({config.algorithm.name.upper()}) on the reward "
        f"{_reward_name(config.reward)}. {_labels(config_of(config.reward))}".rstrip()
    )


def _labels(reward: RewardConfig) -> str:
    """What people had to write down for this reward, where that is known."""
    names = [name for name, weight in reward.weights.items() if weight]
    if "exact" in names:
        return "The reward compares with the answers that stand beside the prompts."
    if reward.made_for is not None or any(name.startswith(PREFERENCE) for name in names):
        return "The reward was fitted to pairs of a preferred and another response."
    return "" if any(":" in name for name in names) else "No labels: the reward reads prompt and response alone."


def _use(config: TrainConfig, encoder_decoder: bool, repo: str | None, chat: bool) -> str:
    auto = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if config.trust_remote_code else ""
    asked = (
        'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "…"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True\n)'
        if chat
        else 'tokenizer("…", return_tensors="pt", return_token_type_ids=False)'
    )
    answer = "" if encoder_decoder else '[inputs["input_ids"].shape[1] :]'
    return (
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f"name = {visible(repo or '.')!r}  # {'on the hub' if repo else 'the folder that holds this file'}\n"
        f"tokenizer = AutoTokenizer.from_pretrained(name{trust})\n"
        f"model = {auto}.from_pretrained(name{trust})\n"
        f"inputs = {asked}\n"
        f"output = model.generate(**inputs, max_new_tokens={config.sampling.max_new_tokens})\n"
        f"print(tokenizer.decode(output[0]{answer}, skip_special_tokens=True))\n```"
    )


def _training(run: Run, config: TrainConfig) -> str:
    reward, lora = config_of(config.reward), config.lora
    done = len(run.steps)
    stopped = reason_to_stop(run.steps, config.stopping) if done < config.steps else None
    rows = {
        "base model": _name(config.model),
        "prompts": _name(config.prompts),
        "reward": _reward_name(config.reward),
        "its signals": ", ".join(f"{_weight(weight)} · {_name(n)}" for n, weight in reward.weights.items() if weight),
        "read by": "the frozen start" if reward.scorer == "reference" else "the model in training",
        "gated on": ", ".join(map(markdown, reward.gates)),
        "algorithm": config.algorithm.name,
        "loss": config.algorithm.loss if isinstance(config.algorithm, GRPO) else "",
        "steps": f"{done:,}" + (f" of {config.steps:,}" if done < config.steps else ""),
        "stopped early": "" if stopped is None else markdown(stopped),
        "a step": f"{config.prompts_per_step} prompts × {config.num_samples} samples",
        "samples": f"temperature {config.sampling.temperature:g}, {config.sampling.max_new_tokens} tokens at most",
        "learning rate": f"{config.learning_rate:g}, {config.schedule}, {config.warmup_steps} steps of warm-up",
        "KL coefficient": _kl(config.algorithm),
        "weights": "all" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha}, merged",
        "seed": str(config.seed),
        "versions": ", ".join(_versions("adhere", "transformers", "torch")),
    }
    return _table(["", ""], [[name, value] for name, value in rows.items() if value])


def _kl(algorithm: Algorithm) -> str:
    """The coefficient that training began with, and what it was steered to; empty where KL is not charged."""
    steered = "" if algorithm.kl_target is None else f", to {algorithm.kl_target:g} nats"
    return f"{algorithm.kl_coef:g}{steered}" if algorithm.kl_coef else ""


def _progress(steps: Sequence[Mapping[str, Any]]) -> str:
    """The first steps beside the last ones; nothing where there are no two steps."""
    if len(steps) < 2:
        return ""
    window = min(WINDOW, max(1, len(steps) // 4))
    signals = {
        name: f"signal {_name(name.removeprefix('signals/'))}" for name in steps[0] if name.startswith("signals/")
    }
    rows = []
    for key, label in {**SHOWN, **signals}.items():
        ends = [[row[key] for row in part if is_number(row.get(key))] for part in (steps[:window], steps[-window:])]
        if all(ends):
            rows.append([label, *(f"{fmean(end):.4g}" for end in ends)])
    over = "step" if window == 1 else f"{window} steps, mean"
    return _table(["on the prompts it trained on", f"first {over}", f"last {over}"], rows)


def _evaluation(run: Run) -> str:
    if not run.findings:
        return ""
    compared = any(found.before is not None for found in run.findings.values())
    rows = [
        [
            markdown(found.metric.label),
            _interval(found.before),
            _interval(found.after),
            _interval(found.difference, "+"),
        ]
        for found in run.findings.values()
    ]
    columns = ["", "before", "after", "difference"]
    if not compared:
        columns, rows = ["", "value"], [[row[0], row[2]] for row in rows]
    return "## Evaluation\n\nMeans over prompts with 95 % intervals.\n\n" + _table(columns, rows)


def _audit(path: Path) -> str:
    """The verdict of the audit before training, if there was one."""
    if not path.is_file():
        return ""
    found = json.loads(path.read_text("utf-8"))
    return (
        "## Audit of the reward\n\nBefore training, degenerate responses were put beside the model's own samples, on "
        f"{found['prompts']} prompts. {markdown(found['verdict'])}"
    )


def _reward_name(spec: str | Mapping[str, Any]) -> str:
    return _name(spec) if isinstance(spec, str) else "of weighted signals"


def _name(text: str) -> str:
    """What a model, a file, a reward or a signal is called, without the folders that it lies in."""
    for mark in (PREFERENCE, CALIBRATED):
        if text.startswith(mark):
            return markdown(mark) + _name(text.removeprefix(mark))
    path = Path(text)
    return markdown(path.resolve().name if path.is_absolute() or path.exists() else text)


def _on_hub(text: str) -> bool:
    """Whether `text` names something on the hub rather than on this disk."""
    return is_name(text) and text not in EMBEDDED and not Path(text).exists()


def _weight(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _versions(*names: str) -> Iterable[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:  # run from its source tree
            yield name


def _interval(figure: Estimate | None, sign: str = "") -> str:
    return "" if figure is None else f"{figure.mean:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells that are Markdown already, as a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
