"""What to keep of the attention while a model runs: each accumulator takes one tile and forgets it.

Tiles are cut from the attention of one layer, over sequences and over response rows. Nothing here keeps one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adhere.errors import UserError


@dataclass(frozen=True)
class Tile:
    """Post-softmax attention of some response rows to every key."""

    values: Tensor
    """[b, H, r, S] float32."""
    batch: slice
    """Sequences of the batch."""
    rows: slice
    """Response rows, counted from the first one wanted."""
    columns: slice
    """The keys, of S, that are the prompt."""


class Accumulator(Protocol):
    """Anything that reads tiles one at a time."""

    def wants(self, layer: int) -> bool:
        """Whether the tiles of this layer are needed at all."""
        ...

    def add(self, layer: int, tile: Tile) -> None:
        """Take a tile of layer `layer`."""
        ...


class WeightedMap:
    """Σ_{l,h} w_{l,h} a^{(l,h)}: the prompt attention of every row, `[B, rows, columns]` float32.

    `weights` is `[L, H]` float32 and sums to 1; None weighs every layer and head alike.

    Raises `UserError` when the weights were measured on a model of another shape.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, weights: Tensor | None = None) -> None:
        self._sum = torch.zeros(shape, device=device)
        self._weights = weights
        self._layers: set[int] = set()
        self._heads = 0

    def wants(self, layer: int) -> bool:
        return self._weights is None or layer >= len(self._weights) or bool(self._weights[layer].any())

    def add(self, layer: int, tile: Tile) -> None:
        values = tile.values
        heads = values.shape[1]
        self._layers.add(layer)
        self._heads = heads
        if self._weights is None:
            weights = values.new_ones(heads)
        elif layer < len(self._weights) and self._weights.shape[1] == heads:
            weights = self._weights[layer].to(values)
        else:
            raise UserError(
                f"head weights are {list(self._weights.shape)}, but layer {layer} of the model has {heads} heads",
                fix="measure the head weights on this very model",
            )
        # Over all keys and cut afterwards: the product wants the tile in one piece, and the prompt is most of it.
        mixed = torch.matmul(weights, values.flatten(2)).view(len(values), *values.shape[2:])
        self._sum[tile.batch, tile.rows] += mixed[..., tile.columns]

    def result(self) -> Tensor:
        """`[B, rows, columns]` float32."""
        return self._sum / (len(self._layers) * self._heads) if self._weights is None else self._sum


class CopyHits:
    """How often the prompt position that a head attends to most is one that the row copies (Σ over `counted` rows).

    `copied` [B, rows, columns] bool: the positions that count as a hit; `counted` [B, rows] bool.
    """

    def __init__(self, copied: Tensor, counted: Tensor) -> None:
        self._copied, self._counted = copied, counted
        self._hits: dict[int, Tensor] = {}

    def wants(self, layer: int) -> bool:
        return True

    def add(self, layer: int, tile: Tile) -> None:
        best = tile.values[..., tile.columns].argmax(-1)  # [b, H, r]
        copied = self._copied[tile.batch, None, tile.rows].expand(-1, best.shape[1], -1, -1)
        hit = copied.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        counted = hit & self._counted[tile.batch, None, tile.rows]
        self._hits[layer] = self._hits.get(layer, 0) + counted.sum((0, 2))

    def result(self) -> Tensor:
        """`[L, H]` int64."""
        return torch.stack([self._hits[layer] for layer in sorted(self._hits)])


class HeadMass:
    """Σ_i s_i a[t, i] of each head, the mean over the response tokens t.

    `salience` [B, columns] float32, `counted` [B, rows] bool.
    """

    def __init__(self, salience: Tensor, counted: Tensor) -> None:
        self._salience, self._counted = salience, counted
        self._mass: dict[int, Tensor] = {}

    def wants(self, layer: int) -> bool:
        return True

    def add(self, layer: int, tile: Tile) -> None:
        mass = torch.einsum("bhrp,bp->bhr", tile.values[..., tile.columns], self._salience[tile.batch])
        if layer not in self._mass:
            self._mass[layer] = mass.new_zeros(len(self._salience), mass.shape[1])
        self._mass[layer][tile.batch] += (mass * self._counted[tile.batch, None, tile.rows]).sum(-1)

    def result(self) -> Tensor:
        """`[B, L, H]` float32."""
        total = torch.stack([self._mass[layer] for layer in sorted(self._mass)], dim=1)
        return total / self._counted.sum(-1).clamp(min=1)[:, None, None]


class Strongest:
    """Of every head and row, the `count` prompt positions that are attended to most; fewer where fewer are `counted`.

    `counted` [B, columns] bool: positions that take part; `heads` [L, H] bool: heads that are kept.
    """

    def __init__(self, counted: Tensor, count: int, heads: Tensor) -> None:
        self._counted, self._count = counted, max(1, min(count, int(counted.sum(-1).max())))
        self._heads = heads
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def wants(self, layer: int) -> bool:
        return bool(self._heads[layer].any())

    def add(self, layer: int, tile: Tile) -> None:
        values = tile.values[..., tile.columns][:, self._heads[layer].to(tile.values.device)]
        counted = self._counted[tile.batch, None, None]
        found = values.masked_fill(~counted, 0.0).topk(self._count, -1)
        self._found.setdefault(layer, []).append((found.indices.cpu(), found.values.cpu()))

    def result(self) -> tuple[Tensor, Tensor]:
        """Positions (int64) and the attention to them (float32), best first: `[B, n, rows, count]`, n kept heads in
        the order of `heads`. For one sequence, whose tiles are parts of its rows."""
        layers = [self._found[layer] for layer in sorted(self._found)]
        places, values = (
            torch.cat([torch.cat([tile[part] for tile in tiles], dim=2) for tiles in layers], dim=1) for part in (0, 1)
        )
        return places, values
