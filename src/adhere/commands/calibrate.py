"""`adhere calibrate`: fit the weights to labelled pairs, choose which to ask for next, and ask."""

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
    model_arguments,
    reward_argument,
    reward_config,
    row_arguments,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.data import read_rows, write_jsonl
from adhere.errors import UserError
from adhere.preferences.settings import SuggestConfig


def _arguments(parser: Parser) -> None:
    parser.required.title = "required: --output, and one of --pairs, --suggest and --answer"
    parser.required.add_argument(
        "--pairs", metavar="FILE", help=f"fit the weights to these: rows with prompt, chosen and rejected ({ROWS})"
    )
    parser.required.add_argument("--answer", metavar="FILE", help="ask on a local page: rows that --suggest wrote")
    parser.required.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="gets the weights (YAML), questions or answers"
    )
    model_arguments(parser, required=False)
    parser.common.add_argument("--prompts", metavar="FILE", help=f"with --suggest: rows with prompts ({ROWS})")
    heads_argument(parser)
    row_arguments(parser)
    reward_argument(parser, help="with --suggest: what the answers are to correct")
    parser.add_options(SuggestConfig, "suggest", "num_samples", "max_new_tokens", "seed")
    parser.advanced.add_argument(
        "--port", type=int, default=0, metavar="N", help="with --answer: port (default: any free one)"
    )


def _run(options: argparse.Namespace, console: Console) -> int:
    actions = {
        "--pairs": options.pairs is not None,
        "--suggest": "suggest" in flags_given(options, SuggestConfig),
        "--answer": options.answer is not None,
    }
    if sum(actions.values()) != 1:
        raise UserError("give one of --pairs, --suggest and --answer", fix="adhere calibrate --help tells them apart")
    if options.model is None and not actions["--answer"]:
        raise UserError("no --model", fix="give the folder or hub id of the model to calibrate")
    if actions["--suggest"] and options.prompts is None:
        raise UserError("--suggest needs --prompts", fix="give a file of prompts")
    check_models(options.model)
    return (_fit if actions["--pairs"] else _suggest if actions["--suggest"] else _answer)(options, console)


def _fit(options: argparse.Namespace, console: Console) -> int:
    check_new(options.output)
    config = load_config(SuggestConfig, None, flags_given(options, SuggestConfig))
    pairs = read_rows(options.pairs, columns_of(options), limit=options.limit)
    rows = [row for row in pairs if not row.fields.get("tie")]
    if bare := next((row for row in rows if not row.chosen or not row.rejected), None):
        raise UserError("no `chosen` and `rejected`", where=bare.where, fix="write both, or answer the pair first")

    from adhere.preferences.calibrate import calibrate

    policy = load_policy(options, console.track)
    found = calibrate(policy, rows, config.seed, given_heads(options), console.warn)
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
    check_new(options.output)
    config = load_config(SuggestConfig, None, flags_given(options, SuggestConfig))
    spec = reward_config(options.reward)
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit)

    from adhere.preferences.suggest import suggest
    from adhere.reward.reward import Reward

    policy = load_policy(options, console.track)
    pairs = suggest(policy, Reward(spec, policy, given_heads(options)), rows, config)
    write_jsonl(options.output, pairs)
    answering = f"adhere calibrate --answer {options.output} --output pairs.jsonl"
    console.note(f"{len(pairs)} pairs in {options.output}; answer them: {answering}")
    console.result({"pairs": len(pairs), "output": options.output})
    return 0


def _answer(options: argparse.Namespace, console: Console) -> int:
    from adhere.preferences.answer import Session, serve

    session = Session.open(options.answer, options.output)
    with serve(session, options.port) as server:
        console.note(f"{session.left} of {len(session.pairs)} pairs to answer at {server.url} (Ctrl-C ends)")
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
