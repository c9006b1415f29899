"""`adhere check`: whether given answers rest on their context, sentence by sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    check_new,
    columns_of,
    load_policy,
    model_arguments,
    row_arguments,
    tell_prompting,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.data import read_rows, require_documents, writable, write_jsonl
from adhere.measure.settings import CheckConfig

SHOWN = 20
"""Unsupported sentences that are shown; the file has all."""


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help=f"rows with a context and a `response`; `supported`, true or false, calibrates ({ROWS})",
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="gets each row plus faithfulness and sentences"
    )
    row_arguments(parser)
    parser.add_options(CheckConfig, "threshold")


def _check(options: argparse.Namespace, console: Console) -> int:
    config = load_config(CheckConfig, None, flags_given(options, CheckConfig))
    check_models(options.model)
    check_new(options.output)
    rows = read_rows(options.input, columns_of(options), need=("response",), limit=options.limit)
    require_documents(rows)
    for row in rows:
        writable(row)

    policy = load_policy(options, console.track)

    from adhere.checking import calibration, check_rows

    tell_prompting(console, policy, rows)
    checked = list(check_rows(policy, rows, config))
    found = calibration(checked, rows)
    write_jsonl(options.output, checked)
    told = [one for row in checked for one in row["sentences"]]
    unsupported = sum(not one["supported"] for one in told)
    console.table(
        f"{len(rows)} responses checked, {unsupported} of {len(told)} sentences unsupported",
        ["row", "support", "sentence"],
        [
            [row.where.rpartition(":")[2] or n, f"{one['support']:.2f}", one["text"]]
            for n, (row, own) in enumerate(zip(rows, checked, strict=True), 1)
            for one in own["sentences"]
            if not one["supported"]
        ][:SHOWN],
    )
    if found is not None:
        console.table(
            f"supported or not, {found.rows} labelled rows (0.5 = chance)",
            ["score", "area under ROC"],
            [[name, f"{one.area:.2f} [{one.low:.2f}, {one.high:.2f}]"] for name, one in found.areas.items()],
        )
        console.table(
            "calibration",
            ["faithfulness", "rows", "supported"],
            [[f"{one['from']:.2f} to {one['to']:.2f}", one["rows"], f"{one['supported']:.0%}"] for one in found.curve],
        )
        console.note(
            f"best threshold for these rows: {found.threshold:.2f}, right on {found.accuracy:.0%} of each class"
        )
    summary = {"rows": len(rows), "sentences": len(told), "unsupported": unsupported, "output": options.output}
    console.result({**summary, "calibration": None if found is None else found.to_json()})
    return 0


CHECK = Command(
    "do given answers rest on their context? sentence by sentence",
    "--model MODEL --input FILE --output FILE ",
    _arguments,
    _check,
)
