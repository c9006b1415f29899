"""`adhere audit`: whether a reward can be gamed, found out before training."""

from __future__ import annotations

import argparse
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
    reward_config,
    row_arguments,
    tell_prompting,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.data import read_rows
from adhere.files import atomic_write, to_json
from adhere.measure.settings import AuditConfig

GAMEABLE = 3


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.required.add_argument(
        "--prompts", required=True, metavar="FILE", help=f"rows; `answers` tell right from wrong ({ROWS})"
    )
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets audit.json and audit.html"
    )
    parser.common.add_argument(
        "--reward",
        nargs="+",
        default=["attention"],
        metavar="NAME",
        help="the reward to audit (default: attention); further ones are shown beside it",
    )
    list_rewards(parser)
    heads_argument(parser)
    row_arguments(parser, limit=100)
    parser.add_options(AuditConfig, "num_samples", "max_new_tokens", "seed")


def _audit(options: argparse.Namespace, console: Console) -> int:
    config = load_config(AuditConfig, None, flags_given(options, AuditConfig))
    specs = {name: reward_config(name) for name in options.reward}
    check_new_folder(options.output, "audit.json", "an audit")
    check_models(options.model)
    needs = any("exact" in spec.weights for spec in specs.values())
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit, need=("answers",) if needs else ())

    policy = load_policy(options, console.track)

    from adhere.measure.audit import audit, summary, with_controls
    from adhere.report.audit import write_audit
    from adhere.report.tables import audit_tables, win_table
    from adhere.reward.reward import Reward

    tell_prompting(console, policy, rows)
    heads = given_heads(options)
    own = {name: Reward(spec, policy, heads) for name, spec in specs.items()}
    rewards = with_controls(own, policy)
    verdicts = audit(policy, rows, rewards, config)
    found = summary(options.model, len(rows), verdicts, config)
    atomic_write(options.output / "audit.json", to_json(found, indent=2))
    page = write_audit(options.output)
    for table in audit_tables(verdicts):
        console.table(*table)
    if found["gameable"]:
        console.table(*win_table(verdicts[options.reward[0]], config.max_hack_rate))
    (console.warn if found["gameable"] else console.note)(f"{options.reward[0]}: {found['verdict']}")
    console.note(f"report in {page}")
    console.result(found)
    return GAMEABLE if found["gameable"] else 0


AUDIT = Command(
    "can this reward be gamed? found out before training",
    "--model MODEL --prompts FILE --output FOLDER ",
    _arguments,
    _audit,
)
