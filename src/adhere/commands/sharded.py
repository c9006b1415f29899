"""`--engine ray` of the commands that write a line a row: the options, and the parts done by Ray's workers."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adhere.commands.common import given_heads, load_policy
from adhere.commands.parser import Parser, count
from adhere.commands.train import INTERRUPTED
from adhere.console import Console
from adhere.errors import UserError
from adhere.integrations.ray import Work
from adhere.progress import Progress, silent
from adhere.shards import ShardedRows

if TYPE_CHECKING:
    from adhere.model.policy import Policy
    from adhere.reward.heads import CopyHeads
    from adhere.reward.named import RewardConfig


def engine_arguments(parser: Parser) -> None:
    """Where the work is done."""
    parser.advanced.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="ray: by workers on this machine, or on the cluster that RAY_ADDRESS names; --output becomes a folder of "
        "parts (default: local)",
    )
    parser.advanced.add_argument(
        "--workers", type=count, metavar="N", help="Ray's workers, each with the model, a GPU or its cores (default: 1)"
    )


def by_ray(options: argparse.Namespace) -> bool:
    """Whether Ray does the work. Raises `UserError` where it cannot, or the options do not go together."""
    from adhere.integrations.ray import require_ray

    if options.engine == "local":
        if options.workers is not None:
            raise UserError("--workers without --engine ray", fix="add --engine ray, or leave it out")
        return False
    require_ray()
    options.workers = options.workers or 1
    return True


def copy_heads(
    options: argparse.Namespace,
    spec: RewardConfig,
    check: Callable[[Policy], None] = lambda policy: None,
    progress: Progress = silent,
) -> CopyHeads | None:
    """The copy heads that `spec` reads, measured here, once: every worker scores by the same.

    With the model at hand, `check` sees whether the rows fit it, and `options.device` gets the device it was put on.
    """
    from adhere.reward.reward import Reward

    policy = load_policy(options, progress)
    options.device = policy.device.type
    check(policy)
    found = Reward(spec, policy, given_heads(options)).heads
    if options.device == "cuda":  # a worker may be given this very GPU
        import torch

        del policy
        gc.collect()
        torch.cuda.empty_cache()
    return found


def do_all(
    options: argparse.Namespace,
    console: Console,
    output: ShardedRows,
    make: Callable[[], Work],
    source: str,
    starts: Sequence[int],
    total: int,
    title: str,
) -> int:
    """Do the parts of `source` that are not done; the exit code. `options.device` says what a worker gets."""
    from adhere.integrations.ray import cluster, do_shards, share

    gpu = options.device == "cuda"
    try:
        with cluster():
            each = share(options.workers, gpu)  # refused before anything is written
            console.note(f"workers: {options.workers}, each with {'1 GPU' if gpu else str(each['num_cpus']) + ' CPU'}")
            parts = output.begin(source, starts, total)
            work = do_shards(make, parts, output, options.workers, gpu) if parts else ()
            for _ in console.track(work, title, total, size=int, done=output.rows_done()):
                pass
    except KeyboardInterrupt:
        on = "the same command with --resume goes on" if output.folder.exists() else "nothing is written yet"
        console.note(f"interrupted at row {output.rows_done()} of {total}; {on}")
        return INTERRUPTED
    except UserError:
        if output.done:
            console.note(f"{output.rows_done()} of {total} rows are kept; the same command with --resume goes on")
        raise
    again = sum(written["attempts"] > 1 for written in output.done.values())
    if again:
        console.note(f"{again} of {len(output.done)} parts were begun again: a worker had died or failed")
    output.finish(total)
    return 0
