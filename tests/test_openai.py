"""Candidates from a server, against a real one on this machine: what is sent, what comes back, how it fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adhere.cli import main
from adhere.errors import RunFailed, UserError
from adhere.integrations import http, openai
from adhere.integrations.http import ATTEMPTS, JsonClient, TransientError
from adhere.integrations.openai import Server
from adhere.model.settings import Sampling
from adhere.toy import model_path

CHAT = [{"role": "user", "content": "where ?"}]
Reply = Callable[["Desk"], None]


class Desk(BaseHTTPRequestHandler):
    """Notes each request and lets the test's `replies` answer, the last one again and again."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer()

    def do_GET(self) -> None:
        self.body = None
        self.answer()

    def answer(self) -> None:
        with self.server.lock:
            self.server.seen.append((self.path, self.body, dict(self.headers)))
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        reply(self)

    def send(self, code: int, content: bytes | object, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def choices(desk: Desk, count: int | None = None) -> None:
    """As many as asked (or `count`), each named after its prompt and place; the second was cut."""
    chat, body = "chat" in desk.path, desk.body
    asked = body["messages"][-1]["content"] if chat else body["prompt"]
    found = []
    for n in range(body["n"] if count is None else count):
        text = f"{asked} {body['seed']} {n}"
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        found.append({**content, "index": n, "finish_reason": "length" if n == 1 else "stop"})
    desk.send(200, {"choices": found})


def failing(code: int, content: bytes | object = b"", headers: dict[str, str] | None = None) -> Reply:
    return lambda desk: desk.send(code, content, headers)


def hang_up(desk: Desk) -> None:
    desk.close_connection = True
    desk.connection.close()


def broken_off(desk: Desk) -> None:
    desk.send_response(200)
    desk.send_header("Content-Length", "1000")
    desk.end_headers()
    desk.wfile.write(b'{"choices": [')
    desk.close_connection = True


@contextmanager
def serving(*replies: Reply) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Desk)
    server.handle_error = lambda *_: None
    server.replies, server.seen, server.lock = list(replies), [], threading.Lock()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def client(server: ThreadingHTTPServer) -> Server:
    return Server(url(server), "m", pause=0.001)


def test_plain_prompts_and_chats_go_to_their_own_address_with_the_options(monkeypatch):
    monkeypatch.setenv(openai.KEY, "secret")
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=5)
    with serving(choices) as server:
        found = Server(url(server) + "/v1/", "m").complete(["where ?", CHAT], 3, sampling, 7)
    assert found == [
        [("where ? 7 0", True), ("where ? 7 1", False), ("where ? 7 2", True)],
        [("where ? 8 0", True), ("where ? 8 1", False), ("where ? 8 2", True)],
    ]
    seen = {path: (body, headers) for path, body, headers in server.seen}
    options = {"model": "m", "n": 3, "temperature": 0.7, "top_p": 0.9, "max_tokens": 5}
    assert seen["/v1/completions"][0] == {**options, "prompt": "where ?", "seed": 7}
    assert seen["/v1/chat/completions"][0] == {**options, "messages": CHAT, "seed": 8}
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in seen.values())


def test_many_prompts_come_back_in_order_and_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv(openai.KEY, raising=False)
    prompts = [f"p{i}" for i in range(12)]
    with serving(choices) as server:
        found = client(server).complete(prompts, 1, Sampling(), 0)
    assert [texts[0][0].split()[0] for texts in found] == prompts
    assert all("Authorization" not in headers for _, _, headers in server.seen)


def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest_with_other_seeds():
    with serving(lambda desk: choices(desk, 1)) as server:
        found = client(server).complete(["a"], 3, Sampling(), 0)
    assert [body["n"] for _, body, _ in server.seen] == [3, 2, 1]
    assert len({text for text, _ in found[0]}) == 3


