"""A patient line to a server that speaks JSON: bounded, without redirects, with a key that stays where it belongs.

Standard library only. Redirects are not followed and replies are bounded, so that the key goes nowhere else and no
server fills the memory. What may pass (429, 5xx, a broken line, a reply that makes no sense) is tried again with
growing pauses; what will not (a wrong key, an unknown path) is said at once.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from adhere.errors import RunFailed, UserError

T = TypeVar("T")
ATTEMPTS = 5
"""Failures in a row after which a request is given up."""
TIMEOUT = 120.0
"""Seconds without a byte from the server."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts at most, whatever the server asks for."""
MAX_REPLY = 32_000_000
"""Bytes of a reply."""
_PASSING = (408, 425, 429)
_BLAME = re.compile(r"\bonly (one|1)\b|unsupported|not (yet )?(supported|allowed|implemented)", re.IGNORECASE)
"""What a server says that answers 500 to a request which it will never grant (llama.cpp does)."""
_LOCAL = ("localhost", "127.0.0.1", "::1")


class TransientError(Exception):
    """Trouble that may be gone the next time; `wait`: seconds that the server asked for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Refused(UserError):
    """The server will not do what was asked, however often; `status`: the HTTP status it said so with."""

    def __init__(self, said: str, status: int, *, where: str, fix: str) -> None:
        super().__init__(said, where=where, fix=fix)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class JsonClient:
    """A server at `url`; the bearer token is read from the environment variable `key`, where that is set.

    `pause`: seconds before the second attempt; they double from there. Raises `UserError`: no such address, or a key
    that would go over the net in clear.
    """

    def __init__(self, url: str, key: str, *, pause: float = 1.0) -> None:
        self.url = url.rstrip("/")
        self.pause, self._key = pause, key
        self._headers = {"Content-Type": "application/json", "User-Agent": "adhere"}
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment:
            raise UserError("is no address of a server", where=url, fix="write http://HOST:PORT or https://HOST")
        # What this machine asks itself goes through no proxy, whose owner would read the key.
        direct = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)
        if token := os.environ.get(key, "").strip():
            if not token.isascii() or not token.isprintable():
                raise UserError("holds signs that no key has", where=key, fix="set it anew, or unset it")
            if parts.scheme == "http" and parts.hostname not in _LOCAL:
                raise UserError(
                    f"{key} would go over the net in clear", where=url, fix=f"write https://, or unset {key}"
                )
            self._headers["Authorization"] = f"Bearer {token}"

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON that a POST brings; after as many attempts as are allowed.

        Raises `RunFailed` where it has failed `ATTEMPTS` times in a row, `UserError` where asking again is of no use.
        """
        for attempt in range(ATTEMPTS):
            try:
                return read(self.request(path, body))
            except TransientError as passing:
                trouble = passing
                if attempt + 1 < ATTEMPTS:
                    time.sleep(min(max(self.pause * 2**attempt, passing.wait), LONGEST_PAUSE))
        raise RunFailed(
            f"{trouble} ({ATTEMPTS} attempts)", where=f"{self.url}/{path}", fix="look at the server, and go on later"
        ) from trouble

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers with, asked once; a POST where there is a body.

        Raises `TransientError`, or `Refused` where asking again is of no use.
        """
        where = f"{self.url}/{path}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(urllib.request.Request(where, data, self._headers), timeout=TIMEOUT) as reply:
                text = reply.read(MAX_REPLY + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = f"HTTP {error.code} {_reason(error)}".strip()
                wait = str(error.headers.get("Retry-After", ""))
            if error.code in _PASSING or (error.code >= 500 and error.code != 501 and not _BLAME.search(said)):
                raise TransientError(said, float(wait) if wait.isdecimal() else 0.0) from error
            fix = {401: f"set {self._key}", 403: f"set {self._key}", 404: "check the address and the model's name"}.get(
                error.code
            )
            raise Refused(said, error.code, where=where, fix=fix or "check the request's options") from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"no answer: {getattr(error, 'reason', error) or type(error).__name__}") from error
        if len(text) > MAX_REPLY:
            raise UserError(f"the reply is larger than {MAX_REPLY // 1_000_000} MB", where=where, fix="ask for less")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TransientError(f"the reply is not JSON: {_short(text)!r}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal, in short."""
    try:
        raw = error.read(10_000)
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        reply = json.loads(raw)
        said = reply["error"] if "error" in reply else reply["detail"]
        return str(said["message"] if isinstance(said, dict) else said)[:300]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _short(raw) or error.reason


def _short(raw: bytes) -> str:
    return " ".join(raw[:200].decode("utf-8", "replace").split())
