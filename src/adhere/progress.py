"""How far a loop is. Whatever reports it is an argument: a function that hands on the items of the loop, one by one.

Nothing here displays anything: `adhere.console` does, and `adhere.progress_bars` makes it do so from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


def one(_item: Any) -> int:
    """Each item counts once."""
    return 1


class Progress(Protocol):
    """Hands on `items`, and may show how much of `total` is done: `done` at the start, `size(item)` more after each.

    The work may be what makes the items or what the loop does with them. Loops may be nested.
    """

    def __call__(
        self, items: Iterable[T], title: str, total: int, *, size: Callable[[T], int] = one, done: int = 0
    ) -> Iterator[T]: ...


def silent(items: Iterable[T], title: str, total: int, *, size: Callable[[T], int] = one, done: int = 0) -> Iterator[T]:
    """A `Progress` that shows nothing.

    >>> list(silent("ab", "spelling", 2))
    ['a', 'b']
    """
    return iter(items)


@contextmanager
def phase(progress: Progress, title: str) -> Iterator[None]:
    """Show a piece of work that cannot be counted for as long as the block runs."""
    yield from progress([None], title, 1)
