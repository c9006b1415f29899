"""Attention packed into text, a digit or two of base 64 a cell: small enough for a page, exact enough for its figures.

A cell is on a logarithmic scale from `FLOOR` to 1, so that it is right to a share of itself: 0.12 % with two digits,
8 % with one. Below `FLOOR` it is 0. `cells.js` reads it back.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

FLOOR = 1e-4
"""The smallest attention that is told from none."""
_ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", dtype=np.uint8)


def packed(attention: Tensor, digits: int) -> str:
    """`attention` [...] in [0, 1] as `digits` characters a cell, row by row: 0, or from 1 for `FLOOR` to 64^digits − 1
    for 1, logarithmically."""
    values = attention.double().clamp(0, 1).cpu().numpy().ravel()
    top = 64**digits - 2
    steps = np.rint((1 - np.log(np.maximum(values, FLOOR)) / math.log(FLOOR)) * top).astype(np.int64)
    return _written(np.where(values < FLOOR, 0, 1 + steps), digits)


def packed_places(places: Tensor) -> str:
    """`places` [...] int64, each below 4,096, as two characters each."""
    return _written(places.cpu().numpy().ravel(), 2)


def _written(numbers: np.ndarray, digits: int) -> str:
    powers = 64 ** np.arange(digits - 1, -1, -1)
    return _ALPHABET[numbers[:, None] // powers % 64].tobytes().decode("ascii")
