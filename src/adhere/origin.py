"""Where a run came from: the commands that made it and the versions they ran with, kept in its folder."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adhere.errors import UserError
from adhere.files import atomic_write, to_json

FILE = "origin.json"
PACKAGES = ("adhere", "torch", "transformers", "tokenizers", "peft", "accelerate", "numpy")


def record(folder: Path, command: str) -> None:
    """Write `command` and today's versions to `folder`, after the commands of a run that goes on.

    Raises `UserError` as `read` does.
    """
    before, _ = read(folder)
    atomic_write(folder / FILE, to_json({"commands": [*before, command], "versions": versions()}, indent=2))


def read(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The commands and versions that `record` wrote, if it did. Raises `UserError` for a file that it did not write."""
    path = folder / FILE
    if not path.is_file():
        return (), {}
    try:
        found = json.loads(path.read_bytes())
        return tuple(map(str, found["commands"])), {str(name): str(one) for name, one in found["versions"].items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError("says neither commands nor versions", where=str(path), fix="remove it") from error


def versions() -> dict[str, str]:
    """Python and the packages of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source tree
            continue
    return found
