"""Save and resume, atomic and bit-equal, in safetensors and JSON alone (no pickle).

A step of training is a function of (weights, optimiser state, a few numbers, step): data order and every random draw
are seeded by the step. So this is all there is to save, and a resumed run repeats the unbroken one to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from adhere.errors import UserError
from adhere.files import atomic_dir
from adhere.model.checkpoint_files import one_line
from adhere.model.precision import require_finite
from adhere.resume import require_same

WEIGHTS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
SUMS = "checksums.json"
"""SHA-256 of each of the others."""


@dataclass
class TrainState:
    """The numbers that training carries from step to step."""

    step: int = 0
    """Steps done."""
    kl_coef: float = 0.0
    """Current KL coefficient (changes only with adaptive control)."""
    baseline: float | None = None
    """Running mean reward, for algorithms that use one."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the run must be told again when it is resumed."""


def save(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write a checkpoint; it appears under its name only when whole.

    Raises `RunFailed` where a parameter is not finite: the checkpoint before it is worth more."""
    require_finite(parameters.items())
    with atomic_dir(folder) as building:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, building / WEIGHTS)
        save_file(_flatten(parameters, optimizer), building / OPTIMIZER)
        (building / STATE).write_text(json.dumps(asdict(state)))
        sums = {name: _sum(building / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        (building / SUMS).write_text(json.dumps(sums, indent=1))


def damage(folder: Path) -> str | None:
    """Which file of a checkpoint is missing or not as it was written; None where all are."""
    try:
        sums = dict(json.loads((folder / SUMS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return SUMS
    names = (WEIGHTS, OPTIMIZER, STATE)
    return next((n for n in names if not (folder / n).is_file() or _sum(folder / n) != sums.get(n)), None)


def newest_sound(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, None where it has none yet, and the damaged files of newer ones.

    Raises `UserError` where there are checkpoints and all of them are damaged."""
    damaged: list[str] = []
    for folder in sorted(_checkpoints(run), key=_step, reverse=True):
        if (file := damage(folder)) is None:
            return folder, damaged
        damaged.append(str(folder / file))
    if damaged:
        fix = f"put back a sound copy, or remove {run / 'checkpoints'} and --resume: the run starts over"
        raise UserError("damaged, as every checkpoint of the run is", where=", ".join(damaged), fix=fix)
    return None, []


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`, so that they are in nobody's way and can be looked at."""
    for folder in _checkpoints(run):
        if _step(folder) > step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def restore(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any],
) -> TrainState:
    """Load a checkpoint into `parameters` and `optimizer` in place.

    Raises `UserError` before anything is changed: it is damaged, it was begun with other `options`, or it belongs to
    another model, adapter or algorithm."""
    with one_line("the checkpoint is damaged", str(folder), "remove that folder to go on from the one before"):
        state = TrainState(**json.loads((folder / STATE).read_text("utf-8")))
        weights, slots = _read(folder / WEIGHTS), _read(folder / OPTIMIZER)
    fix = "resume with the options it was started with, or choose another --output"
    require_same(state.options, options, where=folder, fix=fix)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[:3]
        raise UserError(
            f"the checkpoint trains other parameters than this run ({', '.join(odd)}, …)",
            where=str(folder),
            fix="resume with the model, --lora and --algorithm it was started with",
        )
    for name, parameter in parameters.items():
        (one, begun), (other, now) = ((w.dtype, list(w.shape)) for w in (weights[name], parameter))
        if (one, begun) != (other, now):
            raise UserError(
                f"{name} is {str(one).removeprefix('torch.')} {begun} in the checkpoint, "
                f"{str(other).removeprefix('torch.')} {now} in this run",
                where=str(folder),
                fix="resume with the model and the options it was started with",
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, parameter in parameters.items():
        own = {key.rsplit("/", 1)[1]: value for key, value in slots.items() if key.rsplit("/", 1)[0] == name}
        optimizer.state[parameter] = {key: _placed(key, value, parameter) for key, value in own.items()}
    return state


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in sorted(_checkpoints(run), key=_step)[:-keep]:
        shutil.rmtree(path)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flatten(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    flat = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}/{key}"] = torch.as_tensor(value).detach().contiguous()
    return flat


def _placed(key: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    # AdamW keeps its step count on the CPU and its moments beside the parameter.
    return value if key == "step" else value.to(parameter.device)


def _read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file handle, not a dict