def test_more_choices_than_asked_for_are_cut():
    with serving(lambda desk: choices(desk, 5)) as server:
        assert len(client(server).complete(["a"], 2, Sampling(), 0)[0]) == 2


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (failing(429, {"error": {"message": "slow down"}}), "HTTP 429 slow down"),
        (failing(500, b"<html>oops</html>"), "HTTP 500 <html>oops</html>"),
        (failing(503), "HTTP 503"),
        (failing(200, b"<html>"), "the reply is not JSON: '<html>'"),
        (failing(200, b"[" * 100_000), "the reply is not JSON"),
        (failing(200, {"choices": []}), "no choice with a text"),
        (failing(200, {"choices": [{"text": "a"}]}), "no choice with a text"),
        (failing(200, {"choices": [{"text": None, "finish_reason": "stop"}]}), "no choice with a text"),
        (failing(200, {"choices": [{"text": "", "finish_reason": "length"}]}), "no choice with a text"),
        (failing(200, {"choices": [{"text": "\ud800", "finish_reason": "stop"}]}), "no choice with a text"),
        (failing(200, ["choices"]), "no choice with a text"),
        (hang_up, "no answer"),
        (broken_off, "the reply is not JSON"),
    ],
)
def test_trouble_that_may_pass_is_tried_again_and_told_when_it_stays(trouble, message):
    with serving(trouble, trouble, choices) as server:
        assert client(server).complete(["a"], 1, Sampling(), 0) == [[("a 0 0", True)]]
        assert len(server.seen) == 3
    with serving(trouble) as server:
        with pytest.raises(RunFailed) as raised:
            client(server).complete(["a"], 1, Sampling(), 0)
        assert len(server.seen) == ATTEMPTS
    assert message in str(raised.value) and f"({ATTEMPTS} attempts)" in str(raised.value)
    assert url(server) in str(raised.value)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (failing(401, {"error": {"message": "bad key"}}), "HTTP 401 bad key; set OPENAI_API_KEY"),
        (failing(404, {"error": "no such model"}), "HTTP 404 no such model; check the address and the model's name"),
        (failing(400, {"error": {"message": "n too large"}}), "HTTP 400 n too large"),
        (failing(302, b"", {"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    ],
)
def test_a_refusal_is_told_at_once(refusal, message):
    with serving(refusal) as server:
        with pytest.raises(UserError) as raised:
            client(server).complete(["a"], 1, Sampling(), 0)
        assert raised.value.exit_code == 2 and message in str(raised.value) and len(server.seen) == 1


def test_a_pause_that_the_server_asks_for_is_kept_within_bounds(monkeypatch):
    pauses = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    with serving(
        failing(429, b"", {"Retry-After": "7"}), failing(429, b"", {"Retry-After": "86400"}), choices
    ) as server:
        client(server).complete(["a"], 1, Sampling(), 0)
    assert pauses == [7.0, http.LONGEST_PAUSE]


def test_a_reply_without_end_is_not_read(monkeypatch):
    monkeypatch.setattr(http, "MAX_REPLY", 1000)
    with serving(failing(200, b" " * 2000)) as server, pytest.raises(UserError, match="the reply is larger"):
        client(server).complete(["a"], 1, Sampling(), 0)


def test_the_only_model_of_a_server_is_asked_without_being_named():
    with serving(failing(200, {"data": [{"id": "one"}]}), choices) as server:
        asked = Server(url(server))
        asked.complete(["a"], 1, Sampling(), 0)
    assert server.seen[0][0] == "/v1/models" and server.seen[1][1]["model"] == "one"
    for content, message in (
        ({"data": [{"id": "one"}, {"id": "two"}]}, "has 2 models"),
        ({"models": []}, "does not say which models"),
    ):
        with serving(failing(200, content)) as server, pytest.raises(UserError, match=message) as raised:
            Server(url(server))
        assert "--server-model" in str(raised.value)


def test_nobody_there_is_one_line():
    with serving(choices) as server:
        gone = url(server)
    with pytest.raises(RunFailed, match=r"no answer.*start the server"):
        Server(gone)


@pytest.mark.parametrize(
    "address", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?b=c", "file:///etc"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="is no address of a server"):
        Server(address, "m")


def test_the_key_never_goes_over_the_net_in_clear(monkeypatch):
    monkeypatch.setenv(openai.KEY, "secret")
    with pytest.raises(UserError, match="in clear") as raised:
        Server("http://example.com:8000", "m")
    assert "secret" not in str(raised.value)
    Server("https://example.com", "m")
    monkeypatch.setenv(openai.KEY, "a\nb")
    with pytest.raises(UserError, match="no key has"):
        Server("https://example.com", "m")


def test_what_this_machine_asks_itself_goes_through_no_proxy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv(openai.KEY, "secret")
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(TransientError, match=r"no answer: .*refused"):
                JsonClient(f"http://{host}:9", openai.KEY).request("v1/models")
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_top_k_is_not_in_the_protocol():
    with pytest.raises(UserError, match="top_k"):
        Server("http://127.0.0.1:1", "m").complete(["a"], 1, Sampling(top_k=5), 0)


def saying(*found: object) -> Reply:
    """A server that answers with these choices, whatever it is asked."""
    return failing(200, {"choices": list(found)})


def finished(reason: object, text: str = "garden") -> dict[str, object]:
    return {"text": text, "finish_reason": reason}


@pytest.mark.parametrize(
    ("reason", "ended"),
    [
        ("stop", True),
        ("eos", True),
        ("eos_token", True),  # TGI
        ("stop_sequence", True),
        ("end_turn", True),  # Anthropic
        ("eosFound", True),  # LM Studio
        ("COMPLETE", True),  # Cohere
        ("STOP", True),  # Gemini
        ("FinishReason.STOP", True),
        ("FINISH_REASON_STOP", True),
        ("tool_calls", True),
        ("length", False),
        ("max_tokens", False),
        ("MAX_TOKENS", False),
        ("FinishReason.MAX_TOKENS", False),
        ("maxPredictedTokensReached", False),
        ("model_length", False),  # Mistral
        ("model_context_window_exceeded", False),
        ({"type": "length", "length": 16}, False),  # SGLang
    ],
)
def test_only_what_ran_into_a_limit_was_cut_off(reason, ended):
    told = []
    with serving(saying(finished(reason))) as server:
        found = Server(url(server), "m", warn=told.append).complete(["a"], 1, Sampling(), 0)
    assert found == [[("garden", ended)]] and told == []


def test_an_unknown_finish_reason_counts_as_an_end_and_is_told_once():
    told = []
    with serving(saying(finished("because"), finished("because"), finished(None))) as server:
        asked = Server(url(server), "m", warn=told.append)
        assert asked.complete(["a", "b"], 3, Sampling(), 0) == [[("garden", True)] * 3] * 2
    assert len(told) == 2 and "'because', which is not known here" in told[0] and "'null'" in told[1]
    with serving(saying(finished("because"))) as server, pytest.warns(UserWarning, match="'because'"):
        client(server).complete(["a"], 1, Sampling(), 0)


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "error", "abort", "refusal", "guardrail_intervened"])
def test_what_was_filtered_or_broken_off_is_no_response_and_others_are_asked_for(reason):
    with serving(saying(finished(reason), finished("stop")), saying(finished(reason)), choices) as server:
        found = client(server).complete(["a"], 2, Sampling(), 0)
    assert found == [[("garden", True), ("a 2000006 0", True)]]
    seeds = [body["seed"] for _, body, _ in server.seen]
    assert [body["n"] for _, body, _ in server.seen] == [2, 1, 1] and len(set(seeds)) == 3
    with serving(saying(finished(reason))) as server, pytest.raises(RunFailed) as raised:
        client(server).complete(["where  is mary ?"], 1, Sampling(), 0)
    assert len(server.seen) == ATTEMPTS
    assert f"no usable response to 'where is mary ?' in {ATTEMPTS} replies (5 × finish_reason {reason})" in str(raised)


def message(content: object, reason: str = "stop", **others: object) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": content, **others}, "finish_reason": reason}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (message("garden", reasoning_content="Mary went …"), ("garden", True)),
        (message([{"type": "text", "text": "the "}, {"type": "text", "text": "garden"}]), ("the garden", True)),
        (message([{"type": "output_text", "text": "garden"}], "length"), ("garden", False)),
        (message([{"type": "reasoning", "text": "Mary …"}, {"type": "thinking", "thinking": "…"},
                  {"type": "refusal", "refusal": "no"}, {"type": "text", "text": "garden"}]), ("garden", True)),
        (message(None), ("", True)),
        (message(""), ("", True)),
        (message([]), ("", True)),
        (message("garden", "tool_calls", tool_calls=[{"id": "1"}]), ("garden", True)),
    ],
)  # fmt: skip
def test_the_text_of_a_message_in_each_form(choice, expected):
    with serving(saying(choice)) as server:
        assert client(server).complete([CHAT], 1, Sampling(), 0) == [[expected]]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (message(None, "length", reasoning_content="Mary went …"), "thinking without an answer, finish_reason length"),
        (message("", "stop", reasoning="Mary went …"), "thinking without an answer, finish_reason stop"),
        (message(None, "tool_calls", tool_calls=[{"id": "1"}]), "a tool call, finish_reason tool_calls"),
        (message(None, "stop", refusal="I cannot"), "a refusal, finish_reason stop"),
        (message([{"type": "reasoning", "text": "…"}], "content_filter"), "finish_reason content_filter"),
    ],
)
def test_a_message_without_a_text_says_what_it_holds_instead(choice, told):
    with serving(saying(choice)) as server, pytest.raises(RunFailed) as raised:
        client(server).complete([CHAT], 1, Sampling(), 0)
    assert f"no usable response to 'where ?' in {ATTEMPTS} replies ({ATTEMPTS} × {told}); raise --max-new" in str(
        raised
    )


