"""What stands before every request: whose it is, whom it is for, a limit on its body; and what is counted of it, for
Prometheus."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Collection, Sequence

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)
"""What needs no token."""
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:\d+)?")


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
    """Refuses what is not to be read at all, and counts every request: with 421 what is meant for another host, with
    401 what does not bring the `token` (but for `OPEN`), with 413 a body past `max_body` bytes, announced or not.

    `hosts`: the names that a request may call this server by; None = any. A page of another site that has its own name
    resolve to this machine calls it by that name (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        meters: Meters,
        max_body: int,
        paths: Sequence[str],
        token: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.meters, self.max_body, self.paths = app, meters, max_body, frozenset(paths)
        self.token, self.hosts = token, hosts

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

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal(scope, receive, noted)
            else:
                await self.app(scope, limited, noted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.seconds.labels(path).observe(time.monotonic() - began)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """Why the headers alone are enough to refuse a request; None where they are not."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _HOST.fullmatch(headers.get(b"host", ""))
        if self.hosts is not None and (host is None or host["name"].lower() not in self.hosts):
            return JSONResponse({"detail": f"this server answers to {' and '.join(sorted(self.hosts))} alone"}, 421)
        if self.token is not None and scope["path"] not in OPEN:
            scheme, _, sent = headers.get(b"authorization", "").partition(" ")
            known = hmac.compare_digest(sent.strip().encode(), self.token.encode())
            if scheme.lower() != "bearer" or not known:
                refused = {"detail": "a bearer token is needed"}
                return JSONResponse(refused, 401, {"WWW-Authenticate": "Bearer", "Connection": "close"})
        announced = headers.get(b"content-length", "0")
        if announced.isdigit() and int(announced) > self.max_body:
            return JSONResponse({"detail": self._too_large}, 413, {"Connection": "close"})
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body} bytes; send less at a time"
