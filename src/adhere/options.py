"""What a tree of dataclasses says of itself as options: places, flags, types in words, bounds, help from the source.

The schema behind `config`, which reads values into it. Knows no option either. A bound is declared once, with the type
(`steps: Annotated[int, AtLeast(1)] = 100`): the reader checks what a user wrote, `check` what is made in Python.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from adhere.errors import UserError, unknown_name


@dataclass(frozen=True)
class AtLeast:
    """`value >= limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return value >= self.limit

    def __str__(self) -> str:
        return f"to {self.limit:g} or above"


@dataclass(frozen=True)
class Above:
    """`value > limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return value > self.limit

    def __str__(self) -> str:
        return f"above {self.limit:g}"


@dataclass(frozen=True)
class AtMost:
    """`value <= limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return value <= self.limit

    def __str__(self) -> str:
        return f"at most {self.limit:,}"


@dataclass(frozen=True)
class Below:
    """`value < limit`."""

    limit: float

    def holds(self, value: float) -> bool:
        return value < self.limit

    def __str__(self) -> str:
        return f"below {self.limit:g}"


Bound = AtLeast | Above | AtMost | Below
"""One end of the range of a number. No number may be infinite or NaN, whatever its bounds."""
MANY = 1_000_000
"""How many of anything there may be: more, by a slip of the hand, would be allocated before anything fails."""
Count = Annotated[int, AtLeast(1), AtMost(MANY)]
"""A number of prompts, samples, steps, tokens, …"""
CountOrZero = Annotated[int, AtLeast(0), AtMost(MANY)]
"""The same, where 0 stands for none of them."""

MOST_SEED = 2**32 - 1
"""What every library that draws takes, NumPy included."""
Seed = Annotated[int, AtLeast(0), AtMost(MOST_SEED)]


def check(config: Any, *others: UserError) -> None:
    """For `__post_init__`: every field of the dataclass lies within its bounds and is one of its literals.

    Raises `UserError` that tells all faults, together with `others` that the caller has found by itself.
    """
    cls: type = type(config)
    faults = [fault for name, _, _ in fields_of(cls) for fault in faults_of(cls, name, getattr(config, name))]
    faults += others
    if faults:
        raise faults[0] if len(faults) == 1 else UserError("; ".join(map(str, faults)))


def faults_of(cls: type, name: str, value: Any, where: str | None = None) -> list[UserError]:
    """What is wrong with `value` as the field `name` of the dataclass `cls`; None is left to the type."""
    bounds, choices = _declared(cls).get(name, ((), ()))
    if value is None:
        return []
    if choices and value not in choices:
        return [unknown_name(f"`{name}`", str(value), map(str, choices), where=where)]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and all(bound.holds(value) for bound in bounds):
        return []
    wanted = [str(bound) for bound in bounds] or ["to a finite number"]
    if isinstance(value, float) and bounds and not any(isinstance(bound, AtMost | Below) for bound in bounds):
        wanted.append("finite")
    return [UserError(f"{name} is {value}", where=where, fix=f"set it {', '.join(wanted)}")]


@cache
def _declared(cls: type) -> dict[str, tuple[tuple[Bound, ...], tuple[Any, ...]]]:
    """The bounds and the literals of each field that has some."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        bounds: list[Bound] = []
        choices: list[Any] = []
        members = members_of(hints[field.name])
        for member in members:
            if get_origin(member) is Annotated:
                bounds += [mark for mark in get_args(member)[1:] if isinstance(mark, Bound)]
            elif get_origin(member) is Literal:
                choices += get_args(member)
        if bounds or (choices and all(get_origin(member) is Literal or member is type(None) for member in members)):
            found[field.name] = tuple(bounds), tuple(choices)
    return found


@dataclass(frozen=True)
class Option:
    """One flag: a leaf of the dataclass tree, or the choice of a variant."""

    path: str
    """Where it stands in the YAML file, `sampling.top_p`."""
    flag: str
    """`--top-p`."""
    type: Any
    help: str
    default: Any
    """`MISSING` where a value must be given."""
    variants: tuple[str, ...] = ()
    """The variants of a union that have this option; empty where it is always there."""
    differing: tuple[tuple[str, Any], ...] = ()
    """(variant, default) where a variant's default is not `default`."""


