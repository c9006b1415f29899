"""What a checkpoint's folder holds, and whether it is whole: looked at before a library reads it, so that the damaged
file is named. Reads JSON and the headers of safetensors, no weights; knows no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adhere.errors import UnsupportedModel, UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
PICKLED = (".bin", ".pt", ".pth")
POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git LFS leaves in place of a file it has not fetched."""
SHORT_JSON = 1 << 20
"""JSON files below this size are parsed in advance; a tokenizer of 30 MB is left to the library that needs it."""
DOWNLOAD_AGAIN = "download the file again"
LONGEST = 240
"""Characters of an exception that are told."""


@contextmanager
def one_line(what: str, where: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises within this context into an `UnsupportedModel` of one line.

    Every exception is caught: transformers, PEFT, tokenizers and the code that comes with a model raise almost any kind
    for a checkpoint that they cannot read. Running out of memory is no fault of the checkpoint and passes.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(f"{what}: {first_line(error)}", where=where, fix=fix) from error


LISTS = ("modules.json",)
"""JSON files that hold a list, by sentence-transformers."""


def first_line(error: Exception) -> str:
    """The first line of what an exception says, and the next where it announces one; with the name of the exception
    where the text alone would mean little (`KeyError 'llama'`)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".:")
    if not said or not isinstance(error, OSError | ValueError | RuntimeError | ImportError | SafetensorError):
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"


def require_model(folder: Path) -> None:
    """Raise `UnsupportedModel` unless `folder` holds a configuration and safetensors weights, all of them whole."""
    where = str(folder)
    names = {file.name for file in folder.iterdir()}
    if CONFIG not in names:
        raise UnsupportedModel("holds no config.json", where=where, fix="give the folder that save_pretrained wrote")
    if not names.intersection((WEIGHTS, INDEX)):
        stray = sorted(name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS)
        if stray:
            raise UnsupportedModel(
                f"holds {stray[0]}, but neither {WEIGHTS} nor {INDEX}",
                where=where,
                fix=f"rename the file to {WEIGHTS}, or add the index of its shards",
            )
        pickled = any(name.endswith(PICKLED) for name in names)
        raise UnsupportedModel(
            "holds pickle weights only, which can run code when loaded" if pickled else "holds no weights",
            where=where,
            fix="convert them: model.save_pretrained(folder) writes safetensors",
        )
    require_whole(folder)


def require_tokenizer(folder: Path) -> None:
    """Raise `UnsupportedModel` where `folder` holds no file of a tokenizer."""
    if not has_tokenizer(folder):
        raise UnsupportedModel(
            "holds no tokenizer", where=str(folder), fix="save one beside the model: tokenizer.save_pretrained(folder)"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def require_whole(folder: Path) -> None:
    """Raise `UnsupportedModel` for the first file in `folder` that is a Git LFS pointer, damaged or cut short, and for
    an index that names a shard that is not there. What is missing altogether is not looked for."""
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise UnsupportedModel("is a Git LFS pointer, not the file itself", where=str(file), fix="git lfs pull")
        if file.suffix == ".json" and file.stat().st_size < SHORT_JSON:
            (_load_json if file.name in LISTS else read_json)(file)
    for file in weight_files(folder):
        if not file.exists():
            where, what = str(folder / INDEX), f"names {file.name}, which is not there"
            raise UnsupportedModel(what, where=where, fix=DOWNLOAD_AGAIN)
        require_whole_weights(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights of the model are read from, as transformers chooses them."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [file for file in (folder / WEIGHTS, folder / ADAPTER_WEIGHTS) if file.exists()]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UnsupportedModel("has no `weight_map` of names to files", where=str(folder / INDEX), fix=DOWNLOAD_AGAIN)
    return [folder / name for name in sorted(set(shards.values()))]


def stored(folder: Path) -> tuple[int, int]:
    """How many tensors the weights in `folder` are, and how many numbers they hold; of whole files."""
    sizes: list[int] = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            sizes += [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    return len(sizes), sum(sizes)


def require_whole_weights(file: Path) -> None:
    """Raise `UnsupportedModel` where a safetensors file is shorter than its header says, or has no sound header."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        what = f"is damaged or cut short: {first_line(error)}"
        raise UnsupportedModel(what, where=str(file), fix=DOWNLOAD_AGAIN) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises `UnsupportedModel` for anything else."""
    found = _load_json(file)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UnsupportedModel(f"holds a JSON {kind}, not an object", where=str(file), fix=DOWNLOAD_AGAIN)
    return found


def _load_json(file: Path) -> object:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"is not JSON: {first_line(error)}"
        raise UnsupportedModel(what, where=str(file), fix=DOWNLOAD_AGAIN) from error
