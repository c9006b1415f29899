"""The processes of a run, as `accelerate launch` or `torchrun` made them, and what such a launch may not ask for.

accelerate hands its options down in environment variables. Those that training would silently leave undone, or that
would change the gradients behind its back, are refused by name.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState

from adhere.errors import UserError

PLAIN = "launch with plain data parallelism: accelerate launch --num_processes N"
REFUSED = {
    "ACCELERATE_MIXED_PRECISION": ("no", "use --dtype bfloat16 for mixed precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "set max_tokens: larger batches are accumulated, exactly"),
    "ACCELERATE_USE_FSDP": ("false", PLAIN),
    "ACCELERATE_USE_DEEPSPEED": ("false", PLAIN),
    "ACCELERATE_USE_MEGATRON_LM": ("false", PLAIN),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", PLAIN),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "launch without --dynamo_backend"),
}
"""Variable → the only value that it may have, and what to do instead."""


def accelerator(device: torch.device, dtype: str) -> Accelerator:
    """The accelerator of this process. Raises `UserError` as `refuse_environment` does."""
    refuse_environment(dtype)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def leave() -> None:
    """Part from the other processes, once none of them waits for this one any more.

    A process that ends with its group alive may abort in the threads of the group, after all its work is done."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def refuse_environment(dtype: str = "auto") -> None:
    """Raise `UserError` for a variable of accelerate that asks for what training does not do.

    Mixed precision in bf16 is what `dtype` bfloat16 does, so the two together are fine."""
    for name, (value, fix) in REFUSED.items():
        given = os.environ.get(name, value)
        agreed = name == "ACCELERATE_MIXED_PRECISION" and (given, dtype) == ("bf16", "bfloat16")
        if given.lower() not in (value, "") and not agreed:
            raise UserError(f"{name} is {given}, which training does not follow", fix=f"unset it; {fix}")
