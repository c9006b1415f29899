"""How long a connection may take to send its request, and how many there may be: who only holds a line open makes room.

A connection is idle until its whole request is read. One that stays so is closed after `read_timeout` seconds; where
there are `most` of them, a new one takes the place of the one that has been idle for longest.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded(read_timeout: float, most: int) -> type[H11Protocol]:
    """The HTTP protocol for `uvicorn.Config(http=…)` with these bounds."""

    class Bounded(H11Protocol):
        """uvicorn's own protocol, and a clock."""

        _since: float
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            others = [one for one in self.connections if isinstance(one, Bounded) and one is not self]
            self._wait()
            if len(others) >= most:
                idle = [one for one in others if not one.answering and not one.transport.is_closing()]
                min(idle, key=lambda one: one._since, default=self).transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._clock is not None:
                self._clock.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        @property
        def answering(self) -> bool:
            """Whether a whole request is there, and no whole answer yet."""
            cycle: Any = self.cycle
            return cycle is not None and not cycle.more_body and not cycle.response_complete

        def _wait(self) -> None:
            """From now on a request is waited for."""
            self._since = self.loop.time()
            if self._clock is not None:
                self._clock.cancel()
            self._clock = self.loop.call_later(read_timeout, self._over)

        def _over(self) -> None:
            if self.answering:
                self._clock = self.loop.call_later(read_timeout, self._over)
            else:
                self.transport.abort()

    return Bounded
