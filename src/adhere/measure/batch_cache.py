"""The finished batches of a long evaluation, so that it goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adhere.resume import Journal

Columns = dict[str, list[Any]]
"""Name of a figure → its value for each prompt of a batch."""


class BatchCache:
    """Batches by name: what an earlier run left in the journal, and what is made now. Without a journal, only that."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self.batches: dict[str, Columns] = {e["name"]: e["batch"] for e in journal.entries} if journal else {}

    @classmethod
    def open(cls, output: Path, settings: Mapping[str, Any], *, resume: bool) -> BatchCache:
        """The cache of the evaluation that writes to the folder `output`. Raises `UserError` as `Journal` does."""
        return cls(Journal(output / "unfinished", settings, ("name", "batch"), resume=resume))

    def get(self, model: str, start: int, make: Callable[[], Columns]) -> Columns:
        """The batch of `model` (before or after) that begins at row `start`, made now if it is not there."""
        name = f"{model}/{start}"
        if name not in self.batches:
            self.batches[name] = make()
            if self._journal is not None:
                self._journal.add({"name": name, "batch": self.batches[name]})
        return self.batches[name]

    def close(self) -> None:
        """The evaluation is done, and its batches are in the results."""
        if self._journal is not None:
            self._journal.close()
