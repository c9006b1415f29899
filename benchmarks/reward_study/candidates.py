"""The rewards of the study: the named ones, the default without each of its parts, and `attention-v1`, which most of
the study is about, with each part changed, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from adhere.reward.named import NAMED

DEFAULT, V1 = asdict(NAMED["attention"]), asdict(NAMED["attention-v1"])


def changed(weights: Mapping[str, float] | None = None, of: dict[str, Any] = V1, **options: Any) -> dict[str, Any]:
    """`of` with other weights (0 takes a part away) or options."""
    return {**of, **options, "weights": {**of["weights"], **(weights or {})}}


CANDIDATES: dict[str, str | dict[str, Any]] = {
    **{name: name for name in NAMED},
    **{
        f"attention without {name}": changed({name: 0}, DEFAULT)
        for name, weight in DEFAULT["weights"].items()
        if weight
    },
    # each part of attention-v1 taken away
    "without overlap": changed({"overlap": 0}),
    "without comprehensiveness": changed({"comprehensiveness": 0}),
    "without coherence": changed({"coherence": 0}),
    "without the gate": changed(gates=()),
    "policy as scorer": changed(scorer="policy"),
    # each part alone
    "coherence": changed({"overlap": 0, "comprehensiveness": 0}),
    "comprehensiveness": changed({"overlap": 0, "coherence": 0}),
    "grounding": changed({"overlap": 0, "coherence": 0, "comprehensiveness": 0, "grounding": 1}),
    "reliance": changed({"overlap": 0, "coherence": 0, "comprehensiveness": 0, "reliance": 1}),
    "contrast": changed({"overlap": 0, "coherence": 0, "comprehensiveness": 0, "contrast": 1}),
    # other ways to do the same
    "grounding for overlap": changed({"overlap": 0, "grounding": 2}),
    "reliance for comprehensiveness": changed({"comprehensiveness": 0, "reliance": 0.5}),
    "z-scores": changed(normalise="group"),
    "z-scores of grounding and coherence": {
        "weights": {"grounding": 0.5, "coherence": 1.0, "repetition": -1.0},
        "gates": ("ended",),
        "renormalise": True,
    },
    "comprehensiveness 1": changed({"comprehensiveness": 1}),
    "comprehensiveness 1, overlap 1": changed({"comprehensiveness": 1, "overlap": 1}),
    "attended 10 %": changed(ablate=0.1),
    "attended 30 %": changed(ablate=0.3),
    "attended 30 %, shuffled": changed(ablate=0.3, shuffle=True),
}
