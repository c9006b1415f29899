"""What stands before every request: a limit on its body; and what is counted of it, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Meters:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self.requests = Counter("adhere_requests", "Requests answered", ["path", "status"], registry=of)
        self.seconds = Histogram("adhere_request_seconds", "From the first byte to the answer", ["path"], registry=of)
        self.responses = Counter("adhere_responses_scored", "Responses scored", registry=of)
        self.waiting = Gauge("adhere_responses_waiting", "Responses in the queue", registry=of)


class Guard:
    """Refuses a body past `max_body` bytes, announced or not, with 413, and counts every request."""

    def __init__(self, app: ASGIApp, meters: Meters, max_body: int, paths: Sequence[str]) -> None:
        self.app, self.meters, self.max_body, self.paths = app, meters, max_body, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, taken = time.monotonic(), 500, 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise HTTPException(413, self._too_large)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        announced = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if announced.isdigit() and int(announced) > self.max_body:
                await JSONResponse({"detail": self._too_large}, 413)(scope, receive, noted)
            else:
                await self.app(scope, limited, noted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.seconds.labels(path).observe(time.monotonic() - began)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body} bytes; send less at a time"
