"""`adhere rank`: the best of many candidates, all of them scored, or preference pairs for DPO."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    columns_of,
    given_heads,
    heads_argument,
    load_policy,
    model_arguments,
    reward_argument,
    reward_config,
    row_arguments,
    tell_prompting,
)
from adhere.commands.parser import Parser
from adhere.commands.sharded import by_ray, copy_heads, do_all, engine_arguments
from adhere.commands.train import INTERRUPTED
from adhere.config import flags_given, load_config, to_dict
from adhere.console import Console
from adhere.data import iter_rows, writable
from adhere.errors import UserError
from adhere.ranking_settings import RankConfig, bring_candidates
from adhere.resume import GrowingRows

if TYPE_CHECKING:
    from adhere.data import Row
    from adhere.integrations.ray import Work
    from adhere.model.policy import Policy
    from adhere.ranking import Draw
    from adhere.reward.heads import CopyHeads
    from adhere.reward.named import RewardConfig
    from adhere.shards import Shard

Rows = Callable[[], "Iterator[Row]"]


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help=f"rows; their `candidates` are ranked instead of samples ({ROWS})",
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="gets one line a prompt, in order"
    )
    reward_argument(parser)
    row_arguments(parser)
    parser.common.add_argument("--resume", action="store_true", help="go on with an interrupted ranking into --output")
    parser.add_options(RankConfig, "num_samples", "keep", "seed", "sampling.temperature", "sampling.max_new_tokens")
    parser.advanced.add_argument("--server", metavar="URL", help="OpenAI-compatible server to draw the candidates from")
    parser.advanced.add_argument(
        "--server-model", metavar="NAME", help="model to ask there (default: the only one it has)"
    )
    heads_argument(parser)
    engine_arguments(parser)


def _rank(options: argparse.Namespace, console: Console) -> int:
    ray = by_ray(options)
    config = load_config(RankConfig, None, flags_given(options, RankConfig))
    spec = reward_config(options.reward)
    check_models(options.model)
    rows: Rows = partial(iter_rows, options.prompts, columns_of(options), need=_need(spec), limit=options.limit)
    total, brought, digest = _survey(rows)
    if options.server_model and not options.server:
        raise UserError("--server-model without --server", fix="give --server URL too")
    if options.server and brought:
        raise UserError("the rows bring candidates", where=options.prompts, fix="leave --server out")
    if not brought:
        config.check_draw()
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "attention": options.attention,
        "prompts": digest,
        "reward": asdict(spec),
        "server": options.server,
        "server_model": options.server_model,
        **to_dict(config),
    }
    if ray:
        return _in_shards(options, console, config, spec, rows, total, brought, settings)
    output = GrowingRows(options.output, settings, resume=options.resume)

    policy = load_policy(options, console.track)

    from adhere.ranking import NO_TALLY, blank_between, check, lines_of, rank
    from adhere.reward.reward import Reward

    tell_prompting(console, policy, list(islice(rows(), 1000)))
    check(policy, console.track(rows(), "checking prompts", total), config)
    draw = _draw(options, policy, config, brought, console.warn)
    reward = Reward(spec, policy, given_heads(options))
    blank = blank_between(policy)
    first, tally = output.done, {**NO_TALLY, **output.tally}
    try:
        batches = rank(reward, islice(rows(), first, None), config, draw, first)
        for batch in console.track(batches, "ranking", total, size=len, done=first):
            lines = lines_of(batch, config, blank, tally)
            output.add(lines, output.done + len(batch), tally)
            console.figures(reward=tally["best"] / output.done)
    except KeyboardInterrupt:
        on = "the same command with --resume goes on" if output.done else "nothing is written yet"
        console.note(f"interrupted at prompt {output.done} of {total}; {on}")
        return INTERRUPTED
    except UserError:
        if output.done:
            console.note(f"{output.done} of {total} prompts are kept; the same command with --resume goes on")
        raise
    output.finish()
    _tell(console, config, options.output, total, tally)
    return 0


def _need(spec: RewardConfig) -> tuple[str, ...]:
    return ("answers",) if "exact" in spec.weights else ()


def _in_shards(
    options: argparse.Namespace,
    console: Console,
    config: RankConfig,
    spec: RewardConfig,
    rows: Rows,
    total: int,
    brought: bool,
    settings: Mapping[str, Any],
) -> int:
    """Shard by shard, by Ray's workers. A batch has the seed of its place in the file, whoever ranks it."""
    from adhere.ranking import check
    from adhere.shards import ShardedRows, shard_rows

    size = shard_rows(total, config.batch_size)
    settings = {"engine": "ray rank", **settings, "shard_rows": size}
    output = ShardedRows(options.output, settings, resume=options.resume)

    def fits(policy: Policy) -> None:
        check(policy, console.track(rows(), "checking prompts", total), config)
        _draw(options, policy, config, brought)

    heads = copy_heads(options, spec, fits, console.track)
    make = partial(ranker, options, config, spec, heads, brought, output.rows_file(options.prompts), output.folder)
    starts = range(0, total, size)
    if ended := do_all(options, console, output, make, options.prompts, starts, total, "ranking"):
        return ended
    _tell(console, config, options.output, total, output.tally())
    return 0


