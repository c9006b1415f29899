"""`adhere preferences make` and `adhere preferences fit`: pairs without people, and a reward model of pairs."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from adhere.commands.common import Command, Parser, columns_of, load_policy, mean, model_arguments, row_arguments
from adhere.console import Console
from adhere.errors import UserError


def _arguments(parser: Parser) -> None:
    from adhere.config import add_arguments
    from adhere.learn.preference import PreferenceConfig
    from adhere.measure.preferences import PairConfig

    actions = parser.add_subparsers(dest="action", required=True, metavar="make|fit")
    make = actions.add_parser("make", help="pairs of a good response and its corruption, without people")
    model_arguments(make)
    make.add_argument("--prompts", required=True, metavar="FILE", help="rows; `answers` or `reference` are preferred")
    make.add_argument("--output", required=True, type=Path, metavar="FILE", help="gets prompt, chosen, rejected")
    row_arguments(make)
    make.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    add_arguments(make, PairConfig)
    fit = actions.add_parser("fit", help="a reward model of rows with prompt, chosen and rejected")
    fit.add_argument("--pairs", required=True, metavar="FILE", help="rows with prompt, chosen and rejected")
    row_arguments(fit)
    add_arguments(fit, PreferenceConfig)
    for part in (make, fit):
        part.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        part.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _run(options: argparse.Namespace, console: Console) -> int:
    return (_make if options.action == "make" else _fit)(options, console)


def _make(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config
    from adhere.data import read_rows, write_jsonl
    from adhere.measure.preferences import PairConfig, make_pairs

    config = load_config(PairConfig, None, flags_given(options, PairConfig))
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)
    with console.progress(len(rows), "making pairs") as progress:
        pairs = make_pairs(load_policy(options), rows, config, progress.update)
    if not pairs:
        raise UserError("no prompt gave a pair", where=options.prompts, fix="raise --max-new-tokens, or give answers")
    write_jsonl(options.output, pairs)
    kinds = dict(sorted(Counter(pair["corruption"] for pair in pairs).items()))
    console.table(f"{len(pairs)} pairs", ["corruption", "pairs"], [[name, count] for name, count in kinds.items()])
    console.result({"pairs": len(pairs), "output": options.output, "corruptions": kinds})
    return 0


def _fit(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config
    from adhere.data import read_rows
    from adhere.learn.preference import PreferenceConfig, fit
    from adhere.measure.stats import bootstrap

    config = load_config(PreferenceConfig, None, flags_given(options, PreferenceConfig))
    rows = read_rows(options.pairs, columns_of(options), need=("chosen", "rejected"))
    fitted = fit(config, rows, console.warn)
    found: dict[str, object] = {"pairs": fitted.pairs, "output": config.output, "accuracy": None}
    words = f"{fitted.pairs} pairs learned"
    if fitted.accuracy:
        figure = bootstrap(fitted.accuracy)
        found["accuracy"] = figure.to_json()
        words += f"; of {figure.n} held out, {mean(fitted.accuracy):.2f} in order [{figure.low:.2f}, {figure.high:.2f}]"
    console.note(f"{words}; use it with --reward preference:{config.output}")
    console.result(found)
    return 0


PREFERENCES = Command(
    "preference pairs without people (make), a reward model of pairs (fit)", "make|fit ", _arguments, _run
)
