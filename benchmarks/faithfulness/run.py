"""`adhere bench` on three data sets of real questions, with one example of a short answer before each.

    python benchmarks/faithfulness/run.py --data ../shared/data --model MODEL --output runs/faithfulness --limit 200

A chat model gets the example as an earlier turn (SmolLM2 answers in sentences all the same: `--max-new-tokens 32`).
With `--base` it stands in the text before the question, and a line end ends a response. All else that is given goes to
`adhere bench` (`--reward`, `--splits`, `--num-samples`, `--resume`, …).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from adhere.data import read_rows, write_jsonl

SETS = {"squad_xquad": "validation", "adversarialqa": "validation", "fairytaleqa": "validation"}
"""Data set → the part that is read; its test part is for the last run alone."""
ASK = "{context}\n\nQuestion: {question}\nAnswer:"
EXAMPLE = (
    "The Marlow Valley railway opened in 1868. Its chief engineer was Edith Crane, who designed the stone viaduct at "
    "Fenwick. The line closed in 1954.",
    "Who designed the viaduct?",
    "Edith Crane",
)
"""A passage, a question and its answer, written for this purpose."""


def prepared(source: Path, target: Path, base: bool) -> None:
    """The rows of `source` with a prompt that shows the example first."""
    context, question, answer = EXAMPLE
    shown = ASK.replace("{context}", context).replace("{question}", question)
    if base:
        asked: dict[str, object] = {"prompt": f"{shown} {answer}\n\n{ASK}"}
    else:
        turns = (("user", shown), ("assistant", answer), ("user", ASK))
        asked = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_jsonl(target, [{**row.fields, **asked} for row in read_rows(source)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--part", choices=("validation", "test"), help="(default: validation)")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--base", action="store_true", help="the model is no chat model")
    parser.add_argument("--output", type=Path, required=True, help="gets a folder a data set")
    options, more = parser.parse_known_args(arguments)
    sources = {name: options.data / name / f"{options.part or SETS[name]}.jsonl" for name in options.sets}
    if missing := [str(source) for source in sources.values() if not source.is_file()]:
        print(f"error: no {', '.join(missing)}; give the folder of the data sets with --data", file=sys.stderr)
        raise SystemExit(2)
    for name, source in sources.items():
        rows = options.output / f"{name}.jsonl"
        prepared(source, rows, options.base)
        given = ["--model", options.model, "--data", str(rows), "--output", str(options.output / name)]
        if options.base:
            given += ["--stop", "\n"]
        status = subprocess.run([sys.executable, "-m", "adhere", "bench", *given, *more]).returncode
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
