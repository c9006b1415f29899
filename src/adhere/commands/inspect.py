"""`adhere inspect`: where a model looked in the prompt while it answered, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

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
)
from adhere.commands.parser import Parser, count
from adhere.console import Console
from adhere.data import Row, read_rows
from adhere.errors import UserError


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    asked = parser.required.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="the prompt; or")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help=f"rows; those with a `response` show it, the others the model's greedy one ({ROWS})",
    )
    parser.required.add_argument("--output", required=True, type=Path, metavar="FILE", help="gets the page, HTML")
    parser.common.add_argument(
        "--response", metavar="TEXT", help="the response to --prompt (default: the model's greedy one)"
    )
    reward_argument(parser, None, "a reward's name: its signals are shown beside the attention")
    heads_argument(parser)
    row_arguments(parser, limit=10)
    parser.common.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="length limit of a greedy response (default: 64)"
    )


def _inspect(options: argparse.Namespace, console: Console) -> int:
    spec = reward_config(options.reward) if options.reward else None
    if spec is not None and "exact" in spec.weights:
        raise UserError("`exact` reads answers, and there are none here", where="--reward", fix="choose another reward")
    if options.prompts and options.response is not None:
        raise UserError("--response is for --prompt", fix="write the responses into the rows")
    check_new(options.output)
    check_models(options.model)
    columns = columns_of(options)
    rows = (
        read_rows(options.prompts, columns, limit=options.limit)
        if options.prompts
        else [Row(options.prompt, response=options.response, where="--prompt")]
    )

    from adhere.report.inspection import write_inspections
    from adhere.reward.reward import Reward

    policy = load_policy(options, console.track)
    look = policy.inspect
    if spec is not None:
        look = Reward(spec, policy, given_heads(options)).inspect
    found = [
        look(row.prompt, row.response, max_new_tokens=options.max_new_tokens, name=row.where)
        for row in console.track(rows, "inspecting", len(rows))
    ]
    write_inspections(found, options.model, options.output)
    means = {name: mean([inspection.figures[name] for inspection in found]) for name in found[0].figures}
    title = f"{len(found)} response{'s' * (len(found) > 1)} inspected"
    console.table(title, ["figure", "mean"], [[name, value] for name, value in means.items()])
    console.note(f"written to {options.output}")
    shown = [{"response": inspection.response, "figures": dict(inspection.figures)} for inspection in found]
    console.result({"output": options.output, "inspections": shown})
    return 0


INSPECT = Command(
    "where the model looked while it answered, as a page",
    "--model MODEL (--prompt TEXT | --prompts FILE) --output FILE ",
    _arguments,
    _inspect,
)
