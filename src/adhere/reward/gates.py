"""What a response must pass before its reward counts: {name: evidence → [B] bool}."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adhere.reward.controls import support
from adhere.reward.signals import Evidence


def ended(evidence: Evidence) -> Tensor:
    """Whether a response ended by itself rather than at the length limit. [B] bool."""
    return evidence.reading.rollout.ended


def said(evidence: Evidence) -> Tensor:
    """Whether a response holds more than blanks. [B] bool."""
    rollout = evidence.reading.rollout
    return torch.tensor([bool(text.strip()) for text in rollout.responses], device=rollout.ended.device)


def supported(evidence: Evidence) -> Tensor:
    """Whether the context says a content word of the response that the question does not. [B] bool.

    Without a context nothing can be told, and every response passes.
    """
    return (support(evidence) > 0) | ~evidence.context.any(-1)


GATE_FUNCTIONS: dict[str, Callable[[Evidence], Tensor]] = {"ended": ended, "said": said, "supported": supported}
"""Name of a gate → whether each response passes it."""


def passes(gates: Iterable[str], evidence: Evidence) -> Tensor:
    """Whether each response passes all of `gates`. [B] bool."""
    passed = torch.ones_like(evidence.reading.rollout.ended)
    for name in gates:
        passed = passed & GATE_FUNCTIONS[name](evidence)
    return passed
