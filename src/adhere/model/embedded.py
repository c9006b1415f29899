"""The models that come with adhere, by name. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from adhere.errors import UnsupportedModel

_TOY = Path(__file__).parents[1] / "toy"
EMBEDDED = {"toy-causal": str(_TOY / "causal"), "toy-encdec": str(_TOY / "encdec")}
"""Name → folder."""


def located(model: str) -> str:
    """The folder of an embedded model; a folder of your own, even by such a name, and a hub id as they are.

    Raises `UnsupportedModel` for a path where there is no folder."""
    path = Path(model)
    if path.is_dir():
        return model
    if path.exists() or model.startswith((".", "/", "~")):
        raise UnsupportedModel("is not a folder", where=model, fix="give a model folder or a hub id")
    return EMBEDDED.get(model, model)
