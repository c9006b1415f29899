"""`adhere inspect`: where a model looked in the prompt while it answered, as a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    heads_to_show,
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
from adhere.reward.named import Reads, RewardConfig

if TYPE_CHECKING:
    from adhere.inspection.inspection import Inspection


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
        "--response",
        action="append",
        metavar="TEXT",
        help="the response to --prompt (default: the model's greedy one); given twice, both stand side by side",
    )
    parser.common.add_argument(
        "--baseline", metavar="MODEL", help="another model, as before training: its answers stand beside"
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
    check_models(options.model, options.baseline)
    columns = columns_of(options)
    rows = (
        read_rows(options.prompts, columns, limit=options.limit)
        if options.prompts
        else [Row(options.prompt, where="--prompt")]
    )

    from adhere.report.inspection import write_inspections

    models = {"Before": options.baseline, "After": options.model} if options.baseline else {"": options.model}
    found: list[dict[str, Inspection]] = [{} for _ in rows]
    for when, model in models.items():
        look = _looking(options, spec, model, console)
        for row, seen in zip(console.track(rows, "inspecting", len(rows)), found, strict=True):
            given = options.response or [row.response]
            for number, response in enumerate(given, 1):
                label = " · ".join(filter(None, [when, f"Response {number}" if len(given) > 1 else ""]))
                seen[label] = look(row.prompt, response, max_new_tokens=options.max_new_tokens, name=row.where)
    write_inspections(found, options.model, options.output)
    _tell(found, console)
    console.note(f"written to {options.output}")
    shown = [_told(label, inspection) for seen in found for label, inspection in seen.items()]
    console.result({"output": options.output, "inspections": shown})
    return 0


def _looking(
    options: argparse.Namespace, spec: RewardConfig | None, model: str, console: Console
) -> Callable[..., Inspection]:
    """What inspects the responses of `model`."""
    from adhere.reward.inspecting import inspect
    from adhere.reward.reward import Reward

    policy = load_policy(options, console.track, model)
    own = spec is not None and Reads.COPY in spec.reads  # that cannot do without
    heads = given_heads(options) if own else heads_to_show(options, policy, console)
    return partial(inspect, policy, heads=heads) if spec is None else Reward(spec, policy, heads).inspect


def _tell(found: Sequence[Mapping[str, Inspection]], console: Console) -> None:
    """The means of the figures, a column a label."""
    labels = list(found[0])
    every = {label: [seen[label].figures for seen in found] for label in labels}
    names = dict.fromkeys(name for label in labels for name in every[label][0])
    rows = [[name, *(mean([figures[name] for figures in every[label]]) for label in labels)] for name in names]
    count = len(found) * len(labels)
    title = f"{count} response{'s' * (count > 1)} inspected"
    console.table(title, ["figure", *(label or "mean" for label in labels)], rows)


def _told(label: str, inspection: Inspection) -> dict[str, Any]:
    """An inspection as `--json` has it."""
    passages = [{"text": one.text, "share": round(one.share, 4)} for one in inspection.passages]
    told = {"response": inspection.response, "figures": dict(inspection.figures), "passages": passages}
    return {"label": label, **told} if label else told


INSPECT = Command(
    "where the model looked while it answered, as a page",
    "--model MODEL (--prompt TEXT | --prompts FILE) --output FILE ",
    _arguments,
    _inspect,
)
