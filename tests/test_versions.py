"""The oldest versions: what pyproject.toml promises is what `make oldest` installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TOOLS = {"test", "dev"}
"""Extras that serve development alone."""
APART = {"trackers"}
"""Extras whose own requirements allow none of the oldest versions."""


def lower_bounds() -> dict[str, Version]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {name: each for name, each in project["optional-dependencies"].items() if name not in TOOLS | APART}
    found = {}
    for requirement in map(Requirement, [*project["dependencies"], *(one for each in extras.values() for one in each)]):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} is not a lower bound alone"
        found[canonicalize_name(requirement.name)] = Version(bound.version)
    return found


def oldest() -> dict[str, Version]:
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_lower_bounds_are_the_oldest_versions_that_the_tests_run_with() -> None:
    bounds, pins = lower_bounds(), oldest()
    assert bounds == {name: pins.get(name) for name in bounds}
