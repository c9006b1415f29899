"""`adhere score`: the reward and every signal of given responses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    check_new,
    columns_of,
    given_heads,
    heads_argument,
    load_policy,
    mean,
    model_arguments,
    reward_argument,
    reward_config,
    row_arguments,
    tell_prompting,
)
from adhere.commands.parser import Parser, count
from adhere.commands.sharded import by_ray, copy_heads, do_all, engine_arguments
from adhere.console import Console
from adhere.data import iter_rows, read_rows, writable, write_jsonl
from adhere.errors import UserError

if TYPE_CHECKING:
    from adhere.data import Row
    from adhere.integrations.ray import Work
    from adhere.reward.heads import CopyHeads
    from adhere.reward.named import RewardConfig
    from adhere.shards import Shard

Rows = Callable[[], "Iterator[Row]"]


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--input", required=True, metavar="FILE", help=f"rows with a prompt and a `response` ({ROWS})"
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="gets each row plus reward and signals"
    )
    reward_argument(parser)
    row_arguments(parser)
    parser.advanced.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="rows scored at a time (default: 64)"
    )
    heads_argument(parser)
    engine_arguments(parser)
    parser.advanced.add_argument("--resume", action="store_true", help="go on with what --engine ray left unfinished")


def _score(options: argparse.Namespace, console: Console) -> int:
    ray = by_ray(options)
    if options.resume and not ray:
        raise UserError("--resume goes on with what --engine ray left", fix="add --engine ray, or leave it out")
    spec = reward_config(options.reward)
    check_models(options.model)
    return _in_shards(options, console, spec) if ray else _at_once(options, console, spec)


def _need(spec: RewardConfig) -> tuple[str, ...]:
    return ("response", "answers") if "exact" in spec.weights else ("response",)


def _at_once(options: argparse.Namespace, console: Console, spec: RewardConfig) -> int:
    """The whole file, held in memory."""
    check_new(options.output)
    rows = read_rows(options.input, columns_of(options), need=_need(spec), limit=options.limit)
    for row in rows:
        writable(row)

    policy = load_policy(options, console.track)

    from adhere.ranking import score_rows
    from adhere.reward.reward import Reward

    tell_prompting(console, policy, rows)
    reward = Reward(spec, policy, given_heads(options))
    scored = score_rows(reward, rows, batch_size=options.batch_size)
    write_jsonl(options.output, scored)
    names = ["reward", *scored[0]["signals"]]
    means = {name: mean([{"reward": row["reward"], **row["signals"]}[name] for row in scored]) for name in names}
    _tell(options, console, spec, len(rows), len({str(row.prompt) for row in rows}), means)
    return 0


def _in_shards(options: argparse.Namespace, console: Console, spec: RewardConfig) -> int:
    """Shard by shard, by Ray's workers. Each scores the batches that the whole file would have been scored in."""
    from adhere.ranking import check_given, group_starts, scattered
    from adhere.shards import ShardedRows, shard_rows

    rows: Rows = partial(iter_rows, options.input, columns_of(options), need=_need(spec), limit=options.limit)
    total, digest = 0, blake2b(digest_size=16)
    for row in rows():
        total += 1
        digest.update(writable(row).encode("utf-8", "backslashreplace"))
    if again := scattered(rows):
        raise UserError(
            f"the prompt of {again[1].where} again, with others in between: responses to a prompt are compared",
            where=again[0].where,
            fix="sort the rows by prompt, or use --engine local",
        )
    size = shard_rows(total, options.batch_size)
    settings = {
        "engine": "ray score",
        "model": options.model,
        "dtype": options.dtype,
        "attention": options.attention,
        "input": digest.hexdigest(),
        "reward": asdict(spec),
        "batch_size": options.batch_size,
        "shard_rows": size,
    }
    output = ShardedRows(options.output, settings, resume=options.resume)
    heads = copy_heads(options, spec, lambda policy: check_given(policy, rows()), console.track)
    starts, groups = group_starts(rows(), options.batch_size, size)
    make = partial(scorer, options, spec, heads, output.rows_file(options.input), output.folder)
    if ended := do_all(options, console, output, make, options.input, starts, total, "scoring"):
        return ended
    tally = output.tally()
    _tell(options, console, spec, total, groups, {name: value / total for name, value in tally.items()})
    return 0


def scorer(options: argparse.Namespace, spec: RewardConfig, heads: CopyHeads | None, file: Path, folder: Path) -> Work:
    """What a worker does: load the model once, then score the rows of shard after shard."""
    from adhere.ranking import score_rows
    from adhere.reward.reward import Reward

    policy = load_policy(options)
    reward = Reward(spec, policy, heads)
    columns = columns_of(options)

    def work(shard: Shard) -> dict[str, Any]:
        rows = list(iter_rows(file, columns, need=_need(spec), limit=shard.rows, begin=shard.position))
        scored = score_rows(reward, rows, batch_size=options.batch_size)
        tally: dict[str, float] = {}
        for row in scored:
            for name, value in {"reward": row["reward"], **row["signals"]}.items():
                tally[name] = tally.get(name, 0.0) + value
        return shard.write(folder, scored, tally)

    return work


def _tell(
    options: argparse.Namespace,
    console: Console,
    spec: RewardConfig,
    rows: int,
    groups: int,
    means: Mapping[str, float],
) -> None:
    """What was written, and whether it says anything."""
    if groups == rows and spec.normalise == "group":
        console.warn(
            f"{options.reward} compares responses to the same prompt, and every prompt here has one: each reward is 0; "
            "read the signals, or give several responses to each prompt"
        )
    console.table(f"{rows} responses scored", ["signal", "mean"], [[name, value] for name, value in means.items()])
    console.result({"rows": rows, "output": options.output, "means": means})


SCORE = Command(
    "reward and signals of given responses", "--model MODEL --input FILE --output FILE ", _arguments, _score
)
