"""`adhere bench`: whether a reward prefers what the passage supports, against rivals, on rows with known answers."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    check_new_folder,
    columns_of,
    given_heads,
    heads_argument,
    list_rewards,
    load_policy,
    model_arguments,
    reward_written,
    tell_prompting,
)
from adhere.commands.parser import Parser, positive
from adhere.config import flags_given, load_config, to_dict
from adhere.console import Console
from adhere.data import Columns, read_rows, write_jsonl
from adhere.faithfulness.settings import BenchConfig, reward_of, with_controls
from adhere.files import atomic_write, to_json
from adhere.resume import fingerprint
from adhere.reward.named import SIGNALS

CUT_OFF = 0.5
"""Share of samples cut off from which on it is said."""


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--data", required=True, metavar="FILE", help=f"rows with `context`, `question` and `answers` ({ROWS})"
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets bench.json and rows.jsonl"
    )
    parser.common.add_argument(
        "--reward",
        nargs="+",
        default=["attention"],
        metavar="NAME",
        help="rewards to measure (default: attention); a signal's name is the signal by itself",
    )
    list_rewards(parser)
    parser.epilog = f"{parser.epilog}\nsignals:\n  {', '.join(SIGNALS)}"
    parser.common.add_argument(
        "--limit", type=positive, metavar="N", help="measure the first N rows only; the others still lend their answers"
    )
    parser.common.add_argument("--resume", action="store_true", help="go on with the unfinished bench in --output")
    parser.add_options(BenchConfig, "splits", "num_samples", "seed")
    heads_argument(parser)
    parser.add_options(Columns)


def _bench(options: argparse.Namespace, console: Console) -> int:
    config = load_config(BenchConfig, None, flags_given(options, BenchConfig))
    specs = with_controls({name: reward_of(reward_written(name)) for name in options.reward})
    check_new_folder(options.output, "bench.json", "a bench")
    check_models(options.model)
    columns = columns_of(options)
    rows = read_rows(options.data, columns)

    from adhere.faithfulness.run import bench, questions_of
    from adhere.measure.batch_cache import BatchCache
    from adhere.report.tables import bench_tables
    from adhere.reward.heads import copy_heads
    from adhere.reward.reward import Reward

    questions_of(rows, columns)
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "attention": options.attention,
        "data": fingerprint(json.dumps([[row.prompt, row.fields] for row in rows], sort_keys=True, default=str)),
        "limit": options.limit,
        "heads": options.heads,
        "rewards": {name: asdict(spec) for name, spec in specs.items()},
        **to_dict(config),
    }
    cache = BatchCache.open(options.output, settings, resume=options.resume)
    policy = load_policy(options, console.track)
    tell_prompting(console, policy, rows)
    heads = given_heads(options) or copy_heads(policy)
    rewards = {name: Reward(spec, policy, heads) for name, spec in specs.items()}
    found = bench(policy, rows, rewards, heads, config, columns=columns, limit=options.limit, cache=cache)
    about = {"fingerprint": policy.fingerprint(), "file": options.data, "settings": settings}
    written = {**about, **found.to_json()}
    write_jsonl(options.output / "rows.jsonl", found.records)
    atomic_write(options.output / "bench.json", to_json(written, indent=2))
    cache.close()
    for table in bench_tables(found, list(rewards), list(dict.fromkeys(options.reward))):
        console.table(*table)
    if found.cut_off is not None and found.cut_off >= CUT_OFF:
        console.warn(
            f"{found.cut_off:.0%} of the samples were cut off, which a reward with the gate `ended` cannot tell apart: "
            "raise --max-new-tokens, or show the model an example of a short answer"
        )
    console.note(f"every candidate with its scores in {options.output / 'rows.jsonl'}")
    console.result(written)
    return 0


BENCH = Command(
    "does a reward prefer what the passage supports? against rivals",
    "--model MODEL --data FILE --output FOLDER ",
    _arguments,
    _bench,
)
