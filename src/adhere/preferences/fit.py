"""Fits a reward model to preference pairs: −log σ(r(x, chosen) − r(x, rejected)) (Bradley & Terry 1952).

Decoder-only backbones are trained by TRL's `RewardTrainer`; encoder–decoders, which it does not take, by the short loop
here, with the same loss.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from adhere.data import Row
from adhere.errors import RunFailed, UserError
from adhere.files import atomic_dir, to_json
from adhere.learn.launch import refuse_environment
from adhere.model.chat import render
from adhere.model.load import load_network, load_tokenizer
from adhere.preferences.settings import PreferenceConfig
from adhere.progress import Progress, silent
from adhere.reward.preference import CARD, PreferenceModel, check_lengths, logits, pair_ids
from adhere.row_pairs import sound_pairs

Ids = list[int]
WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""


@dataclass(frozen=True)
class Fitted:
    """What came of it."""

    pairs: int
    """Pairs that were learned from."""
    accuracy: list[float]
    """Of each held-out pair, 1 where the chosen response gets more, ½ for a tie; in the order of the rows."""


def fit(
    config: PreferenceConfig,
    rows: Sequence[Row],
    warn: Callable[[str], None] = warnings.warn,
    progress: Progress = silent,
) -> Fitted:
    """Fit a reward model to `rows` (prompt, chosen, rejected) and write it to `config.output`.

    Pairs that teach nothing are left out, and `warn` is told (see `adhere.row_pairs`).

    Raises `UserError`: no pairs, a folder that holds a model, a backbone without a classifier, or one that needs TRL
    where it is not installed; `RunFailed` when the loss stops being a number.
    """
    if (Path(config.output) / CARD).exists():
        raise UserError("already holds a reward model", where=config.output, fix="choose another --output")
    rows = sound_pairs(rows, warn)
    torch.manual_seed(config.seed)
    network = load_network(config.model, lambda _: AutoModelForSequenceClassification, other_head=True,
                           device=config.device, dtype="float32", progress=progress, num_labels=1)  # fmt: skip
    tokenizer = load_tokenizer(config.model)
    network.config.pad_token_id = tokenizer.pad_token_id
    training, held_out = split(rows, config.held_out, config.seed)
    if not training:
        raise UserError("no pairs to learn from", fix="give rows with prompt, chosen and rejected")
    pairs = [tuple(pair_ids(tokenizer, _text(row, tokenizer), str(text)) for text in (row.chosen, row.rejected))
             for row in training]  # fmt: skip
    check_lengths(network, [ids for pair in pairs for ids in pair])
    learn = _loop if network.config.is_encoder_decoder else _with_trl
    steps = progress(range(config.steps), "fitting", config.steps)
    learn(config, network, tokenizer, [(one, other) for one, other in pairs], steps)
    if any(not bool(torch.isfinite(weight).all()) for weight in network.parameters()):
        raise RunFailed("the reward model's weights are not finite", fix="lower learning_rate")
    model = PreferenceModel(network.eval(), tokenizer)
    fitted = Fitted(len(training), preferred(model, held_out))
    with atomic_dir(config.output) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        accuracy = sum(fitted.accuracy) / len(fitted.accuracy) if fitted.accuracy else None
        card = {"config": asdict(config), "pairs": len(training), "held_out": len(held_out), "accuracy": accuracy}
        (folder / CARD).write_text(to_json(card, indent=2), encoding="utf-8")
    return fitted


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows held out, by prompt: no prompt is in both."""
    prompts = list(dict.fromkeys(str(row.prompt) for row in rows))
    apart = set(random.Random(seed).sample(prompts, round(share * len(prompts))))
    return [row for row in rows if str(row.prompt) not in apart], [row for row in rows if str(row.prompt) in apart]


def preferred(model: PreferenceModel, rows: Sequence[Row]) -> list[float]:
    """Of each pair, 1 where the chosen response gets more, ½ for a tie."""
    prompts = [_text(row, model.tokenizer) for row in rows]
    chosen, rejected = (model.score(prompts, [str(getattr(row, name)) for row in rows]).tolist()
                        for name in ("chosen", "rejected"))  # fmt: skip
    return [0.5 if a == b else float(a > b) for a, b in zip(chosen, rejected, strict=True)]


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """−log σ(r_chosen − r_rejected), the mean over pairs. [n], [n] → scalar."""
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def _loop(
    config: PreferenceConfig,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Ids, Ids]],
    steps: Iterator[int],
) -> None:
    """AdamW on batches drawn without replacement, epoch after epoch; warm-up, then down to zero. Dropout stays off."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.0)
    rng, order = random.Random(config.seed), list[tuple[Ids, Ids]]()
    warmup = max(1, round(WARMUP * config.steps))
    for step in steps:
        if len(order) < min(config.batch_size, len(pairs)):
            order = rng.sample(list(pairs), len(pairs))
        batch, order = order[: config.batch_size], order[config.batch_size :]
        rate = min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        scores = logits(network, [pair[0] for pair in batch] + [pair[1] for pair in batch])
        bradley_terry_loss(*scores.chunk(2)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _with_trl(
    config: PreferenceConfig,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Ids, Ids]],
    steps: Iterator[int],
) -> None:
    """TRL's trainer on ids that are ready, so that training and scoring read the same."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl.trainer.reward_config import RewardConfig
        from trl.trainer.reward_trainer import RewardTrainer
    except ImportError as error:
        fix = "pip install 'adhere[trl]'"
        raise UserError("a reward model on a decoder-only backbone needs TRL", fix=fix) from error
    refuse_environment()

    class Counted(TrainerCallback):
        """Takes a step of `steps` where the trainer begins one."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(steps, None)

    ready = Dataset.from_dict({"chosen_ids": [pair[0] for pair in pairs], "rejected_ids": [pair[1] for pair in pairs]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, round(WARMUP * config.steps)),
            seed=config.seed,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=network.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(network, arguments, train_dataset=ready, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)  # standard output is the caller's
        trainer.add_callback(Counted)
        trainer.train()
        next(steps, None)  # the last one is done


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the network reads it: a conversation in the tokenizer's template."""
    if isinstance(row.prompt, str):
        return row.prompt
    if tokenizer.chat_template is None:
        raise UserError("messages, but the tokenizer has no chat template", where=row.where, fix="write a plain prompt")
    return render(tokenizer, row.prompt, where=row.where or None)
