"""YAML read strictly, each key with its `file:line`, and written so that it is read back equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adhere.errors import UserError


class _Strict(yaml.SafeLoader):
    """Safe YAML without aliases, which nest a short file into an endless one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.get_mark())
        return super().compose_node(parent, index)


class _Quoting(yaml.SafeDumper):
    """Safe YAML in which text with control characters or unusual line ends is quoted and escaped.

    Left to itself, PyYAML writes U+0085 in a style that is read back as a space.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        plain = all(character.isprintable() or character == "\n" for character in data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')


_Quoting.add_representer(str, _Quoting.represent_str)


def dumped(tree: Mapping[str, Any]) -> str:
    """The tree as YAML that is read back to an equal one."""
    return str(yaml.dump(tree, Dumper=_Quoting, sort_keys=False, allow_unicode=True, width=120))


def parsed(text: str, otherwise: Any) -> Any:
    """The value that a piece of YAML writes, `otherwise` where it is none."""
    try:
        return _Strict(text).get_single_data()
    except (yaml.YAMLError, ValueError):
        return otherwise


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree, and `file:line` of each key in it by its path (`sampling.top_p`).

    Raises `UserError`: no such file, no YAML, no mapping, a key that stands twice."""
    try:
        loader = _Strict(path.read_bytes().decode("utf-8-sig"))
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else None
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(reason, where=str(path), fix="check the path") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"not YAML ({error.problem})", where=f"{path}{line}", fix="mend the line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError("not YAML that can be read", where=str(path), fix="write `name: value`, in UTF-8") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"holds {kind_of(tree)}, not options", where=str(path), fix="write `name: value`, one a line")
    places: dict[str, str] = {}
    _locate(node, "", str(path), places)
    return tree, places


def _locate(node: yaml.Node | None, prefix: str, file: str, places: dict[str, str]) -> None:
    """Note where each key stands; one that stands twice is an error."""
    pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(number), value, value) for number, value in enumerate(node.value)]
    for key, mark, value in pairs:
        place, where = prefix + key, f"{file}:{mark.start_mark.line + 1}"
        if place in places:
            raise UserError(f"`{place}` stands twice (first at {places[place]})", where=where, fix="keep one")
        places[place] = where
        _locate(value, f"{place}.", file, places)


def kind_of(raw: Any) -> str:
    """A value, or the kind of it where it is long, for a message."""
    if raw is None or isinstance(raw, bool):
        return {None: "null", True: "true", False: "false"}[raw]
    if isinstance(raw, dict | list | tuple):
        return "a mapping" if isinstance(raw, dict) else "a list"
    return repr(raw) if len(repr(raw)) <= 60 else f"{repr(raw)[:59]}…"
