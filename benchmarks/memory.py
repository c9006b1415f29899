"""Peak resident memory of a piece of work, in this process (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def peak_mb(work: Callable[[], object]) -> float:
    """MB that `work` adds at its peak to what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    work()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """A figure of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
