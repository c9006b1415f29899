"""What a run leaves behind: config.yaml, metrics.jsonl, samples.jsonl, a table of all completions of a step, heads, and
the trackers' copy of the metrics."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from adhere.config import dump_yaml, to_dict
from adhere.errors import RunFailed
from adhere.files import GrowingFile, atomic_write, json_line
from adhere.learn.settings import TrainConfig
from adhere.learn.trackers import Trackers
from adhere.resume import truncate_jsonl
from adhere.reward import heads
from adhere.types import Rollout, Scores, masked_mean

COMPLETIONS = "completions"
"""Folder of the run: `step-000010.parquet`, …"""

Response = dict[str, Any]


class RunLog:
    """Writes a run directory; only the main process of a distributed run writes.

    `step`: steps done of a run that goes on, None for a new one. What was written after that step is forgotten.
    """

    def __init__(self, run: Path, config: TrainConfig, accelerator: Accelerator, step: int | None = None) -> None:
        self.run = run
        self._config, self._accelerator = config, accelerator
        main = accelerator.is_main_process
        self._trackers = Trackers(config.trackers if main else (), run, _flat(to_dict(config)), step)
        if main:
            atomic_write(run / "config.yaml", dump_yaml(config))
            if step is not None:
                self._rewind(step)
        accelerator.wait_for_everyone()
        path = run / "metrics.jsonl"
        known = path.read_text().splitlines() if step is not None and path.exists() else []
        self.history: list[dict[str, float]] = [json.loads(line) for line in known]
        self._metrics, self._samples = GrowingFile(path), GrowingFile(run / "samples.jsonl")

    def metrics(self, row: dict[str, float]) -> None:
        """One row a step; every key is defined in docs/metrics.md."""
        self.history.append(row)
        if self._accelerator.is_main_process:
            self.require_folder()
            self._metrics.append(json_line(row))
            self._trackers.log(row)

    def responses(self, step: int, rollout: Rollout, scores: Scores, advantages: Tensor | None) -> None:
        """The first responses of a step in samples.jsonl, and where a table is due every one of all processes in it.

        `advantages` [B, R]; their mean over its tokens is what a response weighs in the loss. None where the algorithm
        has none."""
        every, shown = self._config.completions_every, self._config.log_samples
        due = every > 0 and step % every == 0
        weights = None if advantages is None else masked_mean(advantages, rollout.response_mask)
        rows = _responses(step, rollout, scores, weights, len(rollout) if due else shown)
        whole = gather_object(rows) if due else rows
        if not self._accelerator.is_main_process:
            return
        for row in rows[:shown]:
            self._samples.append(json_line(_sample(row)))
        if due:
            atomic_write(self.run / COMPLETIONS / f"step-{step:06d}.parquet", _parquet(whole))

    def require_folder(self) -> None:
        """Raise `RunFailed` where the folder of the run is gone: what is written would begin another one."""
        if not (self.run / "config.yaml").exists():
            what = "was removed while the run was writing to it"
            raise RunFailed(what, where=str(self.run), fix="train again, into a folder that stays")

    def save_heads(self, found: heads.CopyHeads | None) -> None:
        """Keep the copy heads that the reward reads, if any, with the run."""
        if found is not None and self._accelerator.is_main_process:
            heads.save_heads(self.run / heads.FILE_NAME, found)

    def close(self, failed: bool = False) -> None:
        """Let the trackers finish."""
        self._trackers.close(failed)

    def _rewind(self, step: int) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate_jsonl(self.run / name, lambda row: row["step"] <= step)
        for table in (self.run / COMPLETIONS).glob("step-*.parquet"):
            number = table.stem.removeprefix("step-")
            if number.isdigit() and int(number) > step:
                table.unlink()


def _responses(step: int, rollout: Rollout, scores: Scores, advantages: Tensor | None, count: int) -> list[Response]:
    """The first `count` responses of this process, as the columns of the table."""
    prompts = rollout.prompt_index.tolist()[:count]
    columns: dict[str, Sequence[Any]] = {
        "prompt": [_encodable(rollout.prompts.texts[prompt]) for prompt in prompts],
        "completion": [_encodable(text) for text in rollout.responses[:count]],
        "ended": rollout.ended.tolist(),
        "reward": scores.reward.tolist(),
        **({} if advantages is None else {"advantage": advantages.tolist()}),
        **{f"signals/{name}": values.tolist() for name, values in scores.signals.items()},
    }
    return [{"step": step, **{name: values[i] for name, values in columns.items()}} for i in range(len(prompts))]


def _sample(row: Response) -> dict[str, Any]:
    """A row as samples.jsonl has it."""
    signals = {name.removeprefix("signals/"): value for name, value in row.items() if name.startswith("signals/")}
    kept = {name: row[name] for name in ("step", "prompt", "ended", "reward")}
    return {**kept, "response": row["completion"], "signals": signals}


def _parquet(rows: Sequence[Response]) -> bytes:
    """Rows as a Parquet file: figures in 32 bits, as they were computed."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kinds = {"step": arrow.int64(), "ended": arrow.bool_(), "prompt": arrow.string(), "completion": arrow.string()}
    columns = {name: arrow.array([r[name] for r in rows], kinds.get(name, arrow.float32())) for name in rows[0]}
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(columns), buffer)
    return buffer.getvalue()


def _encodable(text: str) -> str:
    """Half of a surrogate pair, which a byte-level model can say, has no place in UTF-8: it is written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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
