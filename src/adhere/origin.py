"""Where a run came from: the commands that made it and the versions they ran with, kept in its folder."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adhere.files import atomic_write, to_json

FILE = "origin.json"
PACKAGES = ("adhere", "torch", "transformers", "tokenizers", "peft", "accelerate", "numpy")


def record(folder: Path, command: str) -> None:
    """Write `command` and today's versions to `folder`, after the commands of a run that goes on."""
    path = folder / FILE
    before = json.loads(path.read_bytes())["commands"] if path.is_file() else []
    atomic_write(path, to_json({"commands": [*before, command], "versions": versions()}, indent=2))


def versions() -> dict[str, str]:
    """Python and the packages of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source tree
            continue
    return found
