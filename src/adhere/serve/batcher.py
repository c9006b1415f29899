"""Dynamic batching: of what waits while the model works, up to half of all that is under way is scored together next,
and the queue has an end.

A unit is one prompt with its responses. It is never split and never joined with another of the same prompt, so what
one client is told does not depend on what others ask.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from adhere.errors import UserError
from adhere.ranking import Group

Figures = dict[str, Any]
Score = Callable[[Sequence[Group]], list[list[Figures]]]
"""Groups → for each, {"reward", "signals"} of every response."""

_MEMORY = 0.8  # how much of the pace known so far stays when a batch has told a new one
_LOG = logging.getLogger(__name__)


class Full(Exception):
    """No room in the queue; `retry_after` seconds are about what the queue takes."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class _Unit:
    group: Group
    answer: asyncio.Future[list[Figures]]
    request: object
    """The same for all that was submitted together."""


class Batcher:
    """Scores groups in one thread, up to `batch_size` responses at a time; at most `queue_size` responses wait."""

    def __init__(
        self, score: Score, batch_size: int, queue_size: int, scored: Callable[[int], None] = lambda _responses: None
    ) -> None:
        self.batch_size, self.queue_size = batch_size, queue_size
        self.waiting = 0
        """Responses in the queue."""
        self._score, self._scored = score, scored
        self._units: deque[_Unit] = deque()
        self._more = asyncio.Event()
        self._seconds_each = 0.0
        self._last = 0  # responses of the batch before
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adhere-score")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to score; within a running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End after the batch in work; who still waits is told."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for unit in self._units:
            unit.answer.cancel()
        self._thread.shutdown()

    async def submit(self, groups: Sequence[Group]) -> list[list[Figures]]:
        """The figures of each response of each group. Raises `Full`, or what scoring raised; cancelled, it leaves the
        queue."""
        count = sum(len(group.responses) for group in groups)
        if self.waiting + count > self.queue_size:
            raise Full(min(60, max(1, math.ceil(self.waiting * self._seconds_each))))
        loop = asyncio.get_running_loop()
        request = object()
        units = [_Unit(group, loop.create_future(), request) for group in groups]
        self._units += units
        self.waiting += count
        self._more.set()
        return list(await asyncio.gather(*(unit.answer for unit in units)))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._more.wait()
            units = self._next()
            if not units:
                continue
            began = time.monotonic()
            try:
                found: list[list[Figures] | Exception] = await loop.run_in_executor(
                    self._thread, self._each, [unit.group for unit in units]
                )
            except asyncio.CancelledError:
                for unit in units:
                    unit.answer.cancel()
                raise
            self._last = count = sum(len(unit.group.responses) for unit in units)
            each = (time.monotonic() - began) / count
            self._seconds_each = _MEMORY * self._seconds_each + (1 - _MEMORY) * each if self._seconds_each else each
            self._scored(count)
            for unit, figures in zip(units, found, strict=True):
                if unit.answer.done():  # its client has gone
                    continue
                if isinstance(figures, Exception):
                    unit.answer.set_exception(figures)
                else:
                    unit.answer.set_result(figures)

    def _next(self) -> list[_Unit]:
        """The units of the next batch, out of the queue; those that nobody waits for any more are dropped."""
        units: list[_Unit] = []
        count = 0
        # Half of what is under way: were all clients served at once, the model would idle while they ask again.
        half = min(self.batch_size, (self.waiting + self._last + 1) // 2)
        while self._units:
            together = units and self._units[0].request is units[-1].request
            if units and count + len(self._units[0].group.responses) > (self.batch_size if together else half):
                break
            unit = self._units.popleft()
            self.waiting -= len(unit.group.responses)
            if not unit.answer.done():
                units.append(unit)
                count += len(unit.group.responses)
        if not self._units:
            self._more.clear()
        return units

    def _each(self, groups: list[Group]) -> list[list[Figures] | Exception]:
        """Figures of each group, or why it has none: one that cannot be scored costs the others nothing but time."""
        try:
            return list(self._score(groups))
        except Exception as error:
            if len(groups) == 1:
                if not isinstance(error, UserError):
                    _LOG.exception("scoring failed")
                return [error]
            return [self._each([group])[0] for group in groups]
