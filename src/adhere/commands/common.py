"""What the commands share: their form, the options of a model and of rows, rewards as written on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adhere.commands.parser import Parser, positive
from adhere.config import flags_given, load_config, read_mapping
from adhere.console import Console
from adhere.data import Columns, Row
from adhere.errors import UserError
from adhere.model.embedded import EMBEDDED, located
from adhere.model.settings import ChatOptions
from adhere.progress import Progress, phase, silent
from adhere.prompt import AnnotatedText
from adhere.resume import require_new
from adhere.reward.named import CALIBRATED, NAMED, RewardConfig, config_of

if TYPE_CHECKING:
    from adhere.model.policy import Policy
    from adhere.reward.heads import CopyHeads

ROWS = "JSON Lines, CSV, Parquet, a folder, a hub data set, or - for JSON Lines on standard input"
REWARD = "a reward's name, module:function, or a YAML file"


@dataclass(frozen=True)
class Command:
    """What a command is, what it takes and what it does (its exit code comes back)."""

    help: str
    needs: str
    """The options that it cannot do without, as the usage line shows them."""
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace, Console], int]


def model_arguments(parser: Parser, required: bool = True) -> None:
    """The options that say which model, and how it is loaded."""
    (parser.required if required else parser.common).add_argument(
        "--model", required=required, help=f"model folder, hub id, or {' or '.join(EMBEDDED)}, which come with adhere"
    )
    parser.common.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default: auto)")
    parser.advanced.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.advanced.add_argument(
        "--attention", default="auto", choices=("auto", "eager"), help="eager serves families that auto refuses"
    )
    parser.advanced.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_options(ChatOptions)


def row_arguments(parser: Parser, limit: int | None = None) -> None:
    """The options that say which rows are read, and which of their fields are prompt and answers."""
    default = "" if limit is None else f" (default: {limit})"
    parser.common.add_argument(
        "--limit", type=positive, default=limit, metavar="N", help=f"read the first N rows only{default}"
    )
    parser.add_options(Columns)


def reward_argument(parser: Parser, default: str | None = "attention", help: str = REWARD) -> None:
    """`--reward`, with the names that there are below the options."""
    told = "" if default is None else f" (default: {default})"
    parser.common.add_argument("--reward", default=default, metavar="NAME", help=help + told)
    list_rewards(parser)


def list_rewards(parser: Parser) -> None:
    """The names of the rewards, below the options."""
    parser.epilog = (
        f"rewards:\n  {', '.join(NAMED)}\n"
        "  preference:FOLDER (of adhere preferences fit), calibrated:FILE (of adhere calibrate),\n"
        "  module:function of your own, FILE.yaml with weights over signals"
    )


def columns_of(options: argparse.Namespace) -> Columns:
    """What `row_arguments` were given."""
    return load_config(Columns, None, flags_given(options, Columns))


def check_models(*models: str | None) -> None:
    """Raise `UserError` for a path where there is no model folder, before anything is loaded."""
    for model in models:
        if model is not None:
            located(model)


def check_new(path: Path) -> None:
    """Raise `UserError` for a file to write that is there already; a device or pipe may be."""
    if path.is_dir():
        raise UserError("is a folder, and a file is to be written", where=str(path), fix="give a file name")
    if path.is_file():
        require_new(path)


def check_new_folder(path: Path, mark: str = "*", what: str = "files") -> None:
    """Raise `UserError` for a folder to write that already holds `what`, told by a file called `mark` in it."""
    if path.is_file():
        raise UserError("is a file, and a folder is to be written", where=str(path), fix="choose another --output")
    if path.is_dir() and any(path.glob(mark)):
        raise UserError(f"already holds {what}", where=str(path), fix="choose another --output")


def load_policy(options: argparse.Namespace, progress: Progress = silent, model: str | None = None) -> Policy:
    """The policy that `model_arguments` describe; `model` in its place, loaded alike. `progress` shows what it does."""
    with phase(progress, "loading torch"):  # seconds, where it was not needed before
        from adhere.model.policy import Policy

    return Policy.load(
        model or options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
        **asdict(load_config(ChatOptions, None, flags_given(options, ChatOptions))),
    )


def tell_prompting(console: Console, policy: Policy, rows: Sequence[Row]) -> None:
    """Say once how prompts are put to the model, and where a rule has to tell evidence from question."""
    if policy.takes_chat and any(isinstance(row.prompt, str) for row in rows):
        end = policy.tokenizer.decode([policy.endings.turn])
        console.note(
            f"Plain prompts are put into the model's chat template, whose turns end with {end}; not so: --chat off"
        )
    guessed = sum(not _told(row) for row in rows)
    if guessed:
        console.note(
            f"{guessed} of {len(rows)} prompts do not say what is evidence and what is asked: the last sentence counts "
            "as the question. Rows with `context` and `question` say so"
        )


def _told(row: Row) -> bool:
    """Whether the parts of a prompt say what they are for."""
    last = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    return isinstance(last, AnnotatedText)


def heads_argument(parser: Parser) -> None:
    """The option that says which copy heads to read."""
    parser.advanced.add_argument(
        "--heads", metavar="FILE", help="copy heads that `adhere heads` or a run has saved (default: the model's own)"
    )


def given_heads(options: argparse.Namespace) -> CopyHeads | None:
    """What `heads_argument` was given."""
    from adhere.reward.heads import load_heads

    return load_heads(options.heads) if options.heads else None


def heads_to_show(options: argparse.Namespace, policy: Policy, console: Console) -> CopyHeads | None:
    """The copy heads that a page shows: given, or the model's own; None, with a warning, where it has none."""
    from adhere.reward.heads import copy_heads

    heads = given_heads(options)
    if heads is not None:
        return heads
    try:
        return copy_heads(policy)
    except UserError as error:
        console.warn(f"only the mean of all heads is shown: {error}")
        return None


def reward_written(given: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """What a YAML file holds (a reward alone, or under `reward:`) in place of its path; all else as it is."""
    file = isinstance(given, str) and given.endswith((".yaml", ".yml")) and not given.startswith(CALIBRATED)
    written: str | Mapping[str, Any] = read_mapping(str(given), "reward") if file else given
    return written


def reward_config(given: str) -> RewardConfig:
    """A reward's name, a `module:function`, or a YAML file."""
    return config_of(reward_written(given))


def reward_name(spec: str | Mapping[str, Any]) -> str:
    """A reward in a word: its name, or the signals it weighs."""
    return spec if isinstance(spec, str) else " + ".join(spec.get("weights", {}))


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures that the progress line has room for."""
    names = {"reward": "reward", "kl": "kl", "completions/mean_length": "length", "tokens_per_second": "tokens_per_s"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def mean(values: Sequence[float]) -> float:
    """The average of one value or more."""
    return sum(values) / len(values)
