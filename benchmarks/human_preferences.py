"""What the signals know of human preferences: pairwise accuracy on real pairs, uncalibrated and calibrated.

    python benchmarks/real_model.py --data ../shared/data --output runs/real/base
    python benchmarks/human_preferences.py --model runs/real/base [--sets hh_harmless pandalm] [--pairs 400]

For each set of pairs: the share in which a signal is higher for the chosen response, ties half, 0.5 = chance; of the
reward `attention`; and of the weights that `adhere calibrate` fits, cross-validated by prompt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from adhere.data import Row, read_rows
from adhere.measure.stats import Estimate, bootstrap
from adhere.model.policy import Policy
from adhere.preferences.calibrate import SIGNALS, features_of, fit_weights

LONGEST = 1500
"""Characters of a prompt and its longer response."""


def pairs_of(path: Path, count: int) -> list[Row]:
    """The first `count` pairs that fit and differ."""
    rows = read_rows(path, need=("chosen", "rejected"))
    fit_in = [
        row
        for row in rows
        if isinstance(row.prompt, str)
        and row.chosen != row.rejected
        and len(row.prompt) + max(len(str(row.chosen)), len(str(row.rejected))) <= LONGEST
    ]
    return fit_in[:count]


def shown(figure: Estimate) -> str:
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--sets", nargs="*", default=["hh_harmless", "pandalm"])
    parser.add_argument("--part", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args()
    if missing := [name for name in options.sets if not (options.data / name / f"{options.part}.jsonl").exists()]:
        print(f"error: {options.data}: no {', '.join(missing)} there; give the folder with --data", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    policy = Policy.load(options.model, device="cpu")
    for name in options.sets:
        rows = pairs_of(options.data / name / f"{options.part}.jsonl", options.pairs)
        features = features_of(policy, rows)
        print(f"\n{name}: {len(rows)} pairs\n\n| signal | pairs in order |\n|---|---|")
        for place, signal in enumerate(SIGNALS):
            margins = features.values[:, place].tolist()
            print(f"| {signal} | {shown(bootstrap([0.5 if m == 0 else float(m > 0) for m in margins]))} |")
        found = fit_weights(features, policy.kind)
        print(f"| length, a control | {shown(found.longer)} |")
        print(f"| **attention**, uncalibrated | {shown(found.uncalibrated)} |")
        print(f"| **calibrated**, cross-validated | {shown(found.accuracy)} |\n\n{found.verdict}", flush=True)


if __name__ == "__main__":
    main()
