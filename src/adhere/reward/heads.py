"""Copy heads: which attention heads look at the prompt token that is being said. Measured once, saved with the run.

w^copy[l, h] ∝ how often the most-attended prompt token of head (l, h) *is* the token generated, on the policy's own
samples: no labels. One or two heads in twelve do most of the copying, so an average over all would hide it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from adhere.errors import UserError
from adhere.files import atomic_write
from adhere.reward.salience import response_content
from adhere.types import Prompts

if TYPE_CHECKING:
    from adhere.model.policy import Policy

FILE_NAME = "heads.safetensors"
_KEY = "copy_weights"


def copy_weights(hits: Tensor, total: int | Tensor) -> Tensor:
    """Head weights from copy hits: [L, H] → [L, H] float32, ∝ hits / total, sum 1.

    `total` is the number of content tokens looked at. Raises `UserError` where no head ever hit: uniform weights
    would turn grounding into something else under the same name.

    >>> copy_weights(torch.tensor([[3, 1], [0, 0]]), 5)
    tensor([[0.7500, 0.2500],
            [0.0000, 0.0000]])
    """
    looked = int(total)
    fix = "give more prompts, or choose a reward that reads no copy heads: without `grounding` and `comprehensiveness`"
    if looked <= 0:
        raise UserError("copy heads cannot be measured: the samples hold no content token", fix=fix)
    assert int(hits.min()) >= 0 and int(hits.max()) <= looked, f"hits of {looked} tokens out of range"
    if not hits.any():
        raise UserError(
            f"copy heads cannot be measured: in {looked} content tokens no head's most-attended prompt token "
            "was the token generated",
            fix=fix,
        )
    share = hits.double() / looked
    return (share / share.sum()).float()


def measure(policy: Policy, prompts: Prompts, num_samples: int, seed: int, classes: Tensor) -> tuple[Tensor, int]:
    """Sample, read and count: hits [L, H] of the policy's own content tokens, and how many such tokens there were."""
    rollout = policy.sample(prompts, num_samples, seed=seed)
    content = response_content(rollout, classes)
    return policy.copy_hits(rollout, content), int(content.sum())


def save_heads(directory: str | Path, weights: Tensor) -> Path:
    """Write `weights` [L, H] to `directory`/heads.safetensors: whole or not at all. Returns the path."""
    path = Path(directory) / FILE_NAME
    atomic_write(path, save({_KEY: weights.detach().float().cpu().contiguous()}))
    return path


def load_heads(directory: str | Path) -> Tensor:
    """The weights [L, H] float32 that `save_heads` wrote into `directory`. Raises `UserError` where they are not."""
    path = Path(directory) / FILE_NAME
    fix = "measure the heads again (`adhere train` does so at its start)"
    if not path.is_file():
        raise UserError("no copy-head weights here", where=str(path), fix=fix)
    try:
        weights = load_file(path).get(_KEY)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file ({error})", where=str(path), fix=fix) from None
    if weights is None or weights.dim() != 2 or not torch.isfinite(weights).all() or weights.min() < 0:
        raise UserError(f"not copy-head weights: `{_KEY}` must be [L, H], finite, ≥ 0", where=str(path), fix=fix)
    if abs(float(weights.sum()) - 1.0) > 1e-3:
        raise UserError(f"copy-head weights sum to {float(weights.sum()):.4g}, not 1", where=str(path), fix=fix)
    return weights
