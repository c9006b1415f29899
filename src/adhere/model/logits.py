"""What a row of logits says of the token that followed."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of logits handled at once, times the vocabulary: bounds the float32 copy to 256 MB.
CHUNK_ELEMENTS = 1 << 26


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `targets`: [B, t, V], [B, t] int64 → [B, t] float32."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, targets[..., None]).squeeze(-1) - scaled.logsumexp(-1)


@torch.no_grad()
def token_spread(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Entropy H(p) and certainty KL(uniform ‖ p) of each row, nats: [B, t, V] → two of [B, t] float32.

    Certainty (Zhao et al. 2025, Intuitor, eq. 4) is −log V − mean_v log p_v; tokens a model forbids (−inf) are left out
    of V.
    """
    rows = logits.flatten(0, -2)
    step = max(1, CHUNK_ELEMENTS // rows.shape[-1])
    entropy, certainty = [], []
    for part in rows.split(step):
        scaled = part.float() / temperature
        logprobs = scaled.log_softmax(-1)
        allowed = scaled.isfinite()
        finite = logprobs.masked_fill(~allowed, 0.0)
        count = allowed.sum(-1)
        entropy.append(-(finite.exp() * finite * allowed).sum(-1))
        certainty.append(-finite.sum(-1) / count - count.log())
    shape = logits.shape[:-1]
    return torch.cat(entropy).view(shape), torch.cat(certainty).view(shape)
