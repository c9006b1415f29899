"""The architecture as a test: imports go one way, the core is pure, files stay short, weights are never unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import adhere

SRC = Path(adhere.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

LAYERS = [
    {
        "types",
        "errors",
        "text",
        "progress",
        "files",
        "locking",
        "resume",
        "origin",
        "options",
        "yaml_files",
        "config",
        "markup",
        "inspection",
    }
    | {"prompt", "data", "shards", "row_prompt", "row_files", "row_lists", "row_responses", "row_pairs"},
    {"model"},
    {"reward"},
    {"learn"},
    {"measure"},
    {"preferences"},
    {"ranking", "ranking_settings", "checking", "faithfulness", "serve", "report", "integrations", "console"},
    {"toy"},
    {"api", "demo", "compare"},
    {"commands"},
    {"cli", "__main__"},
]
"""From the bottom up: a module imports from its own layer and from those before it."""

PURE = [
    {"adhere.reward.signals", "adhere.reward.salience", "adhere.reward.controls", "adhere.reward.pieces"},
    {"adhere.learn.advantages", "adhere.learn.batch", "adhere.learn.losses"},
]
"""Functions of tensors: beside each other, they import the records, the errors and the comparison of texts alone."""

UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def name_of(file: Path) -> str:
    parts = file.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def level(module: str) -> int:
    top = module.split(".")[1]
    levels = [number for number, layer in enumerate(LAYERS) if top in layer]
    assert levels, f"{module} has no layer: give `{top}` its place in LAYERS"
    return levels[0]


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of adhere that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer: write adhere.…"
            base = node.module or ""
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else base for name in whole}
    return {name for name in found if name.split(".")[0] == "adhere"}


def wrong_import(module: str, other: str) -> str | None:
    """Why `module` may not import `other`, or None."""
    if module == "adhere":
        return None
    if other == "adhere" and level(module) == len(LAYERS) - 1:
        return None  # the command line tells the version
    if other == "adhere":
        return f"{module} imports the public surface; import the module that defines the name"
    pure = next((group for group in PURE if module in group), None)
    if pure is not None and other not in pure | {"adhere.types", "adhere.errors", "adhere.text"}:
        return f"{module} is pure: it may not import {other}"
    if level(other) > level(module):
        return f"{module} imports {other}, which stands above it"
    return None


def faults(tree: ast.AST, *, prints: bool = False) -> list[str]:
    """What a file of the package must not do, whatever its layer."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and not prints:
            found.append(f"{line}: print, outside console.py")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = f"{node.value.id}.{node.attr}"
            if whole == "torch.load":
                found.append(f"{line}: torch.load unpickles; use safetensors")
            if whole in ("sys.stdout", "sys.stderr") and not prints:
                found.append(f"{line}: {whole}, outside console.py")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{line}: import {name}" for name in names if name.split(".")[0] in UNSAFE]
        if (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and getattr(node.value, "value", 0) is True
        ):
            found.append(f"{node.value.lineno}: trust_remote_code=True")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    others = imported(tree, set(MODULES))
    assert [reason for other in sorted(others) if (reason := wrong_import(module, other))] == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_console_prints_and_nothing_is_unpickled(module: str) -> None:
    assert faults(ast.parse(MODULES[module].read_text("utf-8")), prints=module == "adhere.console") == []


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_longer_than_400_lines(module: str) -> None:
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_no_two_modules_import_each_other() -> None:
    edges = {name: imported(ast.parse(file.read_text("utf-8")), set(MODULES)) for name, file in MODULES.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in edges.get(waiting.pop(), set()) - seen - {"adhere"}:
                seen.add(other)
                waiting.append(other)
        return seen

    assert [name for name in MODULES if name in reached(name)] == []


@pytest.mark.parametrize(
    ("module", "other", "allowed"),
    [
        ("adhere.cli", "adhere.learn.train", True),
        ("adhere.learn.train", "adhere.cli", False),
        ("adhere.model.capture", "adhere.model.families", True),
        ("adhere.model.capture", "adhere.reward.signals", False),
        ("adhere.reward.named", "adhere.preferences.fit", False),
        ("adhere.preferences.pairs", "adhere.measure.audit", True),
        ("adhere.measure.audit", "adhere.preferences.pairs", False),
        ("adhere.preferences.answer", "adhere.report.markup", False),
        ("adhere.learn.train", "adhere.console", False),
        ("adhere.learn.train", "adhere.toy.models", False),
        ("adhere.measure.audit", "adhere.report.page", False),
        ("adhere.demo", "adhere.toy.models", True),
        ("adhere.reward.signals", "adhere.types", True),
        ("adhere.reward.signals", "adhere.reward.salience", True),
        ("adhere.reward.signals", "adhere.model.policy", False),
        ("adhere.reward.signals", "adhere.reward.named", False),
        ("adhere.learn.losses", "adhere.files", False),
        ("adhere.cli", "adhere", True),
        ("adhere.data", "adhere", False),
    ],
)
def test_the_rule_itself_tells_right_from_wrong(module: str, other: str, allowed: bool) -> None:
    assert (wrong_import(module, other) is None) == allowed


@pytest.mark.parametrize(
    "line",
    [
        "def f():\n    print('x')",
        "import sys\nsys.stdout.write('x')",
        "import torch\ntorch.load('x')",
        "import pickle",
        "from joblib import load",
        "load(trust_remote_code=True)",
    ],
)
def test_each_forbidden_thing_is_found(line: str) -> None:
    assert len(faults(ast.parse(line))) == 1


def test_imports_are_found_wherever_they_stand() -> None:
    lines = ["def f():", "    from adhere.reward import signals", "import adhere.cli", "import torch"]
    text = "\n".join([*lines, "from adhere.types import Reading"])
    found = imported(ast.parse(text), {"adhere.reward", "adhere.reward.signals", "adhere.types"})
    assert found == {"adhere.reward.signals", "adhere.cli", "adhere.types"}


def test_a_module_without_a_layer_is_told() -> None:
    with pytest.raises(AssertionError, match=r"adhere\.helpers has no layer"):
        level("adhere.helpers")
