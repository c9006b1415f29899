"""The options of the server, apart from it: `--help` needs no web framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from adhere.options import Above, AtLeast, AtMost, Count, check


@dataclass(frozen=True)
class ServeConfig:
    """What the server takes."""

    batch_size: Count = 64
    """Responses scored at a time."""
    queue_size: Count = 2048
    """Responses that may wait; a request past that gets 429."""
    max_tokens: Count = 8192
    """Tokens of a prompt and a response, at most."""
    max_body: Annotated[int, AtLeast(1), AtMost(1_000_000_000)] = 4_000_000
    """Bytes of a request, at most."""
    max_connections: Count = 512
    """Connections at a time; past that, a new one takes the place of the one that has been idle for longest."""
    read_timeout: Annotated[float, Above(0), AtMost(86_400)] = 20.0
    """Seconds that a connection may take to send its request."""
    timeout: Annotated[float, Above(0), AtMost(86_400)] = 60.0
    """Seconds that a request may take, waiting included."""

    def __post_init__(self) -> None:
        check(self)
