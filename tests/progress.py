"""A `Progress` that remembers which loops ran, within which, and how far each came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from adhere.progress import one

T = TypeVar("T")


class Seen:
    """Loops in the order in which they began."""

    def __init__(self) -> None:
        self.loops: list[tuple[int, str, int, list[int]]] = []
        """Depth, title, total, and what was done after each item."""
        self._depth = 0

    def __call__(
        self, items: Iterable[T], title: str, total: int, *, size: Callable[[T], int] = one, done: int = 0
    ) -> Iterator[T]:
        counts: list[int] = []
        self.loops.append((self._depth, title, total, counts))
        self._depth += 1
        try:
            for item in items:
                yield item
                done += size(item)
                counts.append(done)
        finally:
            self._depth -= 1

    def outer(self) -> list[tuple[str, int, list[int]]]:
        """Title, total and counts of the loops that ran within no other."""
        return [(title, total, counts) for depth, title, total, counts in self.loops if depth == 0]

    def titles(self) -> set[str]:
        """Of all loops."""
        return {title for _, title, _, _ in self.loops}
