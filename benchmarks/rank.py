"""Seconds of a ranking: until something is shown, and in all, against `generate` of the same samples and a forward.

    python benchmarks/rank.py --model MODEL [--data ../shared/data] [--prompts 16] [--num-samples 4] [--repeats 3]

Prompts are the first rows of SQuAD (squad_xquad/validation.jsonl of the data sets). A ranking samples, reads and scores
with the copy heads at hand. The plain side is what transformers does: `generate` with `num_return_sequences`, made to
draw the very tokens that the ranking drew, and one forward over prompts and responses. The two take turns; figures are
medians, and the ratio is the median of the turns' own. Copy heads are measured once, before, and told apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from adhere.data import Row, read_rows
from adhere.model.policy import Policy
from adhere.model.prefix import positions
from adhere.model.settings import Sampling
from adhere.progress import one
from adhere.ranking import Draw, rank, sampled_candidates
from adhere.ranking_settings import RankConfig
from adhere.reward.reward import Reward
from adhere.types import Rollout

T = TypeVar("T")


class Stopwatch:
    """A `Progress` that notes when something was first shown and first counted, and the seconds of each phase."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.shown: float | None = None
        self.counted: float | None = None
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def __call__(
        self, items: Iterable[T], title: str, total: int, *, size: Callable[[T], int] = one, done: int = 0
    ) -> Iterator[T]:
        began = time.perf_counter()
        self.shown = self.shown or began - self.start
        self._depth += 1
        try:
            for item in items:
                yield item
                self.counted = self.counted or time.perf_counter() - self.start
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - began


class Forced(LogitsProcessor):
    """Leaves `generate` no choice but the tokens of a rollout."""

    def __init__(self, rollout: Rollout) -> None:
        self._ids, self._prompt = rollout.response_ids, rollout.prompts.ids.shape[1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._ids[:, input_ids.shape[1] - self._prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def ranked(reward: Reward, rows: list[Row], config: RankConfig) -> tuple[list[Rollout], dict[str, float], float]:
    """The rollouts of a ranking, the seconds of its phases, and in all."""
    rollouts: list[Rollout] = []
    draw: Draw = sampled_candidates(reward.policy, config)

    def kept(*asked: Any) -> Rollout:
        rollouts.append(draw(*asked))
        return rollouts[-1]

    reward.policy.progress = watch = Stopwatch()
    list(rank(reward, rows, config, kept))
    return rollouts, watch.seconds, time.perf_counter() - watch.start


@torch.no_grad()
def plain(policy: Policy, rollouts: list[Rollout], samples: int) -> tuple[float, float]:
    """Seconds of `generate` and of the forward, for the same samples of the same prompts."""
    network, generating, reading = policy.network, 0.0, 0.0
    for rollout in rollouts:
        prompts, width = rollout.prompts, rollout.response_ids.shape[1]
        began = time.perf_counter()
        network.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask.long(), do_sample=True, num_return_sequences=samples,
            max_new_tokens=width, logits_processor=LogitsProcessorList([Forced(rollout)]),
        )  # fmt: skip
        generating += time.perf_counter() - began
        began = time.perf_counter()
        mask = torch.cat([prompts.mask[rollout.prompt_index], rollout.response_mask], dim=1)
        ids = torch.cat([prompts.ids[rollout.prompt_index], rollout.response_ids], dim=1)
        network(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False,
            logits_to_keep=width + 1,
        )  # fmt: skip
        reading += time.perf_counter() - began
    return generating, reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a decoder-only model: folder or hub id")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--reward", default="attention")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    path = options.data / "squad_xquad" / "validation.jsonl"
    if not path.exists():
        print(f"error: no {path}; give the folder of the data sets with --data", file=sys.stderr)
        raise SystemExit(2)
    rows = read_rows(path, limit=options.prompts)
    config = RankConfig(num_samples=options.num_samples, sampling=Sampling(max_new_tokens=options.max_new_tokens))
    policy = Policy.load(options.model, device="cpu")
    policy.progress = watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:  # no heads in the cache: the longest way to the first sample
        os.environ["ADHERE_CACHE"] = folder
        reward = Reward.named(options.reward, policy)
    heads = time.perf_counter() - watch.start
    turns = []
    for _ in range(options.repeats):
        rollouts, phases, whole = ranked(reward, rows, config)
        turns.append((whole, *plain(policy, rollouts, options.num_samples), phases))
    print(
        f"| {options.prompts} prompts × {options.num_samples} × {options.max_new_tokens} tokens | seconds |\n|---|---|"
    )
    print(f"| loaded → something is shown | {watch.shown or 0:.1f} |")
    print(f"| loaded → something is counted | {watch.counted or 0:.1f} |")
    print(f"| copy heads, once a model | {heads:.1f} |")
    print(f"| ranking | {median(turn[0] for turn in turns):.1f} |")
    for title in turns[0][3]:
        print(f"| – {title} | {median(turn[3][title] for turn in turns):.1f} |")
    print(f"| plain `generate` | {median(turn[1] for turn in turns):.1f} |")
    print(f"| plain forward | {median(turn[2] for turn in turns):.1f} |")
    ratios = [turn[0] / (turn[1] + turn[2]) for turn in turns]
    print(f"\nratio {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
