"""YAML and command-line flags into any tree of frozen dataclasses, strictly; and back. Knows no option itself.

A dataclass field is an option, the string under it its help. Where a field is a union of dataclasses, the configuration
picks one by its name (`algorithm: {name: ppo, gae_lambda: 0.95}`, `--algorithm ppo --gae-lambda 0.95`); the name is the
class's `name`, or else its own in lower case. All faults of a configuration are reported together.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from adhere.errors import UserError, unknown_name
from adhere.options import (
    Option,
    default_of,
    described,
    faults_of,
    fields_of,
    members_of,
    metavar_of,
    name_of,
    options,
    variants_of,
)
from adhere.yaml_files import dumped, kind_of, parsed, read_yaml

T = TypeVar("T")

SHOWN = 20
"""Faults that are told one by one; the rest are counted."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.?inf", re.IGNORECASE)
_INTEGER = re.compile(r"[-+]?\d+(_\d+)*")
_TEXT_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def load_config(cls: type[T], path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> T:
    """Build a `cls` from its defaults, a YAML file, and `overrides`, the later going before the earlier.

    `overrides` maps an option's place (`steps`, `sampling.top_p`) to its value; text is read as on the command line.
    Naming another variant than the file does starts from that variant's defaults.

    Raises `UserError`: every unknown key, missing value, value of a wrong type or out of its bounds, and whatever
    `__post_init__` of a dataclass raises, in one message.
    """
    tree, places = read_yaml(Path(path)) if path is not None else ({}, {})
    reader = _Reader(cls, places)
    for place, value in sorted((overrides or {}).items(), key=lambda item: item[0].count(".")):
        reader.override(tree, place, value)
    built = reader.dataclass(cls, tree, "", None)
    if len(reader.faults) == 1:
        raise reader.faults[0]
    if reader.faults:
        lines = [str(fault) for fault in reader.faults[:SHOWN]]
        more = len(reader.faults) - len(lines)
        raise UserError("\n".join(lines + ([f"… and {more} more"] if more else [])))
    assert isinstance(built, cls)
    return built


def read_mapping(path: str | Path, key: str | None = None) -> Any:
    """What stands under `key` in a YAML file, or all of the file without a key or where it has no such key.

    Raises `UserError`: no such file, no YAML, no mapping.
    """
    tree, _ = read_yaml(Path(path))
    return tree if key is None else tree.get(key, tree)


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain values, every default resolved, in the form that `load_config` reads."""
    found: dict[str, Any] = {}
    for name, kind, _ in fields_of(type(config)):
        value = getattr(config, name)
        found[name] = _plain(value)
        if dataclasses.is_dataclass(value) and len(variants_of(kind)) > 1:
            found[name] = {"name": name_of(type(value)), **found[name]}
    return found


def dump_yaml(config: Any) -> str:
    """The tree as YAML that `load_config` reads back to an equal one."""
    return dumped(to_dict(config))


def add_arguments(group: Callable[[Option], argparse._ActionsContainer], cls: type[Any]) -> None:
    """Add a flag for every option of `cls` to the parser, or the group of one, that `group` names for it; `flags_given`
    reads back the ones that were used."""
    for option in options(cls):
        text = option.help or option.path
        if option.variants:
            text += f" (with {', '.join(option.variants)})"
        if option.default not in (MISSING, None, "", (), [], {}):
            others = "".join(f"; {name}: {_shown(default)}" for name, default in option.differing)
            text += f" (default: {_shown(option.default)}{others})"
        kwargs: dict[str, Any] = {"dest": option.path, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        members = members_of(option.type)
        if bool in members or (len(variants_of(option.type)) == 1 and type(None) in members):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif any(get_origin(kind) in (tuple, list) for kind in members):
            kwargs |= {"nargs": "*", "metavar": metavar_of(option.type)}
        else:
            kwargs["metavar"] = metavar_of(option.type)
        group(option).add_argument(option.flag, **kwargs)


def flags_given(arguments: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The options of `cls` that were given as flags, as `overrides` for `load_config`."""
    given = vars(arguments)
    return {option.path: given[option.path] for option in options(cls) if option.path in given}


class _Reader:
    """One reading of a configuration: what is built, and every fault on the way."""

    def __init__(self, cls: type[Any], places: dict[str, str]) -> None:
        self.options = {option.path: option for option in options(cls)}
        self.places = places
        self.texts: set[str] = set()
        """Paths whose text came from the command line, so that numbers in it are numbers."""
        self.faults: list[UserError] = []

    def fault(self, path: str, what: str, fix: str | None = None) -> None:
        self.faults.append(UserError(what, where=self.places.get(path), fix=fix))

    def override(self, tree: dict[str, Any], path: str, value: Any) -> None:
        """Put the value of a flag into the tree that was read from YAML."""
        if path not in self.options and not any(place.startswith(f"{path}.") for place in self.options):
            self.faults.append(unknown_name("option", path, self.options))
            return
        option = self.options.get(path)
        nested = variants_of(option.type) if option else []
        flag = option.flag if option else path
        *parents, leaf = path.split(".")
        for depth, parent in enumerate(parents, 1):
            above, below = ".".join(parents[:depth]), tree.get(parent)
            if above in self.texts and below in (None, False):
                return self.fault(above, f"contradicts {flag}", "leave one of them out")
            if isinstance(below, str):
                below = {"name": below}
            elif below is None or isinstance(below, bool):
                below = {}
            elif not isinstance(below, dict):
                return None  # not a mapping, as `dataclass` will say
            tree[parent] = tree = below
        before = tree.get(leaf)
        if isinstance(before, dict):
            if nested and value is True:
                value = before
            elif isinstance(value, Mapping) and value.get("name", before.get("name")) == before.get("name"):
                value = {**before, **value}
            elif nested and isinstance(value, str) and before.get("name", value) == value:
                value = {**before, "name": value}
        tree[leaf] = value
        self.places = {k: v for k, v in self.places.items() if k != path and not k.startswith(f"{path}.name")}
        self.places[path] = f"--no-{flag.removeprefix('--')}" if value is False else flag
        self.texts.add(path)

    def dataclass(self, cls: type[Any], raw: Any, path: str, base: Any) -> Any:
        """A `cls` from a mapping; what is not in it comes from `base`, or else from the class's own defaults."""
        before = len(self.faults)
        if not isinstance(raw, dict):
            return self.fault(
                path,
                f"`{path}` is {kind_of(raw)}",
                f"write its options as a mapping: {', '.join(name for name, _, _ in fields_of(cls))}",
            )
        prefix = f"{path}." if path else ""
        known = {name: (kind, field) for name, kind, field in fields_of(cls)}
        for key in raw:
            if key not in known:
                self.unknown(cls, str(key), prefix)
        values = {}
        for name, (kind, field) in known.items():
            start = getattr(base, name) if base is not None else default_of(field)
            if name in raw:
                faulty = len(self.faults)
                values[name] = self.value(kind, raw[name], prefix + name, start)
                if len(self.faults) == faulty:
                    self.faults += faults_of(cls, name, values[name], self.places.get(prefix + name))
            elif start is MISSING and len(variants_of(kind)) == len(members_of(kind)) == 1:
                values[name] = self.value(kind, {}, prefix + name)
            elif start is MISSING:
                option = self.options[prefix + name]
                self.fault(
                    "", f"no `{option.path}`", f"give {option.flag}, or `{option.path}` in the configuration file"
                )
            else:
                values[name] = start
        if len(self.faults) > before:
            return None
        try:
            return cls(**values)
        except UserError as error:
            self.faults.append(error)
            return None

    def unknown(self, cls: type[Any], key: str, prefix: str) -> None:
        place = prefix + key
        where, option = self.places.get(place), self.options.get(place)
        if option is not None and option.variants:
            has = " and ".join(option.variants)
            what = f"`{key}` is an option of {has}, not of {name_of(cls)}"
            self.faults.append(UserError(what, where=where, fix=f"leave it out or choose {has}"))
        else:
            known = [prefix + name for name, _, _ in fields_of(cls)]
            known += [path for path in self.options if path.rpartition(".")[2] == key]
            self.faults.append(unknown_name("option", place, known, where=where))

    def value(self, kind: Any, raw: Any, path: str, start: Any = MISSING) -> Any:
        """`raw` as a value of the type `kind`; `start` is what the option would be by default."""
        members, nested, text = members_of(kind), variants_of(kind), path in self.texts
        found = None if nested and raw is False and type(None) in members else _convert(kind, raw, text)
        if found is not MISSING:
            return found
        if nested and (isinstance(raw, dict | bool) or len(nested) == len(members) - members.count(type(None))):
            return self.variant(nested, {} if raw is True else raw, path, start)
        if isinstance(raw, str) and all(get_origin(member) is Literal for member in members):
            known = [str(value) for member in members for value in get_args(member)]
            self.faults.append(unknown_name(f"`{path}`", raw, known, where=self.places.get(path)))
            return None
        quote = "put it in quotes: YAML reads yes, no, on and off as true or false" if isinstance(raw, bool) else None
        return self.fault(path, f"`{path}` must be {described(kind)}, not {kind_of(raw)}", quote)

    def variant(self, nested: list[type[Any]], raw: Any, path: str, start: Any) -> Any:
        """The dataclass among `nested` that `raw` names, or the default one where it names none."""
        if len(nested) == 1:
            return self.dataclass(nested[0], raw, path, start if isinstance(start, nested[0]) else None)
        by_name = {name_of(cls): cls for cls in nested}
        raw = {"name": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, dict):
            return self.fault(path, f"`{path}` is {kind_of(raw)}", f"write {{name: {' | '.join(by_name)}, …}}")
        name = raw.get("name", name_of(type(start)) if type(start) in nested else None)
        if name is None:
            return self.fault(path, f"`{path}` has no name", f"write {{name: {' | '.join(by_name)}, …}}")
        if not isinstance(name, str) or name not in by_name:
            where = self.places.get(f"{path}.name", self.places.get(path))
            self.faults.append(unknown_name(path, str(name), by_name, where=where))
            return None
        cls = by_name[name]
        given = {key: value for key, value in raw.items() if key != "name"}
        return self.dataclass(cls, given, path, start if isinstance(start, cls) else None)


def _convert(kind: Any, raw: Any, text: bool) -> Any:
    """`raw` as a `kind` that is no dataclass, or `MISSING` where it is not one; `text`: it comes from a flag."""
    convert = _CONVERT.get(get_origin(kind) or kind)
    return MISSING if convert is None else convert(kind, raw, text)


def _union(kind: Any, raw: Any, text: bool) -> Any:
    # Text from YAML is text before anything else; from a flag, it is text when it can be nothing else.
    members = sorted(get_args(kind), key=lambda member: (member is str) == text)
    found = (_convert(member, raw, text) for member in members)
    return next((value for value in found if value is not MISSING), MISSING)


def _null(_kind: Any, raw: Any, text: bool) -> Any:
    return None if raw is None or (text and str(raw).lower() in ("none", "null")) else MISSING


def _bool(_kind: Any, raw: Any, text: bool) -> Any:
    return _TEXT_BOOLS.get(raw.lower(), MISSING) if text and isinstance(raw, str) else _instance(bool, raw, text)


def _instance(kind: Any, raw: Any, _text: bool) -> Any:
    return raw if isinstance(raw, kind) else MISSING


def _number(kind: type[int] | type[float], raw: Any, text: bool) -> Any:
    """Text is a whole number on the command line only."""
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return MISSING
    pattern = _INTEGER if kind is int else _NUMBER
    # YAML 1.1 reads 1e-5, which has no point, as text: so a number may be text in a file too.
    if isinstance(raw, str) and not (pattern.fullmatch(raw) and (text or kind is float)):
        return MISSING
    if (kind is int and isinstance(raw, float)) or raw != raw:
        return MISSING
    try:
        return kind(raw.lower().replace(".inf", "inf") if isinstance(raw, str) else raw)
    except (ValueError, OverflowError):  # 1__0, or more digits than Python reads
        return MISSING


def _path(_kind: Any, raw: Any, _text: bool) -> Any:
    return Path(raw) if isinstance(raw, str | Path) and str(raw) else MISSING


def _literal(kind: Any, raw: Any, text: bool) -> Any:
    known = get_args(kind)
    return next((v for v in known if (type(v) is type(raw) and v == raw) or (text and str(v) == raw)), MISSING)


def _mapping(kind: Any, raw: Any, text: bool) -> Any:
    if text and isinstance(raw, str) and raw.lstrip().startswith("{"):
        raw, text = parsed(raw, MISSING), False
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        return MISSING
    inner = (get_args(kind) or (str, Any))[1]
    items = {key: _convert(inner, value, text) for key, value in raw.items()}
    return MISSING if any(item is MISSING for item in items.values()) else items


def _sequence(kind: Any, raw: Any, text: bool) -> Any:
    origin, kinds = get_origin(kind), get_args(kind)
    if not isinstance(raw, list | tuple):
        return MISSING
    if origin is list or Ellipsis in kinds:
        kinds = kinds[:1] * len(raw)
    if len(kinds) != len(raw):
        return MISSING
    items = [_convert(inner, item, text) for inner, item in zip(kinds, raw, strict=True)]
    return MISSING if any(item is MISSING for item in items) else origin(items)


_CONVERT: dict[Any, Callable[[Any, Any, bool], Any]] = {
    Union: _union,
    UnionType: _union,
    NoneType: _null,
    Any: lambda _kind, raw, _text: raw,
    str: _instance,
    bool: _bool,
    int: _number,
    float: _number,
    Path: _path,
    Literal: _literal,
    dict: _mapping,
    Mapping: _mapping,
    list: _sequence,
    tuple: _sequence,
}
"""Type, or what it is made of (`list` of `list[str]`) → what reads a value of it."""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(default: Any) -> str:
    return name_of(type(default)) if dataclasses.is_dataclass(default) else str(_plain(default))
