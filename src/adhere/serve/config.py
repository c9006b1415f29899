"""The options of the server, apart from it: `--help` needs no web framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from adhere.options import Above, AtLeast, Below, check


@dataclass(frozen=True)
class ServeConfig:
    """What the server takes."""

    batch_size: Annotated[int, AtLeast(1)] = 64
    """Responses scored at a time."""
    queue_size: Annotated[int, AtLeast(1)] = 2048
    """Responses that may wait; a request past that gets 429."""
    max_tokens: Annotated[int, AtLeast(1)] = 8192
    """Tokens of a prompt and a response, at most."""
    max_body: Annotated[int, AtLeast(1)] = 4_000_000
    """Bytes of a request, at most."""
    timeout: Annotated[float, Above(0), Below(math.inf)] = 60.0
    """Seconds that a request may take, waiting included."""

    def __post_init__(self) -> None:
        check(self)
