"""The embedded task and its two small base models: everything adhere needs to show itself offline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adhere.toy.stories import KINDS, Partition, Split, make_rows, paraphrases

Kind = Literal["causal", "encdec"]


def model_path(kind: Kind) -> Path:
    """The folder of an embedded base model: `causal` (Llama type) or `encdec` (T5 type)."""
    return Path(__file__).parent / kind


__all__ = ["KINDS", "Kind", "Partition", "Split", "make_rows", "model_path", "paraphrases"]