@pytest.mark.parametrize(
    "content", [{"choices": None}, {"choices": [None, 3]}, {"choices": [{"finish_reason": "stop"}]}]
)
def test_choices_of_no_known_form_are_trouble_that_may_pass(content):
    with serving(failing(200, content), choices) as server:
        assert client(server).complete(["a"], 1, Sampling(), 0) == [[("a 0 0", True)]]


def test_an_error_in_a_reply_that_says_200_is_told():
    with serving(failing(200, {"error": {"message": "overloaded"}})) as server, pytest.raises(RunFailed) as raised:
        client(server).complete(["a"], 1, Sampling(), 0)
    assert "no choice with a text and a finish_reason ({'message': 'overloaded'})" in str(raised)


def refusing(option: str, code: int, content: object, least: int = 1) -> Reply:
    """Refuses every request with `option` above `least`."""

    def reply(desk: Desk) -> None:
        if desk.body.get(option, -2) > least:
            desk.send(code, content)
        else:
            text = f"text {len(desk.server.seen)}"
            desk.send(200, {"choices": [{"text": text, "finish_reason": "stop"}]})

    return reply


@pytest.mark.parametrize(
    ("code", "content"),
    [
        (400, {"error": {"message": "'n' : number must be at most 1", "param": "n"}}),  # Groq
        (400, {"error": {"message": "Send separate requests instead."}}),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "Input should be 1"}]}),
        (500, {"error": {"code": 500, "message": "Only one completion choice is allowed", "type": "server_error"}}),
        (501, {"error": "not implemented"}),
    ],
)
def test_a_server_that_refuses_several_choices_is_asked_one_by_one(code, content):
    with serving(refusing("n", code, content)) as server:
        asked = client(server)
        found = asked.complete(["a"], 3, Sampling(), 0)
        assert len({text for text, _ in found[0]}) == 3
        assert [body["n"] for _, body, _ in server.seen] == [3, 1, 1, 1]
        asked.complete(["b"], 2, Sampling(), 0)  # what it refused is not asked for again
        assert [body["n"] for _, body, _ in server.seen[4:]] == [1, 1]


