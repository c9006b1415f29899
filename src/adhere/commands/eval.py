"""`adhere eval`: measures a model, or compares two."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from adhere.commands.common import (
    ROWS,
    Command,
    check_models,
    check_new_folder,
    columns_of,
    given_heads,
    heads_argument,
    heads_to_show,
    list_rewards,
    load_policy,
    model_arguments,
    row_arguments,
    tell_prompting,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config, to_dict
from adhere.console import Console
from adhere.data import read_rows, require_measurable
from adhere.errors import UserError
from adhere.files import atomic_write, to_json
from adhere.measure.settings import EvalConfig
from adhere.origin import record
from adhere.resume import fingerprint

if TYPE_CHECKING:
    from adhere.measure.evaluate import Evaluation
    from adhere.model.policy import Policy


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help=f"rows; `answers`, `reference` and `prior` measure more ({ROWS})",
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets results.json and report.html"
    )
    parser.common.add_argument("--baseline", metavar="MODEL", help="another model to compare with, prompt by prompt")
    heads_argument(parser)
    row_arguments(parser)
    parser.common.add_argument("--resume", action="store_true", help="go on with the unfinished evaluation in --output")
    parser.add_options(EvalConfig, "num_samples", "max_new_tokens", "seed")
    list_rewards(parser)


def _eval(options: argparse.Namespace, console: Console) -> int:
    config = load_config(EvalConfig, None, flags_given(options, EvalConfig))
    if config.judge and not options.baseline:
        raise UserError("--judge compares with a baseline", fix="add --baseline")
    check_new_folder(options.output, "results.json", "results")
    check_models(options.model, options.baseline)
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)
    require_measurable(rows)

    from adhere.measure.batch_cache import BatchCache
    from adhere.measure.evaluate import evaluate
    from adhere.report.page import write_report
    from adhere.report.tables import results_table

    settings = {
        "model": options.model,
        "baseline": options.baseline,
        "dtype": options.dtype,
        "attention": options.attention,
        "prompts": fingerprint(json.dumps([[row.prompt, row.fields] for row in rows], sort_keys=True, default=str)),
        **to_dict(config),
    }
    cache = BatchCache.open(options.output, settings, resume=options.resume)
    policy = load_policy(options, console.track)
    tell_prompting(console, policy, rows)
    baseline = load_policy(options, console.track, options.baseline) if options.baseline else None
    evaluation = evaluate(policy, rows, config, baseline, cache, given_heads(options))
    if baseline is not None:
        _keep_changed(options, evaluation, policy, baseline, console)
    record(options.output, options.command_line)
    atomic_write(options.output / "results.json", to_json(evaluation.to_json(), indent=2))
    cache.close()
    page = write_report(options.output)
    console.table(*results_table(f"{len(rows)} prompts", evaluation.metrics))
    if baseline:
        console.note("p (Holm) is adjusted for the number of metrics: of twenty that mean nothing, one has p < 0.05")
    console.note(f"report in {page}")
    console.result(evaluation.to_json())
    return 0


def _keep_changed(
    options: argparse.Namespace, evaluation: Evaluation, policy: Policy, baseline: Policy, console: Console
) -> None:
    """Keep a changed answer with the attention of both models, for the page."""
    from adhere.measure.changed import FILE, inspect_changed

    found = inspect_changed(evaluation, policy, baseline, heads_to_show(options, baseline, console))
    if found is not None:
        atomic_write(options.output / FILE, to_json(found))


EVAL = Command(
    "measure a model, or compare two, with intervals",
    "--model MODEL --prompts FILE --output FOLDER ",
    _arguments,
    _eval,
)
