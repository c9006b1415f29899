"""A checkpoint, from a folder or the hub, made into a network and a tokenizer that fit each other. safetensors only."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adhere.errors import UnsupportedModel, UserError
from adhere.model.embedded import located

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, then Apple's MPS, then the CPU."""
    if device != "auto":
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device {device!r}", fix="use cpu, cuda, cuda:0, mps or auto") from error
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (found.index or 0) >= there.get(found.type, math.inf):
            raise UserError(f"no device {device!r} on this machine", fix="use cpu or auto")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(
    path: str, *, dtype: str = "auto", device: str = "auto", attention: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load `path` (a folder, a hub id or `toy-causal`, `toy-encdec`), causal or encoder–decoder as its configuration
    says, in evaluation mode.

    Dropout stays off for good: the log-probs of an update must be those of the sample.
    Raises `UnsupportedModel`: no configuration, no tokenizer, no end-of-sequence token, pickle weights, or a vocabulary
    larger than the embedding.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    where, path = str(path), located(path)
    _check_folder(Path(path), where)
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        implementation = {} if attention == "auto" else {"attn_implementation": attention}
        model = auto.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True, **implementation, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"cannot be loaded: {_first_line(error)}",
            where=where,
            fix="give a folder or hub id that transformers can load",
        ) from error
    _fit(model, tokenizer, where)
    torch.nn.Module.to(model, pick_device(device))
    return model.eval(), tokenizer


def _check_folder(folder: Path, where: str) -> None:
    if not folder.is_dir():
        return
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        raise UnsupportedModel("holds no config.json", where=where, fix="give the folder that save_pretrained wrote")
    if not names.intersection(TOKENIZER_FILES):
        raise UnsupportedModel(
            "holds no tokenizer", where=where, fix="save one beside the model: tokenizer.save_pretrained(folder)"
        )
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        raise UnsupportedModel(
            "holds pickle weights only, which can run code when loaded" if pickled else "holds no weights",
            where=where,
            fix="convert them: model.save_pretrained(folder) writes safetensors",
        )


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UnsupportedModel(
            "the tokenizer has no end-of-sequence token", where=where, fix='set one: tokenizer.eos_token = "</s>"'
        )
    if tokenizer.pad_token_id is None:
        # Every mask is carried beside the ids, so what fills the padding is never read.
        tokenizer.pad_token = tokenizer.eos_token
    rows = embedding_rows(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UnsupportedModel(
            f"the tokenizer has ids up to {largest}, the model embeds {rows}",
            where=where,
            fix="use the tokenizer the model was trained with, or model.resize_token_embeddings",
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can read."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
