"""Attention packed into text, a digit or two of base 64 a cell: small enough for a page, exact enough for its figures.

A cell is on a logarithmic scale from `FLOOR` to 1, so that it is right to a share of itself: 0.12 % with two digits,
8 % with one. Below `FLOOR` it is 0. `cells.js` reads it back.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-4
"""The smallest attention that is told from none."""
_ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", dtype=np.uint8)
_CODES = np.full(128, -1, dtype=np.int64)
_CODES[_ALPHABET] = np.arange(64)


def packed(attention: Tensor, digits: int) -> str:
    """`attention` [...] in [0, 1] as `digits` characters a cell, row by row: 0, or from 1 for `FLOOR` to 64^digits − 1
    for 1, logarithmically."""
    values = attention.double().clamp(0, 1).cpu().numpy().ravel()
    top = 64**digits - 2
    steps = np.rint((1 - np.log(np.maximum(values, FLOOR)) / math.log(FLOOR)) * top).astype(np.int64)
    return _written(np.where(values < FLOOR, 0, 1 + steps), digits)


def unpacked(text: str, digits: int, shape: tuple[int, ...]) -> Tensor:
    """What `packed` wrote, float32. Raises `ValueError` for a text that is none such, or of another shape."""
    codes = _CODES[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    if len(codes) != digits * math.prod(shape) or (codes < 0).any():
        raise ValueError(f"attention of {math.prod(shape)} cells was expected")
    steps = codes.reshape(-1, digits) @ 64 ** np.arange(digits - 1, -1, -1)
    values = np.where(steps == 0, 0.0, FLOOR ** (1 - (steps - 1) / (64**digits - 2)))
    return torch.from_numpy(values).float().view(shape)


def packed_places(places: Tensor) -> str:
    """`places` [...] int64, each below 4,096, as two characters each."""
    return _written(places.cpu().numpy().ravel(), 2)


def _written(numbers: np.ndarray, digits: int) -> str:
    powers = 64 ** np.arange(digits - 1, -1, -1)
    return _ALPHABET[numbers[:, None] // powers % 64].tobytes().decode("ascii")
