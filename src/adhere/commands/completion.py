"""Shell completion: a script that knows every command and its options."""

from __future__ import annotations

import argparse

import shtab

from adhere.commands import COMMANDS
from adhere.commands.parser import Parser

SHELLS = ("bash", "zsh")
"""Shells that `completion` writes a script for."""
_PLACES = {"FILE": shtab.FILE, "PATH": shtab.FILE, "FOLDER": shtab.DIRECTORY}


def completion(shell: str) -> str:
    """The script for `shell`, one of `SHELLS`."""
    top = argparse.ArgumentParser(prog="adhere")
    commands = top.add_subparsers(parser_class=Parser)
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help))
    _complete_places(top)
    return shtab.complete(top, shell)


def _complete_places(parser: argparse.ArgumentParser) -> None:
    """Have values that are files or folders completed as such, here and in the parsers below."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                _complete_places(below)
        elif action.metavar in _PLACES:
            vars(action)["complete"] = _PLACES[str(action.metavar)]
