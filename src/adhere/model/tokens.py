"""What a forward says of each response token: its log-prob and, where asked, the spread of the distribution."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from adhere.model.constraints import Constraints
from adhere.model.logits import token_logprobs, token_spread
from adhere.model.prefix import Predictions
from adhere.types import Rollout

# Logits held at a time, rows times vocabulary: 64 MB in float32, of which a handful of copies are made.
CHUNK_ELEMENTS = 1 << 24


def token_statistics(
    piece: Predictions, rollout: Rollout, constraints: Constraints | None, spread: Collection[str]
) -> dict[str, Tensor]:
    """`logprobs` of the tokens that `piece` predicts, with gradient, and those of `SPREAD` in `spread`, without.

    [B, t] float32 each, 0 on padding, for which nothing is computed. Log-probs are those at `rollout.temperature` under
    `constraints`.
    """
    # Place by place, because constraints look at what came before.
    places, rows = rollout.response_mask[:, piece.response].T.nonzero(as_tuple=True)
    first = piece.response.start

    def part(chosen: Tensor) -> dict[str, Tensor]:
        own, place = rows[chosen], places[chosen]
        logits = piece.logits[own, place].float()
        if constraints is not None:
            logits = constraints.read(logits, rollout, own, place + first)
        targets = rollout.response_ids[own, place + first]
        return {
            "logprobs": token_logprobs(logits, targets, rollout.temperature),
            **token_spread(logits.detach(), rollout.temperature, spread),
        }

    step = max(1, CHUNK_ELEMENTS // piece.logits.shape[-1])
    parts = [part(chosen) for chosen in torch.arange(len(rows), device=rows.device).split(step)]
    blank = torch.zeros(piece.logits.shape[:2], device=rows.device)
    return {
        name: blank.index_put((rows, places), torch.cat([p[name] for p in parts])) for name in ("logprobs", *spread)
    }
