"""Save and resume, atomic and bit-equal, in safetensors and JSON alone (no pickle).

A step of training is a function of (weights, optimiser state, a few numbers, step): data order and every random draw
are seeded by the step. So this is all there is to save, and a resumed run repeats the unbroken one to the last bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from adhere.errors import UserError
from adhere.files import atomic_dir

WEIGHTS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class TrainState:
    """The numbers that training carries from step to step."""

    step: int = 0
    """Steps done."""
    kl_coef: float = 0.0
    """Current KL coefficient (changes only with adaptive control)."""
    baseline: float | None = None
    """Running mean reward, for algorithms that use one."""


def save(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write a checkpoint; it appears under its name only when whole."""
    with atomic_dir(folder) as building:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, building / WEIGHTS)
        save_file(_flatten(parameters, optimizer), building / OPTIMIZER)
        (building / STATE).write_text(json.dumps(asdict(state)))


def restore(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainState:
    """Load a checkpoint into `parameters` and `optimizer` in place.

    Raises `UserError` when it belongs to another model, adapter or algorithm."""
    weights = _read(folder / WEIGHTS)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[:3]
        raise UserError(
            f"the checkpoint trains other parameters than this run ({', '.join(odd)}, …)",
            where=str(folder),
            fix="resume with the model, --lora and --algorithm it was started with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    slots = _read(folder / OPTIMIZER)
    for name, parameter in parameters.items():
        state = {key.rsplit("/", 1)[1]: value for key, value in slots.items() if key.rsplit("/", 1)[0] == name}
        optimizer.state[parameter] = {key: _placed(key, value, parameter) for key, value in state.items()}
    return TrainState(**json.loads((folder / STATE).read_text()))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run directory."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("step-")))[:-keep]:
        shutil.rmtree(path)


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
