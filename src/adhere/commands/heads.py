"""`adhere heads`: which attention heads of a model copy from the prompt."""

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
)
from adhere.commands.parser import Parser
from adhere.console import Console
from adhere.data import read_rows

SHOWN = 10
"""Heads in the table."""


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    parser.common.add_argument(
        "--prompts",
        metavar="FILE",
        help=f"measure on the model's own answers to these rows, not on built-in texts ({ROWS})",
    )
    row_arguments(parser, limit=64)
    parser.common.add_argument("--output", type=Path, metavar="FILE", help="save the heads here, for --heads")


def _heads(options: argparse.Namespace, console: Console) -> int:
    if options.output is not None:
        check_new(options.output)
    check_models(options.model)
    rows = read_rows(options.prompts, columns_of(options), limit=options.limit) if options.prompts else []

    from adhere.reward.heads import copy_heads, measure_on_answers, save_heads

    policy = load_policy(options, console.track)
    if rows:
        prompts = policy.encode([row.prompt for row in rows], names=[row.where for row in rows])
        found = measure_on_answers(policy, prompts)
    else:
        found = copy_heads(policy)
    if options.output is not None:
        save_heads(options.output, found)
    layers, heads = found.scores.shape
    how = "repeated passages" if found.method == "copying" else f"answers to {len(rows)} prompts"
    top = found.top(SHOWN)
    console.table(
        f"Copy heads of {options.model}: {layers} layers of {heads}, measured on {how}",
        ["head", "score", "weight"],
        [[f"{layer}.{head}", score, float(found.weights[layer, head])] for layer, head, score in top],
    )
    console.note(
        f"{found.tokens} tokens, {found.logprob:.2f} nats each; median head {float(found.scores.median()):.3f}"
    )
    if options.output is not None:
        console.note(f"saved to {options.output}: use it with --heads")
    console.result(
        {
            "model": found.model,
            "method": found.method,
            "tokens": found.tokens,
            "logprob": found.logprob,
            "top": [{"head": f"{layer}.{head}", "score": score} for layer, head, score in top],
            "scores": found.scores,
            "output": options.output,
        }
    )
    return 0


HEADS = Command("which attention heads copy from the prompt", "--model MODEL ", _arguments, _heads)
