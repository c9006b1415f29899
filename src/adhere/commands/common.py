"""What the commands share: their form, the options of a model, rewards as written on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from adhere.config import add_arguments, flags_given, load_config
from adhere.console import Console
from adhere.model.settings import ChatOptions

if TYPE_CHECKING:
    from adhere.data import Columns
    from adhere.model.policy import Policy
    from adhere.reward.named import RewardConfig

Parser = argparse.ArgumentParser


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
    parser.add_argument("--model", required=required, help="model folder or hub id, causal or encoder–decoder")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default: auto)")
    parser.add_argument(
        "--attention", default="auto", choices=("auto", "eager"), help="eager serves families that auto refuses"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_arguments(parser, ChatOptions)


def row_arguments(parser: Parser) -> None:
    """The options that say which fields of a row are its prompt and its answers."""
    from adhere.data import Columns

    add_arguments(parser, Columns)


def columns_of(options: argparse.Namespace) -> Columns:
    """What `row_arguments` were given."""
    from adhere.data import Columns

    return load_config(Columns, None, flags_given(options, Columns))


def load_policy(options: argparse.Namespace, model: str | None = None) -> Policy:
    """The policy that `model_arguments` describe; `model` in its place, loaded alike."""
    from adhere.model.policy import Policy

    return Policy.load(
        model or options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
        **asdict(load_config(ChatOptions, None, flags_given(options, ChatOptions))),
    )


def reward_config(given: str) -> RewardConfig:
    """A reward's name, a `module:function`, or a YAML file that holds a reward (alone, or under `reward:`)."""
    from adhere.config import read_mapping
    from adhere.reward.named import CALIBRATED, config_of

    written = given.endswith((".yaml", ".yml")) and not given.startswith(CALIBRATED)
    return config_of(read_mapping(given, "reward") if written else given)


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
