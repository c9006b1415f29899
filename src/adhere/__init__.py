"""adhere: post-train language models from their own attention to the prompt.

The public surface, loaded when first used, so that `import adhere` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see of the list below; a test compares the two
    from adhere.api import audit as audit
    from adhere.api import bench as bench
    from adhere.api import check as check
    from adhere.api import evaluate as evaluate
    from adhere.api import rank as rank
    from adhere.api import score as score
    from adhere.api import train as train
    from adhere.console import progress_bars as progress_bars
    from adhere.data import Row as Row
    from adhere.errors import RunFailed as RunFailed
    from adhere.errors import UnsupportedModel as UnsupportedModel
    from adhere.errors import UserError as UserError
    from adhere.learn.settings import TrainConfig as TrainConfig
    from adhere.measure.settings import EvalConfig as EvalConfig
    from adhere.model.policy import Policy as Policy
    from adhere.model.settings import Lora as Lora
    from adhere.model.settings import Sampling as Sampling
    from adhere.reward.named import RewardConfig as RewardConfig
    from adhere.reward.reward import Reward as Reward

__version__ = "0.1.0"

_HOMES = {
    "adhere.api": ("audit", "bench", "check", "evaluate", "rank", "score", "train"),
    "adhere.console": ("progress_bars",),
    "adhere.data": ("Row",),
    "adhere.errors": ("RunFailed", "UnsupportedModel", "UserError"),
    "adhere.learn.settings": ("TrainConfig",),
    "adhere.measure.settings": ("EvalConfig",),
    "adhere.model.policy": ("Policy",),
    "adhere.model.settings": ("Lora", "Sampling"),
    "adhere.reward.named": ("RewardConfig",),
    "adhere.reward.reward": ("Reward",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adhere' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
