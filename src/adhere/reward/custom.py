"""A user's own signal: a `module:function`, imported and checked at every call."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from adhere.errors import UserError
from adhere.reward.signals import Evidence


def user_function(spec: str) -> Callable[[Evidence], Tensor]:
    """Import `module:function`, looking in the working directory too. Raises `UserError` where it is not there."""
    module_name, _, name = spec.partition(":")
    fix = "write module:function, the module on the Python path or in the working directory"
    here = os.getcwd()
    there = here in sys.path
    if not there:
        sys.path.append(here)  # last, so that a stray file never hides an installed module
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{spec!r} cannot be imported ({error})", where="reward", fix=fix) from error
    finally:
        if not there:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{spec!r}: {module_name} has no function {name!r}", where="reward", fix=fix)

    return checked(spec, function)


def checked(name: str, function: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
    """`function`, a user's own signal called `name`; whatever it returns is checked: a finite number per response."""

    def signal(evidence: Evidence) -> Tensor:
        value = function(evidence)
        want = f"return a finite float tensor of shape [{len(evidence.reading.rollout)}], a number per response"
        if not isinstance(value, Tensor):
            raise UserError(f"{name!r} returned {type(value).__name__}", where="reward", fix=want)
        if not value.is_floating_point() or value.shape != (len(evidence.reading.rollout),):
            raise UserError(f"{name!r} returned {value.dtype} {list(value.shape)}", where="reward", fix=want)
        if not torch.isfinite(value).all():
            raise UserError(f"{name!r} returned a value that is not finite", where="reward", fix=want)
        return value

    return signal