def test_options_that_a_server_refuses_by_name_are_left_out():
    told = []
    with serving(refusing("n", 422, {"message": "extra_forbidden"}, 0)) as server:
        assert len(Server(url(server), "m", warn=told.append).complete(["a"], 2, Sampling(), 0)[0]) == 2
    assert [body.get("n") for _, body, _ in server.seen] == [2, 1, None, None] and not told
    seedless = {"detail": [{"loc": ["body", "seed"], "type": "extra_forbidden"}]}
    with serving(refusing("seed", 422, seedless, -1)) as server:
        assert len(Server(url(server), "m", warn=told.append).complete(["a"], 2, Sampling(), 0)[0]) == 2
    assert ["seed" in body for _, body, _ in server.seen] == [True, False, False]
    assert len(told) == 1 and "takes no seed" in told[0]
    renamed = {"error": {"message": "'max_tokens' is not supported. Use 'max_completion_tokens' instead."}}
    with serving(refusing("max_tokens", 400, renamed)) as server:
        client(server).complete(["a"], 1, Sampling(max_new_tokens=7), 0)
    assert server.seen[-1][1]["max_completion_tokens"] == 7 and "max_tokens" not in server.seen[-1][1]


def test_a_refusal_that_stays_when_asked_for_less_is_told():
    with serving(failing(400, {"error": {"message": "the prompt is too long"}})) as server:
        with pytest.raises(UserError, match="HTTP 400 the prompt is too long"):
            client(server).complete(["a"], 4, Sampling(), 0)
        assert len(server.seen) == 3
    with serving(failing(401, {"error": "bad key"})) as server:
        with pytest.raises(UserError, match="set OPENAI_API_KEY"):
            client(server).complete(["a"], 4, Sampling(), 0)
        assert len(server.seen) == 1


@pytest.mark.parametrize("kind", ["causal", "encdec"])
def test_the_best_of_n_does_not_depend_on_how_a_server_spells_the_end(kind, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompt = "mary went to the garden . john is in the office . where is mary ? answer :"
    prompts.write_text(json.dumps({"prompt": prompt}) + "\n")
    said = {}
    for reason in ("stop", "eos_token", "end_turn", "because", "length"):
        texts = [finished(reason, text) for text in ("office", "kitchen", "garden", "hallway")]
        with serving(saying(*texts)) as server:
            options = ["--model", str(model_path(kind)), "--device", "cpu", "--prompts", str(prompts), "--output"]
            served = ["--server", url(server), "--server-model", "m", "--num-samples", "4"]
            assert main(["rank", *options, str(tmp_path / f"{reason}.jsonl"), *served]) == 0
        said[reason] = json.loads((tmp_path / f"{reason}.jsonl").read_text())["reward"]
        assert ("is not known here" in " ".join(capsys.readouterr().err.split())) == (reason == "because")
    assert said["stop"] == said["eos_token"] == said["end_turn"] == said["because"] != said["length"]
