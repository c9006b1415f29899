"""Finished batches of a long evaluation, kept on disk so that it can go on after a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adhere.errors import UserError
from adhere.files import append_jsonl

Batch = dict[str, list[Any]]


@dataclass
class Kept:
    """Batches by name; with a path, in a JSON Lines file whose first line says what they belong to."""

    path: Path | None
    batches: dict[str, Batch] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, belongs: object, *, resume: bool) -> Kept:
        """A new file, or with `resume` the batches of an earlier run of the same evaluation.

        Raises `UserError`: a file is there and `resume` is not asked for, or it belongs to another evaluation.
        """
        mark = hashlib.sha256(json.dumps(belongs, sort_keys=True, default=str).encode()).hexdigest()
        if not path.exists():
            append_jsonl(path, {"evaluation": mark})
            return cls(path)
        if not resume:
            raise UserError(
                "holds an unfinished evaluation", where=str(path.parent), fix="add --resume, or choose another --output"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]  # after the last line end: nothing, or half a line
        if not rows or rows[0].get("evaluation") != mark:
            raise UserError(
                "holds another evaluation (other models, prompts or options)",
                where=str(path.parent),
                fix="choose another --output",
            )
        if lines[-1]:
            path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
        return cls(path, {row["name"]: row["batch"] for row in rows[1:]})

    def named(self, name: str) -> Place:
        return Place(self, name)

    def close(self) -> None:
        """The evaluation is done: its batches are in the results."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Place:
    """Where one batch is kept."""

    kept: Kept
    name: str

    def get(self, make: Callable[[], Batch]) -> Batch:
        """The batch as it was kept, or made now, and kept."""
        if self.name not in self.kept.batches:
            batch = make()
            if self.kept.path is None:
                return batch
            append_jsonl(self.kept.path, {"name": self.name, "batch": batch})
            self.kept.batches[self.name] = batch
        return self.kept.batches[self.name]
