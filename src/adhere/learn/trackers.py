"""Where metrics go besides the run folder: TensorBoard, W&B and trackio, through accelerate's trackers.

What they write stays in the run folder: `tensorboard/`, `wandb/`, `trackio/`. A resumed run goes on in the same run of
each tracker, and the steps that it takes again are there once: TensorBoard is told to forget them, W&B and trackio keep
what they have, which is the same to the last bit.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adhere.errors import UserError, unknown_name
from adhere.files import atomic_write

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "adhere"
IDENTITY = "tracker-id"
"""File of the run folder: what W&B and trackio know this run by."""
_LOGIN = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to send it later"


def fault(name: str) -> UserError | None:
    """Why there is no such tracker here, or None; nothing is imported."""
    if name not in TRACKERS:
        return unknown_name("tracker", name, TRACKERS)
    return UserError(f"{name} is not installed", fix=f"pip install {name}") if find_spec(name) is None else None


def check_login(names: Sequence[str]) -> None:
    """Raise `UserError` where a tracker asks for a login that is not there: before training, and without a prompt."""
    if "wandb" not in names:
        return
    import wandb

    try:
        ready = wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False)
    except Exception as error:  # a key that is none, a server that is not there: W&B has many kinds of its own
        raise UserError(f"wandb: {_line(error)}", fix=_LOGIN) from error
    if not ready:
        raise UserError("wandb needs a login", fix=_LOGIN)


class Trackers:
    """The trackers of a run, at work; for the main process alone.

    `config`: dotted names → values, shown with the run. `step`: steps done of a run that goes on, None for a new one.

    Raises `UserError` where one of them cannot start.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], step: int | None) -> None:
        self._trackers: list[tuple[GeneralTracker, int]] = []
        """With the first step that each takes."""
        if not names:
            return
        check_login(names)
        file = run / IDENTITY
        known = file.read_text("utf-8").strip() if file.exists() else uuid.uuid4().hex[:8]
        for name in names:
            try:
                tracker = _made(name, run, known, step)
                tracker.start()
                # TensorBoard would show the settings of a resumed run as one run more.
                if step is None or name != "tensorboard":
                    tracker.store_init_configuration(dict(config))
            except Exception as error:  # whatever a tracker raises, the user can leave it out
                raise UserError(f"{name} cannot start: {_line(error)}", fix="or train without it") from error
            # trackio appends; no other way to ask where its run stands.
            first = getattr(tracker.tracker, "_next_step", 0) if name == "trackio" else 0
            self._trackers.append((tracker, first))
        atomic_write(file, f"{known}\n")

    def log(self, row: Mapping[str, float]) -> None:
        """The metrics of a step, but for `step` itself, which is the place they are put at."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker, first in self._trackers:
            if step >= first:
                tracker.log(values, step=step)

    def close(self, failed: bool = False) -> None:
        """Let them write what they hold; W&B marks a run that failed."""
        for tracker, _ in self._trackers:
            if failed and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()
        self._trackers = []


def _made(name: str, run: Path, known: str, step: int | None) -> GeneralTracker:
    """accelerate's tracker, told where to write and what it is part of."""
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker  # brings torch

    if name == "tensorboard":
        return TensorBoardTracker(name, str(run), purge_step=None if step is None else step + 1)
    if name == "wandb":
        return WandBTracker(PROJECT, dir=str(run), id=known, name=run.resolve().name, resume="allow")
    if name not in sys.modules:  # read once, when it is imported
        os.environ.setdefault("TRACKIO_DIR", str(run.resolve() / name))
    return TrackioTracker(PROJECT, name=f"{run.resolve().name}-{known}", resume="allow", embed=False)


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
