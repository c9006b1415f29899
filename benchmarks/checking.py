"""How well `adhere check` tells answers that rest on their passage from others.

    python benchmarks/checking.py --data ../shared/data --model MODEL --output runs/checking

Validation questions of English XQuAD, each with its right answer and with the answer to a question about another
passage that does not hold it. `adhere check` prints the area under the ROC curve beside log-prob and word overlap, and
the calibration curve.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from adhere.data import read_rows, write_jsonl

APART = 37
"""Rows between a question and the one that lends its answer: another passage, as questions on one are neighbours."""


def labelled(source: Path, count: int) -> list[dict[str, object]]:
    """Every second question, up to `count`, with both answers and `supported`."""
    rows = read_rows(source)
    found: list[dict[str, object]] = []
    for place, row in list(enumerate(rows))[: 2 * count : 2]:
        context, other = row.fields["context"], place + APART
        while rows[other % len(rows)].answers[0].lower() in context.lower():
            other += 1
        asked = {"context": context, "question": row.fields["question"]}
        found.append({**asked, "response": row.answers[0], "supported": True})
        found.append({**asked, "response": rows[other % len(rows)].answers[0], "supported": False})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True, help="gets the rows and what was found of them")
    options = parser.parse_args()
    given = options.output / "rows.jsonl"
    write_jsonl(given, labelled(options.data / "squad_xquad" / "validation.jsonl", options.questions))
    command = ["check", "--model", options.model, "--input", str(given), "--output", str(options.output / "out.jsonl")]
    raise SystemExit(subprocess.run([sys.executable, "-m", "adhere", *command]).returncode)


if __name__ == "__main__":
    main()
