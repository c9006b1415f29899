"""Token-level credit: GRPO whose advantage falls on the tokens that need the attended context, beside plain GRPO.

    python benchmarks/reward_study/credit.py [--seeds 0 1 2] [--prompts 600]

The weight of a token is its share of what the response loses when the context it attends to is taken away,
w_t = relu(log p(y_t|x) − log p(y_t|x without it)), brought to mean 1 over the response: A_t = A · ((1 − λ) + λ · w_t).
λ = 0 is GRPO. A response that loses nothing keeps its advantage as it is.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from candidates import CANDIDATES, changed
from torch import Tensor
from train import ALGORITHMS, Run, perform, table

from adhere.learn.algorithms import FORMULAS, Formulas, grpo_advantages, grpo_loss
from adhere.learn.batch import Batch
from adhere.learn.settings import GRPO
from adhere.reward.signals import Evidence

_LATEST: dict[str, Tensor] = {}
NAMES = {"grpo": 0.0, "half on tokens": 0.5, "all on tokens": 1.0}


def remember(evidence: Evidence) -> Tensor:
    """A signal of weight 0: keeps the weights of the tokens [B, R] for the update of this step."""
    assert evidence.ablated_logprobs is not None
    lost = (evidence.reading.logprobs - evidence.ablated_logprobs).clamp(min=0.0, max=100.0)
    mask = evidence.reading.response_mask
    lost = lost * mask
    mean = lost.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    _LATEST["weights"] = torch.where(mean > 1e-6, lost / mean.clamp(min=1e-6), mask.float())
    return torch.zeros(len(lost))


@dataclass(frozen=True)
class TokenCredit(GRPO):
    """GRPO with the advantage spread over the tokens by `remember`."""

    share: float = 0.0


def token_advantages(options: TokenCredit, batch: Batch) -> Batch:
    """GRPO's advantages, `share` of each moved to the tokens that `remember` weighs."""
    plain = grpo_advantages(options, batch).advantages
    assert plain is not None
    return replace(batch, advantages=plain * (1.0 - options.share + options.share * _LATEST["weights"]))


def trained(run: Run) -> tuple[Run, dict[str, Any]]:
    """`train.perform`, in a process that knows the algorithms of this file."""
    FORMULAS[TokenCredit] = Formulas(token_advantages, grpo_loss)
    for name, share in NAMES.items():
        ALGORITHMS[name] = lambda share=share: TokenCredit(share=share)
    CANDIDATES["remembered"] = changed({f"{__name__}:remember": 0.0})
    return perform(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=600, help="fresh stories of each split")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    runs = [
        Run(kind, name, "remembered", seed, options.steps, 2e-4, 0.04, "validation", options.prompts)
        for name, seed, kind in product(NAMES, options.seeds, options.kinds)
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        print(table(list(pool.map(trained, runs))))


if __name__ == "__main__":
    main()
