"""The embedded task and its two small base models: everything adhere needs to show itself offline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adhere.model.embedded import EMBEDDED
from adhere.toy.stories import KINDS, Partition, Split, make_rows, paraphrases

Kind = Literal["causal", "encdec"]


def model_path(kind: Kind) -> Path:
    """The folder of an embedded base model: `causal` (Llama type) or `encdec` (T5 type). Wherever a model is named,
    `toy-causal` and `toy-encdec` stand for them."""
    return Path(EMBEDDED[f"toy-{kind}"])


__all__ = ["KINDS", "Kind", "Partition", "Split", "make_rows", "model_path", "paraphrases"]
