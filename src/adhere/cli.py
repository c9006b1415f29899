"""The command line: finds the command, parses its options, runs it, and turns what went wrong into one clear line.

Exit codes: 0 done, 1 failed while running, 2 bad input or usage, 3 gameable reward, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adhere import __version__
from adhere.commands import COMMANDS
from adhere.commands.common import Parser
from adhere.commands.train import INTERRUPTED
from adhere.console import Console, quieten_libraries
from adhere.errors import UserError, unknown_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `adhere` with `arguments` (default: the process's own); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in given if not word.startswith("-")), None)
    if name is None or given[0] != name:
        return _top(given)
    if name not in COMMANDS:
        Console().error(str(unknown_name("command", name, COMMANDS)))
        return 2
    command = COMMANDS[name]
    parser = Parser(
        prog=f"adhere {name}",
        usage=f"adhere {name} {command.needs}[options]",
        description=command.help,
        formatter_class=_Formatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    command.arguments(parser)
    try:
        options = parser.parse_args(given[1:])
    except SystemExit as ended:  # --help, or usage that argparse has explained
        return int(ended.code or 0)
    console = Console(options.json, options.quiet)
    try:
        with console.strays_aside():
            quieten_libraries()
            return command.run(options, console)
    except UserError as error:
        console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED


def _top(given: Sequence[str]) -> int:
    """`adhere --help`, `adhere --version`, or no command at all."""
    lines = "\n".join(f"  {name:<8} {command.help}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="adhere",
        description="Post-train language models from their own attention to the prompt.",
        epilog=f"commands:\n{lines}\n\n`adhere COMMAND --help` says more.",
        usage="adhere COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"adhere {__version__}")
    try:
        parser.parse_args(given)
    except SystemExit as ended:  # what was asked for has been printed
        return int(ended.code or 0)
    parser.print_help()
    return 2


class _Formatter(argparse.HelpFormatter):
    """Room for the flags: the longest would push its help to the next line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


if __name__ == "__main__":
    sys.exit(main())
