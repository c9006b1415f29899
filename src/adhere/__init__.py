"""adhere: post-train language models from their own attention to the prompt.

The public surface, loaded when first used, so that `import adhere` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adhere.errors import RunFailed, UnsupportedModel, UserError
    from adhere.learn.settings import TrainConfig
    from adhere.learn.train import train
    from adhere.measure.evaluate import evaluate
    from adhere.measure.settings import EvalConfig
    from adhere.model.policy import Policy
    from adhere.model.settings import Lora, Sampling
    from adhere.reward.named import RewardConfig
    from adhere.reward.reward import Reward

__version__ = "0.1.0"

_HOME = {
    "EvalConfig": "adhere.measure.settings",
    "Lora": "adhere.model.settings",
    "Policy": "adhere.model.policy",
    "Reward": "adhere.reward.reward",
    "RewardConfig": "adhere.reward.named",
    "RunFailed": "adhere.errors",
    "Sampling": "adhere.model.settings",
    "TrainConfig": "adhere.learn.settings",
    "UnsupportedModel": "adhere.errors",
    "UserError": "adhere.errors",
    "evaluate": "adhere.measure.evaluate",
    "train": "adhere.learn.train",
}

__all__ = [
    "EvalConfig",
    "Lora",
    "Policy",
    "Reward",
    "RewardConfig",
    "RunFailed",
    "Sampling",
    "TrainConfig",
    "UnsupportedModel",
    "UserError",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adhere' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
