"""Candidates from any server that speaks OpenAI's protocol: /v1/chat/completions, /v1/completions for plain prompts.

Standard library only. Redirects are not followed and replies are bounded, so that the key goes nowhere else and no
server fills the memory. What may pass (429, 5xx, a broken line, a reply that makes no sense) is tried again with
growing pauses; what will not (a wrong key, an unknown model) is said at once.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from attune.errors import RunFailed, UserError
from attune.model.encode import Prompt
from attune.model.sampling import Sampling

KEY = "OPENAI_API_KEY"
"""Environment variable of the key; servers without keys need none."""
ATTEMPTS = 5
"""Failures in a row after which a prompt is given up."""
PARALLEL = 4
"""Requests under way at once."""
TIMEOUT = 120.0
"""Seconds without a byte from the server."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts at most, whatever the server asks for."""
MAX_REPLY = 32_000_000
"""Bytes of a reply."""
_PASSING = (408, 425, 429)
_LOCAL = ("localhost", "127.0.0.1", "::1")

Said = tuple[str, bool]
"""A text, and whether it ended by itself rather than at the length limit."""


class _Passing(Exception):
    """Trouble that may be gone the next time; `wait`: seconds that the server asked for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """An OpenAI-compatible server at `url` (with or without /v1) and the model asked there.

    Without `model`, the one that the server has. `pause`: seconds before the second attempt; they double from there.
    Raises `UserError`: no such address, several models to choose from, or a key that would go over the net in clear.
    """

    def __init__(self, url: str, model: str | None = None, *, pause: float = 1.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.pause = pause
        self._opener = urllib.request.build_opener(_Stay)
        self._headers = {"Content-Type": "application/json", "User-Agent": "attune"}
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment:
            raise UserError("is no address of a server", where=url, fix="write http://HOST:PORT or https://HOST")
        if key := os.environ.get(KEY, "").strip():
            if not key.isascii() or not key.isprintable():
                raise UserError("holds signs that no key has", where=KEY, fix="set it anew, or unset it")
            if parts.scheme == "http" and parts.hostname not in _LOCAL:
                raise UserError(
                    f"{KEY} would go over the net in clear", where=url, fix=f"write https://, or unset {KEY}"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        self.model = model or self._only_model()

    def complete(self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling, seed: int) -> list[list[Said]]:
        """`num_samples` completions of each prompt, a few prompts at a time; in the order given.

        Raises `RunFailed` where a prompt has failed `ATTEMPTS` times in a row, `UserError` where asking again is of no
        use. `top_k` is not in the protocol.
        """
        if sampling.top_k:
            raise UserError(f"top_k is {sampling.top_k}, which a server is not asked for", fix="leave it out")
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(
                pool.map(
                    lambda item: self._complete(item[1], num_samples, sampling, (seed + item[0]) % 2**31),
                    enumerate(prompts),
                )
            )

    def _complete(self, prompt: Prompt, count: int, sampling: Sampling, seed: int) -> list[Said]:
        chat = not isinstance(prompt, str)
        path = "chat/completions" if chat else "completions"
        asked = {"messages": [dict(turn) for turn in prompt]} if not isinstance(prompt, str) else {"prompt": prompt}
        found: list[Said] = []
        while len(found) < count:
            # Some servers know no `n` and give one choice: then the rest are asked for, each with a seed of its own.
            body = {
                **asked,
                "model": self.model,
                "n": count - len(found),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": (seed + len(found) * 1_000_003) % 2**31,
            }
            found += self._patiently(path, body, chat)[: count - len(found)]
        return found

    def _patiently(self, path: str, body: Mapping[str, Any], chat: bool) -> list[Said]:
        """One choice at least, after as many attempts as are allowed."""
        for attempt in range(ATTEMPTS):
            try:
                return _choices(self._ask(path, body), chat)
            except _Passing as passing:
                trouble = passing
                if attempt + 1 < ATTEMPTS:
                    time.sleep(min(max(self.pause * 2**attempt, passing.wait), LONGEST_PAUSE))
        raise RunFailed(
            f"{trouble} ({ATTEMPTS} attempts)", where=f"{self.url}/v1/{path}", fix="look at the server, and go on later"
        ) from trouble

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers with; a POST where there is a body."""
        where = f"{self.url}/v1/{path}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(urllib.request.Request(where, data, self._headers), timeout=TIMEOUT) as reply:
                text = reply.read(MAX_REPLY + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = f"HTTP {error.code} {_reason(error)}".strip()
                wait = str(error.headers.get("Retry-After", ""))
            if error.code in _PASSING or error.code >= 500:
                raise _Passing(said, float(wait) if wait.isdecimal() else 0.0) from error
            fix = {401: f"set {KEY}", 403: f"set {KEY}", 404: "check --server and --server-model"}.get(error.code)
            raise UserError(said, where=where, fix=fix or "check the request's options") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"no answer: {getattr(error, 'reason', error) or type(error).__name__}") from error
        if len(text) > MAX_REPLY:
            raise UserError(f"the reply is larger than {MAX_REPLY // 1_000_000} MB", where=where, fix="ask for less")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Passing(f"the reply is not JSON: {_short(text)!r}") from error

    def _only_model(self) -> str:
        where, fix = f"{self.url}/v1/models", "write --server-model NAME"
        try:
            reply = self._ask("models")
        except _Passing as passing:
            raise RunFailed(str(passing), where=where, fix="start the server, or check --server") from passing
        try:
            names = [str(model["id"]) for model in reply["data"]]
        except (LookupError, TypeError) as error:
            raise UserError("the server does not say which models it has", where=where, fix=fix) from error
        if len(names) != 1:
            raise UserError(f"has {len(names)} models ({', '.join(names[:5])} …)", where=where, fix=fix)
        return names[0]


def _choices(reply: Any, chat: bool) -> list[Said]:
    """The texts in a reply; a choice without text or without the reason why it ended is none."""
    found: list[Said] = []
    for choice in reply.get("choices") or [] if isinstance(reply, dict) else []:
        try:
            text = choice["message"]["content"] if chat else choice["text"]
            reason = choice["finish_reason"]
            text.encode("utf-8")
        except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
            continue
        ended = reason == "stop"
        if isinstance(reason, str) and (text or ended):
            found.append((text, ended))
    if not found:
        raise _Passing("the reply holds no choice with a text and a finish_reason")
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal, in short."""
    try:
        raw = error.read(10_000)
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        said = json.loads(raw)["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:300]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _short(raw) or error.reason


def _short(raw: bytes) -> str:
    return " ".join(raw[:200].decode("utf-8", "replace").split())