def options(cls: type[Any]) -> tuple[Option, ...]:
    """Every option below `cls`. A flag is the field's own name; where two share it, or the dataclass is optional, the
    name of the parent goes before it (`--lora-rank`). Variants share the flag of a field that they share."""
    merged: dict[str, Option] = {}
    for option in _walk(cls, "", ()):
        first = merged.setdefault(option.path, option)
        if first is not option:
            # The help tells every default; the reader takes the chosen variant's own.
            other = tuple((name, option.default) for name in option.variants if option.default != first.default)
            variants, differing = first.variants + option.variants, first.differing + other
            merged[option.path] = dataclasses.replace(first, variants=variants, differing=differing)
    uses = Counter(option.flag for option in merged.values())
    found = []
    for option in merged.values():
        if uses[option.flag] > 1 and "." in option.path:
            option = dataclasses.replace(option, flag=_flag(*option.path.split(".")))
        found.append(option)
    twice = [flag for flag, count in Counter(option.flag for option in found).items() if count > 1]
    assert not twice, f"{cls.__name__}: two options share a flag: {twice}"
    return tuple(found)


def _walk(cls: Any, prefix: str, variants: tuple[str, ...]) -> list[Option]:
    found = []
    for name, kind, field in fields_of(cls):
        path, default, text = prefix + name, default_of(field), docs_of(cls).get(name, "")
        nested, optional = variants_of(kind), type(None) in members_of(kind)
        if len(nested) != 1 or optional:
            found.append(Option(path, _flag(name), kind, text, default, variants))
        for below in nested:
            inner = _walk(below, f"{path}.", (name_of(below),) if len(nested) > 1 else variants)
            if len(nested) == 1 and optional:
                inner = [dataclasses.replace(o, flag=_flag(name, o.flag.removeprefix("--"))) for o in inner]
            found += inner
    return found


def fields_of(cls: type[Any]) -> tuple[tuple[str, Any, dataclasses.Field[Any]], ...]:
    """(name, type, field) of every field that the constructor takes."""
    hints = get_type_hints(cls)
    return tuple((field.name, hints[field.name], field) for field in dataclasses.fields(cls) if field.init)


@cache
def docs_of(cls: type) -> dict[str, str]:
    """The string under each field, on one line."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        except (OSError, TypeError):  # a class without a source file, made at run time
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = ast.literal_eval(text.value) if isinstance(text.value, ast.Constant) else None
                if isinstance(value, str):
                    found[field.target.id] = " ".join(value.split())
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default, or `MISSING`."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def members_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def variants_of(kind: Any) -> list[type[Any]]:
    """The dataclasses of a union."""
    return [member for member in members_of(kind) if dataclasses.is_dataclass(member) and isinstance(member, type)]


def name_of(cls: type[Any]) -> str:
    """What a configuration calls this variant."""
    return str(getattr(cls, "name", cls.__name__.lower()))


def _flag(*parts: str) -> str:
    return "--" + "-".join(parts).replace("_", "-")


def metavar_of(kind: Any) -> str:
    """What stands for a value in `--help`; without spaces and brackets, on which argparse's usage line breaks."""
    words = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "BOOL"}
    if nested := variants_of(kind):
        return "{" + ",".join(map(name_of, nested)) + "}"
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) in (list, tuple):
        return metavar_of(get_args(kind)[0])
    members = [member for member in members_of(kind) if member is not type(None)]
    return "|".join(map(metavar_of, members)) if len(members) > 1 else words.get(members[0], "{KEY:VALUE}")


def described(kind: Any) -> str:
    """The type in words, for an error."""
    words = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
    if len(members := members_of(kind)) > 1:
        return " or ".join(map(described, members))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return f"a list of {len(get_args(kind))}: " + ", ".join(map(described, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"a list, each {described(get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind) or (get_origin(kind) or kind) in (dict, Mapping):
        return "a mapping"
    return "null" if kind is type(None) else words.get(kind, str(kind))
