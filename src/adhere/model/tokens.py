"""What a forward says of each response token: its log-prob and, where asked, the spread of the distribution."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adhere.model.constraints import Constraints
from adhere.model.head import Head
from adhere.model.logits import bounded, token_logprobs, token_spread
from adhere.model.prefix import Predictions
from adhere.types import Rollout


def token_statistics(
    piece: Predictions,
    rollout: Rollout,
    head: Head | None,
    constraints: Constraints | None,
    spread: Collection[str],
) -> dict[str, Tensor]:
    """`logprobs` of the tokens that `piece` predicts, with gradient, and those of `SPREAD` in `spread`, without.

    [B, t] float32 each, 0 on padding, for which nothing is computed. Log-probs are those at `rollout.temperature` under
    `constraints`. Where `piece` brings no logits, `head` makes them, and again in the backward pass: they are held
    for a bounded number of tokens (`bounded`).
    """
    logits_of: Callable[[Tensor], Tensor]
    if piece.logits is not None:
        states, logits_of, vocabulary = piece.logits, nn.Identity(), piece.logits.shape[-1]
    else:
        assert head is not None and piece.hidden is not None
        states, logits_of, vocabulary = piece.hidden, head, head.vocabulary
    # Place by place, because constraints look at what came before.
    counted = rollout.response_mask[:, piece.response]
    places, rows = counted.T.nonzero(as_tuple=True)
    first = piece.response.start

    def part(chosen: Tensor, states: Tensor) -> dict[str, Tensor]:
        own, place = rows[chosen], places[chosen] + first
        logits = logits_of(states).float()
        if constraints is not None:
            logits = constraints.read(logits, rollout, own, place)
        return {
            "logprobs": token_logprobs(logits, rollout.response_ids[own, place], rollout.temperature),
            **token_spread(logits.detach(), rollout.temperature, spread),
        }

    pieces = bounded(torch.arange(len(rows), device=rows.device), vocabulary)
    again = torch.is_grad_enabled() and piece.logits is None and len(pieces) > 1
    run = partial(checkpoint, part, use_reentrant=False) if again else part
    found = [run(chosen, states[rows[chosen], places[chosen]]) for chosen in pieces]
    blank = torch.zeros(counted.shape, device=rows.device)
    return {
        name: blank.index_put((rows, places), torch.cat([p[name] for p in found])) for name in ("logprobs", *spread)
    }
