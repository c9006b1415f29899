"""`adhere preferences make` and `adhere preferences fit`: pairs without people, and a reward model of pairs."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    check_new,
    check_new_folder,
    columns_of,
    load_policy,
    mean,
    model_arguments,
    row_arguments,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.data import read_rows, write_jsonl
from adhere.errors import UserError
from adhere.preferences.settings import PairConfig, PreferenceConfig


def _arguments(parser: Parser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="make|fit", prog="adhere preferences", title="actions"
    )
    make = actions.add_parser(
        "make",
        usage="adhere preferences make --model MODEL --prompts FILE --output FILE [options]",
        help="pairs of a good response and its corruption, without people",
    )
    model_arguments(make)
    make.required.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help=f"rows; `answers` or `reference` become the preferred response ({ROWS})",
    )
    make.required.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="gets rows with prompt, chosen and rejected"
    )
    row_arguments(make)
    make.add_options(PairConfig, "pairs_per_prompt", "max_new_tokens", "seed")
    fit = actions.add_parser(
        "fit",
        usage="adhere preferences fit --model MODEL --pairs FILE --output FOLDER [options]",
        help="a reward model of rows with prompt, chosen and rejected",
    )
    fit.required.add_argument(
        "--pairs", required=True, metavar="FILE", help=f"rows with prompt, chosen and rejected ({ROWS})"
    )
    row_arguments(fit)
    fit.add_options(PreferenceConfig, "steps", "held_out", "seed", "device")


def _run(options: argparse.Namespace, console: Console) -> int:
    return (_make if options.action == "make" else _fit)(options, console)


def _make(options: argparse.Namespace, console: Console) -> int:
    config = load_config(PairConfig, None, flags_given(options, PairConfig))
    check_new(options.output)
    check_models(options.model)
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)

    from adhere.preferences.pairs import make_pairs

    pairs = make_pairs(load_policy(options, console.track), rows, config)
    if not pairs:
        raise UserError("no prompt gave a pair", where=options.prompts, fix="raise --max-new-tokens, or give answers")
    write_jsonl(options.output, pairs)
    kinds = dict(sorted(Counter(pair["corruption"] for pair in pairs).items()))
    console.table(f"{len(pairs)} pairs", ["corruption", "pairs"], [[name, count] for name, count in kinds.items()])
    console.result({"pairs": len(pairs), "output": options.output, "corruptions": kinds})
    return 0


def _fit(options: argparse.Namespace, console: Console) -> int:
    config = load_config(PreferenceConfig, None, flags_given(options, PreferenceConfig))
    check_new_folder(Path(config.output))
    check_models(config.model)
    rows = read_rows(options.pairs, columns_of(options), need=("chosen", "rejected"), limit=options.limit)

    from adhere.measure.stats import bootstrap
    from adhere.preferences.fit import fit

    fitted = fit(config, rows, console.warn, console.track)
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
