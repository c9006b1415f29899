"""What rows of logits say of the tokens that followed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

SPREAD = ("entropy", "certainty")
"""What can be said of a next-token distribution as a whole. Each costs a pass over the vocabulary."""

# Logits worked on at a time, rows times vocabulary: 64 MB in float32, of which a handful of copies are made.
CHUNK_ELEMENTS = 1 << 24


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `targets`: [..., V], [...] int64 → [...] float32."""
    scaled = _at(logits, temperature)
    # Of all ways to write it, the one whose backward pass makes the fewest copies.
    return -cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()
def token_spread(logits: Tensor, temperature: float = 1.0, wanted: Collection[str] = SPREAD) -> dict[str, Tensor]:
    """Those of `SPREAD` that are wanted, nats: [..., V] → [...] float32 each.

    `entropy` is H(p). `certainty` (Zhao et al. 2025, Intuitor, eq. 4) is KL(uniform ‖ p) = −log V − mean_v log p_v;
    tokens that a model forbids (−inf) are left out of V.
    """
    if not wanted:
        return {}
    parts = [_spread(_at(rows, temperature), wanted) for rows in bounded(logits.flatten(0, -2), logits.shape[-1])]
    return {name: torch.cat([part[name] for part in parts]).view(logits.shape[:-1]) for name in wanted}


def bounded(rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """`rows` [n, …] in parts whose logits are at most `CHUNK_ELEMENTS`, for work that copies them several times."""
    return tuple(torch.split(rows, max(1, CHUNK_ELEMENTS // vocabulary)))


def _spread(logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    logprobs = logits.log_softmax(-1)
    forbidden = logprobs == -torch.inf
    logprobs.masked_fill_(forbidden, 0.0)  # so that p log p is 0 there, as it should be
    found = {}
    if "certainty" in wanted:
        count = logprobs.shape[-1] - forbidden.sum(-1, dtype=torch.int32)
        found["certainty"] = -logprobs.sum(-1) / count - count.log()
    if "entropy" in wanted:
        found["entropy"] = -logprobs.exp().mul_(logprobs).sum(-1)
    return found


def _at(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature`, float32: no copy at 1."""
    return logits.float() if temperature == 1 else logits.float() / temperature
