"""The command line: finds the command, parses its options, runs it, and turns what went wrong into one clear line.

Exit codes: 0 done, 1 failed while running, 2 bad input or usage, 3 gameable reward, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from adhere import __version__
from adhere.commands import COMMANDS
from adhere.commands.completion import SHELLS, completion
from adhere.commands.parser import Parser
from adhere.commands.train import INTERRUPTED
from adhere.console import Console, hear_libraries, quieten_libraries
from adhere.errors import UserError, unknown_name
from adhere.locking import writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `adhere` with `arguments` (default: the process's own); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    try:
        name = next((word for word in given if not word.startswith("-")), None)
        if name is None or given[0] != name:
            return _top(given, console)
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        command = COMMANDS[name]
        parser = Parser(
            prog=f"adhere {name}", usage=f"adhere {name} {command.needs}[options]", description=command.help
        )
        command.arguments(parser)
        options = parser.parse_args(given[1:])
        options.command_line = shlex.join(["adhere", *given])
        console = Console("json" in options, "quiet" in options, "verbose" in options)
        with console.strays_aside(), console.logs(), writing(getattr(options, "output", None)):
            (hear_libraries if console.verbose else quieten_libraries)()
            return command.run(options, console)
    except SystemExit as ended:  # --help has been printed
        return int(ended.code or 0)
    except UserError as error:
        console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED


def _top(given: Sequence[str], console: Console) -> int:
    """`adhere --help`, `--version`, `--print-completion`, or no command at all."""
    lines = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="adhere",
        description="Post-train language models from their own attention to the prompt.",
        epilog=f"commands:\n{lines}\n\n`adhere COMMAND --help` says more.",
        usage="adhere COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"adhere {__version__}")
    parser.add_argument(
        "--print-completion", choices=SHELLS, help="print a script that completes commands and options in this shell"
    )
    options = parser.parse_args(given)
    if options.print_completion:
        console.write(completion(options.print_completion))
        return 0
    parser.print_help()
    return 2
