"""How a command line is read: flags in three groups, a mistyped one answered with the nearest, faults as one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any

from adhere.config import add_arguments
from adhere.errors import UserError
from adhere.options import MANY, MOST_SEED, Option

_FLAG = re.compile(r"--?[a-z][^\s=]*", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """A parser of one command: flags in the groups `required`, `common` and `advanced`, and those of every command.

    It raises `UserError` where argparse would exit."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(**kwargs, add_help=False)
        self.required = self.add_argument_group("required")
        self.common = self.add_argument_group("common options")
        self.advanced = self.add_argument_group("advanced options")
        every = self.add_argument_group("options of every command")
        # Nothing is set that is not given, so that a subcommand's parser keeps what was given before its name.
        switch: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        every.add_argument("--json", **switch, help="print one JSON document and nothing else")
        every.add_argument("--quiet", **switch, help="no progress and no notes")
        every.add_argument("--verbose", **switch, help="show what libraries log, and the traceback of an error")
        every.add_argument("-h", "--help", action="help", help="show this message")

    def add_options(self, cls: type[Any], *common: str) -> None:
        """A flag for every option of the dataclass `cls`; `common` are the paths of those that most people set."""

        def group(option: Option) -> argparse._ActionsContainer:
            if option.default is MISSING:
                return self.required
            return self.common if option.path in common else self.advanced

        add_arguments(group, cls)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an unknown flag is told first: what it was to be may be the one that is missing."""
        if self._subparsers is None:
            self._check_flags(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Any:
        """What argparse found, in place of its exit."""
        raise UserError(message, fix=f"see `{self.prog} --help`")

    def _check_flags(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            flag = _FLAG.match(word)
            if flag and " " not in word and not any(name.startswith(flag[0]) for name in known):
                near = difflib.get_close_matches(flag[0], known, n=1)
                fix = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
                raise UserError(f"unknown option {flag[0]}", fix=fix)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for the flags: the longest would push its help to the next line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is too small; set it to {low} or above")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{value} is too large; set it to {high:,} or less")
        return value

    return read


count = whole(1, MANY)
"""How many of anything that takes room."""
positive = whole(1)
"""How many of what takes none, however many there are."""
seed = whole(0, MOST_SEED)
