"""`adhere inspect`: where a model looked in the prompt while it answered, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from adhere.commands.common import (
    Command,
    Parser,
    columns_of,
    load_policy,
    mean,
    model_arguments,
    reward_config,
    row_arguments,
)
from adhere.console import Console
from adhere.errors import UserError


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="the prompt")
    asked.add_argument(
        "--prompts", metavar="FILE", help="rows; those with a `response` show it, the others a greedy one"
    )
    parser.add_argument("--response", metavar="TEXT", help="the response to --prompt (default: the model's greedy one)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="gets the page, HTML")
    parser.add_argument("--reward", help="a reward's name, module:function, or a YAML file: shown beside the attention")
    row_arguments(parser)
    parser.add_argument("--limit", type=int, default=10, metavar="N", help="the first N rows only (default: 10)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="of a greedy response (default: 64)"
    )


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from adhere.data import Row, iter_rows, read_rows
    from adhere.ranking import measure_heads
    from adhere.report.inspection import write_inspections
    from adhere.reward.reward import Reward

    spec = reward_config(options.reward) if options.reward else None
    if spec is not None and "exact" in spec.weights:
        raise UserError("`exact` reads answers, and there are none here", where="--reward", fix="choose another reward")
    if options.prompts and options.response is not None:
        raise UserError("--response is for --prompt", fix="write the responses into the rows")
    columns = columns_of(options)
    rows = (
        read_rows(options.prompts, columns, limit=options.limit)
        if options.prompts
        else [Row(options.prompt, response=options.response, where="--prompt")]
    )
    policy = load_policy(options)
    look = policy.inspect
    if spec is not None:
        reward = Reward(spec, policy, reference=policy)
        # On as many rows as there are: the few that are shown may not tell which heads copy.
        measure_heads(reward, iter_rows(options.prompts, columns) if options.prompts else rows)
        look = reward.inspect
    found = []
    with console.progress(len(rows), "inspecting") as progress:
        for row in rows:
            found.append(look(row.prompt, row.response, max_new_tokens=options.max_new_tokens, name=row.where))
            progress.update(len(found))
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
