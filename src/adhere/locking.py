"""One output, one writer: an advisory lock on what a command writes, held by the process and gone when it is, however
it ends. The lock lies in the user's cache, so that nothing is written beside an output that may never come to be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir

from adhere.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind (docs/security.md)
    fcntl = None  # type: ignore[assignment, unused-ignore]


@contextmanager
def writing(output: str | Path | None) -> Iterator[None]:
    """Be the only process that writes `output`, a file or a folder, as long as the block runs.

    Devices and pipes may be shared, of processes that train together the first one writes, and what this process has
    locked already stays so. Raises `UserError` where another process, which is named, is at it."""
    path = None if output is None else Path(os.path.realpath(output))
    shared = path is not None and path.exists() and not path.is_file() and not path.is_dir()
    if path is None or shared or fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    file = _lock_file(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(file, str(output))
    except OSError as error:
        fix = "set ADHERE_CACHE to a folder that can be written"
        raise UserError(f"no lock can be made there ({error.strerror})", where=str(file.parent), fix=fix) from error
    if handle is None:
        yield
        return
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is given up: who waits for this very file sees that it is gone
        os.close(handle)


def _lock_file(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return Path(os.environ.get("ADHERE_CACHE") or user_cache_dir("adhere")) / "locks" / name


def _locked(file: Path, output: str) -> int | None:
    """The open and locked file of that name, not one that its owner has removed since it was opened; None where this
    process holds it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode() or "another"
            os.close(handle)
            if owner == str(os.getpid()):
                return None
            fix = "wait for it, or choose another --output"
            raise UserError(f"process {owner} is writing it", where=output, fix=fix) from None
        os.close(handle)
