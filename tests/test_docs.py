"""The README and the docs against the project: links lead somewhere, flags and names exist, the tree is complete, the
example rows suit the toys, and the README's commands run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from adhere.cli import main
from adhere.commands import COMMANDS
from adhere.data import read_rows
from adhere.toy.stories import vocabulary

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = PAGES[0].read_text()


def name(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """What the headings of a page can be linked as."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_of_a_command_exists(page, capsys):
    for line in page.read_text().splitlines():
        found = re.search(r"(?:^|`|\$ | {4})adhere ([a-z]+(?: make| fit)?)\b", line)
        if found is None or found[1].split()[0] not in COMMANDS:
            continue
        command, rest = found[1], line[found.end() :]
        if not line.startswith("| `adhere"):  # a row of the table of commands tells more flags beside
            rest = rest.partition("`")[0]
        capsys.readouterr()
        assert main([*command.split(), "--help"]) == 0
        known = capsys.readouterr().out
        unknown = [flag for flag in re.findall(r"(?<![\w-])(--[a-z-]+)", rest) if f"{flag} " not in f"{known} "]
        assert unknown == [], f"adhere {command}{rest}"


def test_the_readme_lists_every_command():
    assert [command for command in COMMANDS if f"| `adhere {command}" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_imported_name_exists(page):
    for language, code in FENCE.findall(page.read_text()):
        for module, names in re.findall(r"^from (adhere[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
            assert language == "python"
            found = importlib.import_module(module)
            assert [each for each in re.findall(r"\w+", names) if not hasattr(found, each)] == []


def test_the_tree_names_every_module():
    tree = next(code for _, code in FENCE.findall(README) if code.startswith("src/adhere/"))
    sections = dict(re.findall(r"^  (\w+)/ .*\n((?:    .*\n)*)", tree, re.MULTILINE))
    package = ROOT / "src" / "adhere"
    top = {path.name for path in package.iterdir() if path.name not in ("__pycache__", "py.typed")}
    patterns = [part.replace("*", r"\w+") for part in re.findall(r"[\w*]+(?:\.\w+|(?=/))", tree)]
    assert [each for each in sorted(top) if not any(re.fullmatch(pattern, each) for pattern in patterns)] == []
    for folder, lines in sections.items():
        told = {word for line in lines.splitlines() for word in line[4:39].split()}
        modules = {path.stem for path in (package / folder).glob("*.py")} - {"__init__"}
        assert not lines or told == modules, folder


@pytest.mark.parametrize("file", ["prompts.jsonl", "responses.jsonl"])
def test_the_toys_know_every_word_of_the_example_rows(file):
    known = {*vocabulary(), "Question:", "Answer:"}
    rows = read_rows(ROOT / "examples" / file)
    said = {word for row in rows for text in (row.prompt, row.response or "", *row.answers) for word in text.split()}
    assert said <= known


COMMAND_LINES = [line for _, code in FENCE.findall(README) for line in code.splitlines() if "runs/try" in line]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(COMMAND_LINES) == 8
    for line in COMMAND_LINES:
        line = line.replace("--steps 20", "--steps 2")
        status = main(shlex.split(line.replace("runs/try", str(tmp_path)))[1:])
        gameable = " audit " in line and json.loads((tmp_path / "audit" / "audit.json").read_text())["gameable"]
        assert status == (3 if gameable else 0), capsys.readouterr().err
