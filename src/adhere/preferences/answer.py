"""A local page that asks which of two responses is better: one pair at a time, answered by key, written at once.

Bound to 127.0.0.1; every request must carry the token of the page's address, so that no other page can answer.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from adhere.data import read_rows
from adhere.errors import UserError
from adhere.files import append_jsonl
from adhere.markup import document, escape
from adhere.resume import truncate_jsonl

BUTTONS = {"a": "A is better", "b": "B is better", "tie": "No difference", "undo": "Undo"}
TITLE = "Which is better? · adhere"
BODY_LIMIT = 1000
"""Bytes of an answer; the largest that the page sends has forty."""


def _key(prompt: Any, *responses: Any) -> tuple[Any, frozenset[Any]]:
    """What is compared, whichever response was the better one."""
    return prompt, frozenset(responses)


@dataclass
class Session:
    """The pairs, and the answers so far; the output file is the only state."""

    pairs: list[dict[str, Any]]
    output: Path
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, source: str, output: Path) -> Session:
        """Go on where the output file ends. Raises `UserError`: rows that are no pairs, answers to other pairs."""
        pairs = []
        for row in read_rows(source):
            pair = {"prompt": row.prompt, **{name: row.fields.get(name) for name in ("response_a", "response_b")}}
            if not all(isinstance(pair[name], str) for name in ("response_a", "response_b")):
                raise UserError("no `response_a` and `response_b`", where=row.where, fix="adhere calibrate --suggest N")
            pairs.append(pair)
        answered = read_rows(output) if output.exists() and output.stat().st_size else []
        if [_key(row.prompt, row.chosen, row.rejected) for row in answered] != [
            _key(*pair.values()) for pair in pairs[: len(answered)]
        ]:
            raise UserError("holds answers to other pairs", where=str(output), fix="choose another --output")
        truncate_jsonl(output)  # gives a last line without its end one: the next answer is a line of its own
        return cls(pairs, output, len(answered))

    @property
    def left(self) -> int:
        return len(self.pairs) - self.done

    def answer(self, number: int, choice: str) -> bool:
        """Write the answer to pair `number`; False where that is not the next one."""
        with self.lock:
            if number != self.done or number >= len(self.pairs):
                return False
            pair = self.pairs[number]
            better, worse = ("response_b", "response_a") if choice == "b" else ("response_a", "response_b")
            row = {"prompt": pair["prompt"], "chosen": pair[better], "rejected": pair[worse]}
            append_jsonl(self.output, {**row, "tie": True} if choice == "tie" else row)
            self.done += 1
            return True

    def undo(self) -> bool:
        """Take the last answer back; False where there is none."""
        with self.lock:
            if self.done == 0:
                return False
            seen = iter(range(self.done))
            truncate_jsonl(self.output, lambda _row: next(seen) < self.done - 1)
            self.done -= 1
            return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, session: Session, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.session, self.token, self.over = session, secrets.token_urlsafe(16), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}"

    def wait(self) -> None:
        """Until every pair is answered, or Ctrl-C."""
        try:
            while not self.over.wait(0.2):
                pass
        except KeyboardInterrupt:
            return


@contextmanager
def serve(session: Session, port: int = 0) -> Iterator[_Server]:
    """A server for `session` in a thread, as long as the block runs. Raises `UserError` for a port that is taken."""
    try:
        server = _Server(session, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({error})", fix="choose another --port, or leave it out"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        if self._admitted(""):
            self._send(HTTPStatus.OK, _page(self.server.session), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._admitted("/answer"):
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > BODY_LIMIT:
            return self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too large")
        try:
            body = json.loads(self.rfile.read(int(length)))
            number, choice = body["number"], body["choice"]
        except (ValueError, KeyError, TypeError, RecursionError):  # the last: a thousand brackets
            return self._send(HTTPStatus.BAD_REQUEST, 'send {"number": 0, "choice": "a"}')
        if not isinstance(choice, str) or choice not in BUTTONS or type(number) is not int:
            return self._send(HTTPStatus.BAD_REQUEST, "choice: a, b, tie or undo; number: a whole number")
        session = self.server.session
        done = session.undo() if choice == "undo" else session.answer(number, choice)
        self._send(HTTPStatus.OK if done else HTTPStatus.CONFLICT, "ok" if done else "not the next pair")
        if session.left == 0:
            self.server.over.set()

    def _admitted(self, rest: str) -> bool:
        """Only the page's own address, asked of this machine by that name: no other page can read or answer."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host in ("127.0.0.1", "localhost") and secrets.compare_digest(
            self.path.encode(), f"/{self.server.token}{rest}".encode()
        ):
            return True
        self._send(HTTPStatus.FORBIDDEN, "no")
        return False

    def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal belongs to the command."""


def _page(session: Session) -> str:
    """The next pair as a page; when all are answered, a word of thanks."""
    if session.left == 0:
        return document(TITLE, "<h1>All pairs are answered</h1><p>Thank you. You can close this page.</p>")
    pair = session.pairs[session.done]
    prompt = (
        pair["prompt"]
        if isinstance(pair["prompt"], str)
        else "\n\n".join(f"{message['role']}: {message['content']}" for message in pair["prompt"])
    )
    sides = "".join(_side(name, pair[f"response_{name}"]) for name in ("a", "b"))
    buttons = "".join(
        f'<button data-choice="{choice}">{label} <kbd>{choice[0]}</kbd></button> ' for choice, label in BUTTONS.items()
    )
    nonce = secrets.token_urlsafe(12)
    script = resources.files("adhere.preferences").joinpath("answer.js").read_text(encoding="utf-8")
    body = (
        f'<h1>Which response is better?</h1><p class="lead">Pair {session.done + 1} of {len(session.pairs)}</p>'
        f'<div class="card sample"><p class="text">{escape(prompt)}</p><div class="sides">{sides}</div></div>'
        f'<p data-number="{session.done}">{buttons}</p>\n<script nonce="{nonce}">\n{script}</script>'
    )
    return document(TITLE, body, nonce, posts=True)


def _side(name: str, response: str) -> str:
    return f'<div class="side"><small>{name.upper()}</small><p class="text">{escape(response)}</p></div>'
