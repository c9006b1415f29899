"""`--engine ray` of the commands that write a line a row: the options, and the parts done by Ray's workers."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from adhere.commands.common import Parser, load_policy
from adhere.commands.train import INTERRUPTED
from adhere.console import Console
from adhere.errors import UserError
from adhere.integrations.ray import Work
from adhere.shards import ShardedRows

if TYPE_CHECKING:
    from torch import Tensor

    from adhere.data import Row
    from adhere.model.policy import Policy
    from adhere.reward.named import RewardConfig


def engine_arguments(parser: Parser) -> None:
    """Where the work is done."""
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="ray: by workers on this machine, or on the cluster that RAY_ADDRESS names; --output becomes a folder of "
        "parts (default: local)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="Ray's workers, each with the model, a GPU or its cores (default: 1)"
    )


def by_ray(options: argparse.Namespace) -> bool:
    """Whether Ray does the work. Raises `UserError` where it cannot, or the options do not go together."""
    from adhere.integrations.ray import require_ray

    if options.engine == "local":
        if options.workers is not None:
            raise UserError("--workers without --engine ray", fix="add --engine ray, or leave it out")
        return False
    require_ray()
    options.workers = 1 if options.workers is None else options.workers
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}", fix="set it to 1 or above")
    return True


def copy_heads(
    options: argparse.Namespace,
    spec: RewardConfig,
    rows: Callable[[], Iterable[Row]],
    check: Callable[[Policy], None] = lambda policy: None,
) -> Tensor | None:
    """The copy heads that `spec` reads, measured here, once: every worker scores by the same.

    With the model at hand, `check` sees whether the rows fit it, and `options.device` gets the device it was put on.
    """
    from adhere.ranking import measure_heads
    from adhere.reward.reward import Reward

    policy = load_policy(options)
    options.device = policy.device.type
    check(policy)
    reward = Reward(spec, policy, reference=policy)
    measure_heads(reward, rows())
    weights = None if reward.copy_weights is None else reward.copy_weights.cpu()
    if options.device == "cuda":  # a worker may be given this very GPU
        import torch

        del policy, reward
        gc.collect()
        torch.cuda.empty_cache()
    return weights


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
            before = output.rows_done()
            with console.progress(total - before, title) as progress:
                for done in do_shards(make, parts, output, options.workers, gpu) if parts else ():
                    progress.update(done - before)
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
