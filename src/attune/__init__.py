"""attune: post-train language models from their own attention to the prompt.

The public surface, loaded when first used, so that `import attune` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attune.errors import RunFailed, UnsupportedModel, UserError
    from attune.learn.settings import TrainConfig
    from attune.learn.train import train
    from attune.measure.evaluate import EvalConfig, evaluate
    from attune.model.policy import Lora, Policy
    from attune.model.sampling import Sampling
    from attune.reward.named import RewardConfig
    from attune.reward.reward import Reward

__version__ = "0.1.0"

_HOME = {
    "EvalConfig": "attune.measure.evaluate",
    "Lora": "attune.model.policy",
    "Policy": "attune.model.policy",
    "Reward": "attune.reward.reward",
    "RewardConfig": "attune.reward.named",
    "RunFailed": "attune.errors",
    "Sampling": "attune.model.sampling",
    "TrainConfig": "attune.learn.settings",
    "UnsupportedModel": "attune.errors",
    "UserError": "attune.errors",
    "evaluate": "attune.measure.evaluate",
    "train": "attune.learn.train",
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
        raise AttributeError(f"module 'attune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
