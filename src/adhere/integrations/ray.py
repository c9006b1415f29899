"""Parts of a file done by Ray Data: a pool of actors, each of which makes what it needs once and does part after part.

A part travels as a few numbers, and so does what comes back: actors read their rows and write their lines themselves,
so input, output and model must be where every machine finds them. An actor that dies is started again by Ray, and what
it had begun is done again. Ray is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adhere.errors import RunFailed, UserError
from adhere.shards import WORK, Shard, ShardedRows, mark

Work = Callable[[Shard], dict[str, Any]]
"""Does a part; returns what `Shard.write` returned."""

TRIES = 3
"""Times that a part is begun, counting workers that died of it, before the run fails."""
OBJECT_STORE = 128 * 2**20
"""Bytes of Ray's shared memory on this machine: rows never pass through it."""


def require_ray() -> None:
    """Raise `UserError` where Ray is not installed."""
    if find_spec("ray") is None:
        raise UserError("Ray is not installed, and --engine ray needs it", fix="pip install 'adhere[ray]'")


@contextmanager
def cluster(cores: int | None = None) -> Iterator[None]:
    """Ray as it runs already, the cluster that RAY_ADDRESS names, or one on this machine for as long as it is used.

    `cores`: how many of this machine's Ray may use (default: all).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Standard output and standard error are the command's own; what Ray has to say stands in its logs.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # What keeps Ray on the loopback interface elsewhere does so on Linux too: without it, it listens to everyone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    ours = not ray.is_initialized()
    if ours:
        given: dict[str, Any] = {}
        if not address:
            given = {"num_cpus": cores or os.cpu_count() or 1, "object_store_memory": OBJECT_STORE}
            given["include_dashboard"] = False
        try:
            _reach(address or "")
            with _stderr_aside():
                ray.init(
                    address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **given,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if address:
                what = f"no Ray cluster there ({_reason(error)})"
                fix = "check it, and RAY_AUTH_MODE=token where it asks for a token"
                raise UserError(what, where=f"RAY_ADDRESS={address}", fix=fix) from error
            raise RunFailed(f"Ray cannot be started ({_reason(error)})") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def share(workers: int, gpu: bool) -> dict[str, Any]:
    """What each worker gets of the machines: a GPU if asked for, and as many cores as all can have alike.

    Raises `UserError` where there are fewer GPUs or cores than workers: Ray would wait for them for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, needed in (("GPU", gpu), ("CPU", True)):
        found = sum(int(node.get(kind, 0)) for node in nodes)
        if needed and found < workers:
            fix = f"set --workers to {found} or less" if found else "set --device cpu"
            raise UserError(f"{workers} workers need a {kind} each, and Ray has {found}", fix=fix)
    cores = max(int(node.get("CPU", 0)) for node in nodes)
    while sum(int(node.get("CPU", 0)) // cores for node in nodes) < workers:
        cores -= 1
    return {"num_cpus": 1 if gpu else cores, "num_gpus": int(gpu)}


def do_shards(
    make: Callable[[], Work], shards: Sequence[Shard], output: ShardedRows, workers: int, gpu: bool
) -> Iterator[int]:
    """Do `parts` on `workers` actors, each of which calls `make` once; how many rows each part has that comes back.

    Raises what a worker raised as a `UserError`; `RunFailed` where a part fails `TRIES` times, or Ray itself.
    """
    import ray.data

    resources = share(workers, gpu)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a part may take long
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards)).map_batches(
            _Worker,
            fn_constructor_args=(make, output.folder, 4 * workers, os.getcwd()),
            batch_size=1,
            # One in hand, one waiting: no worker is idle, and none has a queue while others have nothing.
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=2),
            **resources,
        )
    _quieten()
    try:
        for row in dataset.iter_rows():
            told = json.loads(row["told"])
            if "error" in told:
                raise _error(told["error"])
            before = output.rows_done()
            output.add(told)
            yield output.rows_done() - before
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # Ray has dozens of classes for its troubles
        raise RunFailed(f"Ray gave up: {_reason(error)}", fix="see its logs in /tmp/ray/session_latest") from error


class _Worker:
    """What an actor holds: the work it does, or why it cannot.

    What goes wrong comes back as data. Raised, it would be a traceback of Ray's on its way to one clear line.
    """

    def __init__(self, make: Callable[[], Work], folder: Path, starts: int, directory: str) -> None:
        self._folder = folder
        self._failed: UserError | None = None
        with suppress(OSError):  # relative paths, and a user's reward, are looked for where the command was given
            os.chdir(directory)
        starting = folder / WORK / "starting.attempts"
        try:
            # Ray starts a dead actor again without end. The marks of those that died while they loaded remain.
            if mark(starting) > starts:
                raise RunFailed("workers die while they load the model", fix="look whether there is memory for all")
            self._work = make()
            starting.unlink(missing_ok=True)
        except UserError as error:
            self._failed = error
        except Exception as error:
            self._failed = RunFailed(f"a worker cannot start: {_reason(error)}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        shard = Shard(**{name: int(value[0]) for name, value in batch.items()})
        try:
            if self._failed:
                raise self._failed
            told = self._do(shard)
        except UserError as error:
            kind = "RunFailed" if isinstance(error, RunFailed) else "UserError"
            told = {"error": {"kind": kind, "what": error.what, "where": error.where, "fix": error.fix}}
        return {"told": [json.dumps(told)]}

    def _do(self, shard: Shard) -> dict[str, Any]:
        """Do a part, again where it fails. Raises `RunFailed` where it failed too often, in this process or others."""
        name = f"part {shard.number} (rows {shard.first + 1} to {shard.first + shard.rows})"
        reason = "its worker died"
        while (attempt := shard.attempt(self._folder)) <= TRIES:
            try:
                return {**self._work(shard), "attempts": attempt, "pid": os.getpid()}
            except UserError:
                raise
            except Exception as error:
                reason = _reason(error)
                time.sleep(1)
        raise RunFailed(f"{name} failed {TRIES} times: {reason}", fix="mend that and --resume")


def _error(told: dict[str, Any]) -> UserError:
    kind = RunFailed if told["kind"] == "RunFailed" else UserError
    return kind(told["what"], where=told["where"], fix=told["fix"])


def _reason(error: BaseException) -> str:
    """An error in a line: its last, where a traceback goes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _quieten() -> None:
    """Ray Data's own words go to its log file only."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


def _reach(address: str) -> None:
    """Raise `OSError` where nobody listens at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


@contextmanager
def _stderr_aside() -> Iterator[None]:
    """Ray's C++ says on standard error that its logging is set as asked."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
