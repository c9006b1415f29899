"""What a run leaves behind: config.yaml, metrics.jsonl, samples.jsonl, heads, and the trackers' copy of the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from attune.config import dump_yaml, to_dict
from attune.files import append_jsonl, atomic_write, truncate_jsonl
from attune.reward import heads
from attune.types import Rollout, Scores


class Record:
    """Writes a run directory; only the main process of a distributed run writes."""

    def __init__(self, run: Path, config: Any, accelerator: Accelerator) -> None:
        self.run = run
        self.history: list[dict[str, float]] = []
        self._accelerator = accelerator
        if accelerator.is_main_process:
            atomic_write(run / "config.yaml", dump_yaml(config))
        if accelerator.log_with:
            accelerator.init_trackers("attune", config=_flat(to_dict(config)))

    def rewind(self, step: int) -> None:
        """Forget what was written after step `step`, when a run goes on from there."""
        if self._accelerator.is_main_process:
            for name in ("metrics.jsonl", "samples.jsonl"):
                truncate_jsonl(self.run / name, lambda row: row["step"] <= step)
        self._accelerator.wait_for_everyone()
        path = self.run / "metrics.jsonl"
        self.history = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics(self, row: dict[str, float]) -> None:
        """One row a step; every key is defined in docs/metrics.md."""
        self.history.append(row)
        if self._accelerator.is_main_process:
            append_jsonl(self.run / "metrics.jsonl", row)
        if self._accelerator.log_with:
            self._accelerator.log(row, step=int(row["step"]))

    def samples(self, step: int, rollout: Rollout, scores: Scores, count: int) -> None:
        """The first `count` responses of a step, with their scores."""
        if not self._accelerator.is_main_process:
            return
        for place in range(min(count, len(rollout))):
            prompt = int(rollout.prompt_index[place])
            row = {
                "step": step,
                "prompt": rollout.prompts.texts[prompt],
                "response": rollout.responses[place],
                "ended": bool(rollout.ended[place]),
                "reward": float(scores.reward[place]),
                "signals": {name: float(values[place]) for name, values in scores.signals.items()},
            }
            append_jsonl(self.run / "samples.jsonl", row)

    def save_heads(self, weights: Tensor) -> None:
        """Keep the copy-head weights [L, H] with the run."""
        if self._accelerator.is_main_process:
            heads.save_heads(self.run, weights)

    def load_heads(self, device: torch.device) -> Tensor | None:
        """The copy-head weights that the run began with, if it uses any."""
        if not (self.run / heads.FILE_NAME).exists():
            return None
        return heads.load_heads(self.run).to(device)

    def close(self) -> None:
        """Let the trackers finish."""
        if self._accelerator.log_with:
            self._accelerator.end_training()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level of dotted names, which is what trackers take."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
