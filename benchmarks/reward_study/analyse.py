"""What each signal knows, and which heads: right before wrong among a model's own samples.

    python benchmarks/reward_study/analyse.py [--prompts 150] [--part validation]

Two tables a model. Signals: the share of (right, wrong) pairs of a prompt's own samples that each signal alone puts in
order (0.5 = chance), by split. Heads: the same of `comprehensiveness` and of the whole `attention` reward, with the
heads that choose what is taken away: the copy heads, all alike, each layer by itself, the one best copier, the rest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from candidates import changed
from rank import SPLITS, stories
from torch import Tensor

from adhere.data import Row
from adhere.measure.audit import Verdict, audit
from adhere.measure.settings import AuditConfig
from adhere.model.policy import Policy
from adhere.reward.heads import copy_heads
from adhere.reward.named import NAMED, SIGNALS, RewardConfig
from adhere.reward.reward import Reward
from adhere.toy import model_path

LEFT_OUT = ("exact", "random")


def judged(policy: Policy, rows: list[Row], rewards: dict[str, Reward]) -> dict[str, Verdict]:
    """A verdict on each, all on the same samples."""
    return audit(policy, rows, rewards, AuditConfig(max_new_tokens=8, batch_size=50))


def of_signals(policy: Policy, rows: list[Row]) -> dict[str, Reward]:
    """A reward of each signal alone."""
    names = [name for name in SIGNALS if name not in LEFT_OUT]
    configs = {name: RewardConfig({name: 1.0}, normalise="none", renormalise=name != "lookback") for name in names}
    return {name: Reward(config, policy) for name, config in configs.items()}


def of_heads(policy: Policy, rows: list[Row]) -> dict[str, Reward]:
    """`comprehensiveness` alone and `attention` with each choice of heads."""
    measured = copy_heads(policy)
    alone = RewardConfig(**changed({"overlap": 0, "coherence": 0, "repetition": 0}))
    found = {}
    for name, weights in choices(measured.weights).items():
        for what, config in (("comprehensiveness", alone), ("attention", NAMED["attention"])):
            found[f"{what}, {name}"] = Reward(config, policy, replace(measured, scores=weights))
    return found


def choices(measured: Tensor) -> dict[str, Tensor]:
    """Head weights [L, H] by name, each with sum 1."""
    best = torch.zeros_like(measured)
    best.view(-1)[measured.argmax()] = 1.0
    masks = {"all heads": torch.ones_like(measured), "best copy head": best, "all but the best": 1.0 - best}
    for layer in range(len(measured)):
        masks[f"layer {layer + 1}"] = torch.zeros_like(measured)
        masks[f"layer {layer + 1}"][layer] = 1.0
    return {"copy heads": measured} | {name: mask / mask.sum() for name, mask in masks.items()}


def table(verdicts: dict[str, Verdict]) -> str:
    """A row each."""
    lines = [f"| | {' | '.join(SPLITS)} |", "|---" * (len(SPLITS) + 1) + "|"]
    for name, verdict in verdicts.items():
        figures = [verdict.ranking.get(split) for split in SPLITS]
        cells = ["–" if f is None else f"{f.mean:.2f} [{f.low:.2f}, {f.high:.2f}]" for f in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--prompts", type=int, default=150, help="stories of each split")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        policy = Policy.load(model_path(kind), device="cpu")
        rows = stories(options.part, options.prompts)
        for rewards in (of_signals(policy, rows), of_heads(policy, rows)):
            print(f"\n{kind}\n\n{table(judged(policy, rows, rewards))}", flush=True)


if __name__ == "__main__":
    main()
