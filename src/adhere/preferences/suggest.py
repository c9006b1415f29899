"""Which pairs to ask a person about next: those that a reward is least sure of, one a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adhere.data import Row
from adhere.errors import UserError
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.preferences.settings import SuggestConfig
from adhere.reward.reward import Reward


def suggest(
    policy: Policy,
    reward: Reward,
    rows: Sequence[Row],
    config: SuggestConfig | None = None,
) -> list[dict[str, Any]]:
    """`{"prompt", "response_a", "response_b", "margin"}`, the smallest margin of the reward first (uncertainty
    sampling, Lewis & Gale 1994): of each prompt the two best different responses, so that the answer is about what is
    worth having.

    Raises `UserError`: where no prompt has two different responses that ended.
    """
    config = config or SuggestConfig()
    rows = list({str(row.prompt): row for row in rows}.values())  # a prompt given twice is asked about once
    found: list[dict[str, Any]] = []
    batches = [(start, rows[start : start + config.batch_size]) for start in range(0, len(rows), config.batch_size)]
    for start, batch in policy.progress(batches, "sampling pairs", len(rows), size=lambda part: len(part[1])):
        prompts = policy.encode([row.prompt for row in batch], names=[row.where for row in batch])
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        rollout = policy.sample(prompts, config.num_samples, sampling=sampling, seed=config.seed + start)
        scores = reward(rollout).reward.tolist()
        for place, row in enumerate(batch):
            mine = range(place * config.num_samples, (place + 1) * config.num_samples)
            best: dict[str, float] = {}
            for n in mine:
                text = rollout.responses[n].strip()
                if text and bool(rollout.ended[n]):
                    best[text] = max(best.get(text, scores[n]), scores[n])
            if len(best) > 1:
                (one, high), (two, low) = sorted(best.items(), key=lambda item: -item[1])[:2]
                # The better one is not always A: whoever answers would learn that.
                sides = (one, two) if (start + place) % 2 else (two, one)
                found.append(
                    {"prompt": row.prompt, "response_a": sides[0], "response_b": sides[1], "margin": high - low}
                )
    if not found:
        raise UserError("no prompt has two different responses", fix="raise --num-samples or --max-new-tokens")
    return sorted(found, key=lambda pair: float(pair["margin"]))[: config.suggest]
