"""`adhere calibrate`: fit the weights to labelled pairs, choose which to ask for next, and ask."""

from __future__ import annotations

import argparse
from pathlib import Path

from adhere.commands.common import (
    Command,
    Parser,
    columns_of,
    load_policy,
    model_arguments,
    reward_config,
    row_arguments,
)
from adhere.console import Console
from adhere.errors import UserError


def _arguments(parser: Parser) -> None:
    from adhere.config import add_arguments
    from adhere.measure.suggest import SuggestConfig

    model_arguments(parser, required=False)
    parser.add_argument("--pairs", metavar="FILE", help="fit: rows with prompt, chosen and rejected")
    parser.add_argument("--answer", metavar="FILE", help="ask on a local page: rows that --suggest wrote")
    parser.add_argument("--prompts", metavar="FILE", help="with --suggest: rows with prompts")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="gets the weights (YAML), questions or answers",
    )
    row_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    parser.add_argument(
        "--reward", default="attention", help="with --suggest: what the answers are to correct (default: attention)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="with --answer: port (default: any free one)")
    add_arguments(parser, SuggestConfig)


def _run(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given
    from adhere.measure.suggest import SuggestConfig

    asked = {
        "--pairs": options.pairs is not None,
        "--suggest": "suggest" in flags_given(options, SuggestConfig),
        "--answer": options.answer is not None,
    }
    if sum(asked.values()) != 1:
        raise UserError("give one of --pairs, --suggest and --answer", fix="adhere calibrate --help tells them apart")
    if options.model is None and not asked["--answer"]:
        raise UserError("no --model", fix="give the folder or hub id of the model to calibrate")
    if asked["--suggest"] and options.prompts is None:
        raise UserError("--suggest needs --prompts", fix="give a file of prompts")
    return (_fit if asked["--pairs"] else _suggest if asked["--suggest"] else _answer)(options, console)


def _fit(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config
    from adhere.data import read_rows
    from adhere.measure.calibrate import calibrate
    from adhere.measure.suggest import SuggestConfig

    config = load_config(SuggestConfig, None, flags_given(options, SuggestConfig))
    pairs = read_rows(options.pairs, columns_of(options), limit=options.limit)
    rows = [row for row in pairs if not row.fields.get("tie")]
    if bare := next((row for row in rows if not row.chosen or not row.rejected), None):
        raise UserError("no `chosen` and `rejected`", where=bare.where, fix="write both, or answer the pair first")
    if options.output.exists():
        raise UserError("is there already", where=str(options.output), fix="choose another --output")
    with console.progress(len(rows), "reading pairs") as progress:
        found = calibrate(load_policy(options), rows, config.seed, progress.update, console.warn)
    found.save(options.output)
    weights = found.reward()["weights"]
    console.table(
        f"{found.pairs} pairs", ["signal", "weight"], [[name, float(value)] for name, value in weights.items()]
    )
    console.note(f"{found.verdict} Use it with --reward calibrated:{options.output}")
    console.result(
        {"pairs": found.pairs, "verdict": found.verdict, "output": options.output, "weights": weights}
        | {name: figure.to_json() for name, figure in found.figures.items()}
    )
    return 0


def _suggest(options: argparse.Namespace, console: Console) -> int:
    from adhere.config import flags_given, load_config
    from adhere.data import read_rows, write_jsonl
    from adhere.measure.suggest import SuggestConfig, suggest
    from adhere.reward.reward import Reward

    config = load_config(SuggestConfig, None, flags_given(options, SuggestConfig))
    spec = reward_config(options.reward)
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)
    policy = load_policy(options)
    with console.progress(len(rows), "sampling") as progress:
        asked = suggest(policy, Reward(spec, policy, reference=policy), rows, config, progress.update)
    write_jsonl(options.output, asked)
    answering = f"adhere calibrate --answer {options.output} --output pairs.jsonl"
    console.note(f"{len(asked)} pairs in {options.output}; answer them: {answering}")
    console.result({"pairs": len(asked), "output": options.output})
    return 0


def _answer(options: argparse.Namespace, console: Console) -> int:
    from adhere.report.answer import Session, serve

    session = Session.open(options.answer, options.output)
    with serve(session, options.port) as server:
        console.note(f"{session.left} of {len(session.asked)} pairs to answer at {server.url} (Ctrl-C ends)")
        server.wait()
    console.note(f"{session.done} answers in {options.output}")
    console.result({"answers": session.done, "left": session.left, "output": options.output})
    return 0


CALIBRATE = Command(
    "the hybrid: a few labelled pairs adjust the weights of the reward; suggests which to ask for, and asks",
    "--pairs FILE|--suggest N|--answer FILE --output FILE ",
    _arguments,
    _run,
)
