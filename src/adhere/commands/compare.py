"""`adhere compare`: the arms of a YAML file, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adhere.commands.common import Command, check_models
from adhere.commands.parser import Parser, count
from adhere.compare.settings import CompareConfig, Files
from adhere.config import load_config
from adhere.console import Console
from adhere.data import read_rows


def _arguments(parser: Parser) -> None:
    parser.required.add_argument(
        "config", type=Path, metavar="FILE", help="YAML: models, arms, data, train, evaluation, seeds"
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets every run, compare.json and compare.html"
    )
    parser.common.add_argument(
        "--jobs", type=count, metavar="N", help="runs at a time (default: one a core on a CPU, else one)"
    )


def _run(options: argparse.Namespace, console: Console) -> int:
    config = load_config(CompareConfig, options.config, {} if options.jobs is None else {"jobs": options.jobs})
    check_models(*config.models)
    if isinstance(config.data, Files):
        for source in (config.data.prompts, config.data.evaluation, config.data.pairs):
            if source is not None:
                read_rows(source, config.data.columns, limit=1)  # they are there; all rows are read before the runs

    from adhere.compare.run import run_compare
    from adhere.report.compare import write_compare
    from adhere.report.tables import compare_tables

    found: dict[str, Any] = run_compare(config, options.output, console.track, lambda name: console.figures(last=name))
    page = write_compare(options.output)
    for table in compare_tables(found):
        console.table(*table)
    console.note(f"report in {page}")
    console.result(found)
    return 0


COMPARE = Command(
    "ways to improve a model, side by side on the same prompts and seeds", "FILE --output FOLDER ", _arguments, _run
)
