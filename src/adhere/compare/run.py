"""Runs a comparison: shares the data, sends the unfinished runs to processes, gathers what they left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from adhere.compare.estimates import summarise
from adhere.compare.plan import HUMAN, HYBRID, Job, jobs_of, processes
from adhere.compare.settings import CompareConfig, Files
from adhere.compare.work import load, perform, read_results, share_data
from adhere.config import dump_yaml, to_dict
from adhere.data import read_rows, require_measurable
from adhere.errors import RunFailed, UserError
from adhere.files import atomic_write, to_json
from adhere.progress import Progress, silent


def run_compare(
    config: CompareConfig,
    output: Path,
    progress: Progress = silent,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Run every arm that has not finished, write `output`/compare.json, and return what is in it. `progress` counts the
    runs; `on_run` gets the name of each arm that finishes.

    Runs that finished in an earlier call are not done again. Raises `UserError` for every fault of the configuration
    before anything is written, and `RunFailed` when a run fails; the finished ones stay.
    """
    jobs = jobs_of(config, output)
    _check_data(config, jobs)
    waiting = [job for job in jobs if not job.finished()]
    on_cpu = True
    for model in progress(config.models, "preparing", len(config.models)):
        first = next(job for job in jobs if job.model == model)
        policy = load(first)
        on_cpu = on_cpu and policy.device.type == "cpu"
        share_data(model, config.data, first.data, policy)
    atomic_write(output / "config.yaml", dump_yaml(config))
    finished = _run(waiting, processes(config, on_cpu))
    for name in progress(finished, "comparing", len(jobs), done=len(jobs) - len(waiting)):
        on_run(name)
    rows = read_rows(jobs[0].data / "evaluation.jsonl", jobs[0].training.columns)
    splits: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.fields.get("split"):
            splits.setdefault(str(row.fields["split"]), []).append(number)
    summaries = summarise(config, jobs, read_results(jobs), splits)
    document = {
        "config": to_dict(config),
        "prompts": len(rows),
        "shown": [{"prompt": row.prompt, "answers": list(row.answers)} for row in rows],
        "models": {model: {name: arm.to_json() for name, arm in arms.items()} for model, arms in summaries.items()},
    }
    atomic_write(output / "compare.json", to_json(document, indent=1))
    return document


def _check_data(config: CompareConfig, jobs: Sequence[Job]) -> None:
    """The files are there and can be read, before any work."""
    if isinstance(config.data, Files):
        read_rows(config.data.prompts, config.data.columns)
        require_measurable(read_rows(config.data.evaluation, config.data.columns))
        if config.data.pairs is not None:
            read_rows(config.data.pairs, config.data.columns, need=("chosen", "rejected"))
        elif any(job.arm.reward in (HUMAN, HYBRID) for job in jobs):
            raise UserError("arms that learn from labels need `pairs`", where="data", fix="give a file of pairs")


def _run(jobs: Sequence[Job], count: int) -> Iterator[str]:
    """Do `jobs`, `count` at a time, each in a process of its own, and give the name of each that is done. The first
    failure stops what has not begun."""
    # Spawned, not forked: a fork would copy the threads' locks of libraries that have started some.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        running: dict[Future[None], Job] = {pool.submit(perform, job): job for job in jobs}
        try:
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = running.pop(future)
                    error = future.exception()
                    if isinstance(error, UserError):
                        raise type(error)(str(error), where=f"arm {job.name}, seed {job.seed}") from error
                    if error is not None:
                        raise RunFailed(
                            f"{type(error).__name__}: {error}", where=f"arm {job.name}, seed {job.seed}"
                        ) from error
                    yield job.name
        finally:
            for future in running:
                future.cancel()
