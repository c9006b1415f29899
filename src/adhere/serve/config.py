"""The options of the server, apart from it: `--help` needs no web framework."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adhere.errors import UserError


@dataclass(frozen=True)
class ServeConfig:
    """What the server takes."""

    batch_size: int = 64
    """Responses scored at a time."""
    queue_size: int = 2048
    """Responses that may wait; a request past that gets 429."""
    max_tokens: int = 8192
    """Tokens of a prompt and a response, at most."""
    max_body: int = 4_000_000
    """Bytes of a request, at most."""
    timeout: float = 60.0
    """Seconds that a request may take, waiting included."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "queue_size", "max_tokens", "max_body"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", fix="set it to 1 or above")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UserError(f"timeout is {self.timeout}", fix="set it above 0")
