"""Which numbers a network computes in, and which its weights are kept in while they are trained.

A weight in bfloat16 has 8 significant bits: a step of AdamW of 1e-5 on a weight of 0.1 is less than half of its last
bit and is rounded away. So what is trained is float32, and `bfloat16` says what forwards compute in (mixed precision,
Micikevicius et al. 2018): by autocast where all weights are trained, by a frozen base in bfloat16 with LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from adhere.errors import RunFailed, UserError
from adhere.model.settings import check_training_dtype

_PART = 1 << 22
"""Numbers that are looked at at a time."""


def loading_dtype(dtype: str, lora: bool) -> str:
    """What the weights of a network that is to be trained are loaded as, where `dtype` is asked for."""
    return "bfloat16" if lora and dtype == "bfloat16" else "float32"


def keep_trained_in_float32(model: nn.Module, dtype: str) -> torch.dtype | None:
    """Make `model` ready to be trained with `dtype`, in place: its trained weights become float32.

    Returns the dtype that its forwards are to be cast to, None for that of its weights.
    Raises `UserError` where every weight is quantised, so that nothing could be trained.
    """
    check_training_dtype(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = len(trained) == sum(1 for _ in model.parameters())
    if quantised(model):
        if whole or not trained:
            raise UserError("quantised weights cannot be trained", fix="add --lora, or give the model unquantised")
    elif whole or dtype != "bfloat16":
        model.to(torch.float32)
    for parameter in trained:
        parameter.data = parameter.data.float()
    return torch.bfloat16 if whole and dtype == "bfloat16" else None


def quantised(model: nn.Module) -> bool:
    """Whether the weights of `model` are stored in fewer bits than they are computed with."""
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def computing(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Forwards within this context compute in `dtype`; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Forwards within this context compute in the dtype of the weights, whatever is around it."""
    return torch.autocast(device.type, enabled=False)


def require_finite(weights: Iterable[tuple[str, torch.Tensor]], when: str = "") -> None:
    """Raise `RunFailed` for the first of the named weights that holds an infinity or NaN: it must not be saved. `when`
    goes before its name."""
    for name, weight in weights:
        if weight.is_floating_point() and not _finite(weight.detach()):
            raise RunFailed(
                f"{when}{name} is not finite, so nothing is saved",
                fix="lower learning_rate or weight_decay; an earlier checkpoint is sound: --resume",
            )


def _finite(weight: torch.Tensor) -> bool:
    """Whether all of `weight` is finite; in parts, because the test copies what it reads."""
    return all(bool(torch.isfinite(part).all()) for part in weight.flatten().split(_PART))
