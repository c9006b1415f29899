"""`adhere eval` and `adhere audit`: what measures and changes nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from adhere.commands.common import (
    Command,
    Parser,
    columns_of,
    given_heads,
    heads_argument,
    load_policy,
    model_arguments,
    reward_config,
    row_arguments,
)
from adhere.console import Console
from adhere.errors import UserError

GAMEABLE = 3


def _eval_arguments(parser: Parser) -> None:
    from adhere.config import add_arguments
    from adhere.measure.evaluate import EvalConfig

    model_arguments(parser)
    parser.add_argument("--baseline", metavar="MODEL", help="another model to compare with, prompt by prompt")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="rows; `answers`, `reference`, `prior` measure more"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets results.json and report.html"
    )
    row_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished evaluation in --output")
    add_arguments(parser, EvalConfig)


def _eval(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config, to_dict
    from adhere.data import read_rows
    from adhere.files import atomic_write, to_json
    from adhere.measure.batch_cache import BatchCache
    from adhere.measure.evaluate import EvalConfig, evaluate
    from adhere.report.page import write_report
    from adhere.report.tables import results_table
    from adhere.resume import fingerprint

    config = load_config(EvalConfig, None, flags_given(options, EvalConfig))
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)
    if (options.output / "results.json").exists():
        raise UserError("already holds results", where=str(options.output), fix="choose another --output")
    if config.judge and not options.baseline:
        raise UserError("--judge compares with a baseline", fix="add --baseline")
    settings = {
        "model": options.model,
        "baseline": options.baseline,
        "dtype": options.dtype,
        "attention": options.attention,
        "prompts": fingerprint(json.dumps([[row.prompt, row.fields] for row in rows], sort_keys=True, default=str)),
        **to_dict(config),
    }
    cache = BatchCache.open(options.output, settings, resume=options.resume)
    policy = load_policy(options)
    baseline = load_policy(options, options.baseline) if options.baseline else None
    with console.progress(len(rows) * (2 if baseline else 1), "evaluating") as progress:
        evaluation = evaluate(policy, rows, config, baseline, lambda done, _total: progress.update(done), cache)
    atomic_write(options.output / "results.json", to_json(evaluation.to_json(), indent=2))
    cache.close()
    page = write_report(options.output)
    console.table(*results_table(f"{len(rows)} prompts", evaluation.metrics))
    if baseline:
        console.note("p (Holm) is adjusted for the number of metrics: of twenty that mean nothing, one has p < 0.05")
    console.note(f"report in {page}")
    console.result(evaluation.to_json())
    return 0


def _audit_arguments(parser: Parser) -> None:
    from adhere.config import add_arguments
    from adhere.measure.audit import AuditConfig

    model_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="rows; `answers` tell right from wrong")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="gets audit.json and audit.html")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["attention"],
        metavar="NAME",
        help="the reward to audit (default: attention); more stand beside it: names, module:function, or YAML files",
    )
    heads_argument(parser)
    row_arguments(parser)
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="the first N prompts only (default: 100)")
    add_arguments(parser, AuditConfig)


def _audit(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config
    from adhere.data import read_rows
    from adhere.files import atomic_write, to_json
    from adhere.measure.audit import AuditConfig, audit, summary, with_controls
    from adhere.report.audit import write_audit
    from adhere.report.tables import audit_tables
    from adhere.reward.reward import Reward

    config = load_config(AuditConfig, None, flags_given(options, AuditConfig))
    specs = {name: reward_config(name) for name in options.reward}
    needs = any("exact" in spec.weights for spec in specs.values())
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit, need=("answers",) if needs else ())
    if (options.output / "audit.json").exists():
        raise UserError("already holds an audit", where=str(options.output), fix="choose another --output")
    policy = load_policy(options)
    heads = given_heads(options)
    own = {name: Reward(spec, policy, heads) for name, spec in specs.items()}
    rewards = with_controls(own, policy)
    with console.progress(len(rows), "auditing") as progress:
        verdicts = audit(policy, rows, rewards, config, progress.update)
    found = summary(options.model, len(rows), verdicts, config)
    atomic_write(options.output / "audit.json", to_json(found, indent=2))
    page = write_audit(options.output)
    for table in audit_tables(verdicts):
        console.table(*table)
    (console.warn if found["gameable"] else console.note)(f"{options.reward[0]}: {found['verdict']}")
    console.note(f"report in {page}")
    console.result(found)
    return GAMEABLE if found["gameable"] else 0


EVAL = Command(
    "measure a model, or compare two, with intervals",
    "--model MODEL --prompts FILE --output FOLDER ",
    _eval_arguments,
    _eval,
)
AUDIT = Command(
    "can this reward be gamed? judged before training",
    "--model MODEL --prompts FILE --output FOLDER ",
    _audit_arguments,
    _audit,
)