def ranker(
    options: argparse.Namespace,
    config: RankConfig,
    spec: RewardConfig,
    heads: CopyHeads | None,
    brought: bool,
    file: Path,
    folder: Path,
) -> Work:
    """What a worker does: load the model once, then rank the rows of shard after shard."""
    from adhere.ranking import NO_TALLY, blank_between, lines_of, rank
    from adhere.reward.reward import Reward

    policy = load_policy(options)
    reward = Reward(spec, policy, heads)
    draw, blank, columns = _draw(options, policy, config, brought), blank_between(policy), columns_of(options)

    def work(shard: Shard) -> dict[str, Any]:
        rows = iter_rows(file, columns, need=_need(spec), limit=shard.rows, begin=shard.position)
        tally = dict(NO_TALLY)
        lines = [
            line
            for batch in rank(reward, rows, config, draw, shard.first)
            for line in lines_of(batch, config, blank, tally)
        ]
        return shard.write(folder, lines, tally)

    return work


def _survey(rows: Rows) -> tuple[int, bool, str]:
    """How many rows there are, whether they bring candidates, and a digest of them all; every bad row is told."""
    total = brought = 0
    without = ""
    digest = blake2b(digest_size=16)
    for row in rows():
        total += 1
        brought += bool(row.candidates)
        without = without or ("" if row.candidates else row.where)
        digest.update(writable(row).encode("utf-8", "backslashreplace"))
    return total, bring_candidates(brought, total, without), digest.hexdigest()


def _draw(
    options: argparse.Namespace,
    policy: Policy,
    config: RankConfig,
    brought: bool,
    warn: Callable[[str], None] = warnings.warn,
) -> Draw:
    """Where the candidates come from."""
    from adhere.ranking import given_candidates, sampled_candidates, served_candidates

    if brought:
        return given_candidates(policy)
    if not options.server:
        given = [
            path.removeprefix("sampling.") for path in flags_given(options, RankConfig) if path.startswith("sampling.")
        ]
        return sampled_candidates(policy, config, given)
    from adhere.integrations.openai import Server

    server = Server(options.server, options.server_model, warn=warn)
    return served_candidates(
        policy, lambda prompts, seed: server.complete(prompts, config.num_samples, config.sampling, seed)
    )


def _tell(console: Console, config: RankConfig, output: Path, total: int, tally: Mapping[str, float]) -> None:
    """What was written, and what was left out."""
    from adhere.reward.group import flat_advice

    means = {"best": tally["best"] / total, "all candidates": tally["all"] / total}
    left_out = int(tally["left_out"])
    console.table(f"{total} prompts ranked", ["reward", "mean"], [[name, value] for name, value in means.items()])
    if config.keep == "pairs":
        say = console.warn if left_out == total else console.note
        say(f"{total - left_out} pairs; {left_out} prompts left out: best and worst tie, read alike, or are too close")
    if flat := int(tally["flat"]):
        console.warn(flat_advice(flat, total, tally["cut_off"] / total))
    console.note(f"written to {output}")
    console.result(
        {
            "prompts": total,
            "lines": total - left_out,
            "left_out": left_out,
            "flat": int(tally["flat"]),
            "cut_off": tally["cut_off"] / total,
            "output": output,
            "means": means,
        }
    )


RANK = Command(
    "best of n candidates, or preference pairs",
    "--model MODEL --prompts FILE --output FILE ",
    _arguments,
    _rank,
)
