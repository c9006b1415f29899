"""The reward over HTTP: the numbers of `Reward.score`, limits, a full queue, clients that hang up, a clean end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from adhere.cli import main
from adhere.data import rows_of
from adhere.errors import UserError
from adhere.model.policy import Policy
from adhere.ranking import Group, score_groups, score_rows
from adhere.reward.heads import save_heads
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.serve.app import create_app
from adhere.serve.batcher import Batcher, Full
from adhere.serve.config import ServeConfig
from adhere.toy import make_rows, model_path

ROWS = make_rows("conflict", "test", 12)
CHAT = "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} {% endfor %}"
PROMPT, ANSWER = ROWS[0]["prompt"], ROWS[0]["answers"][0]


@pytest.fixture(scope="module")
def rewards():
    policy = Policy.load(model_path("causal"), device="cpu")
    return {name: Reward(config_of(name), policy) for name in ("attention", "length")}


@pytest.fixture(scope="module")
def reward(rewards):
    return rewards["attention"]


@contextmanager
def client(reward, token=None, **options):
    """A client of the application, in this process; its lifespan runs."""
    from fastapi.testclient import TestClient

    app = create_app(reward, "embedded", "attention", ServeConfig(**options), token)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found


def items(rows=ROWS, response=None):
    return [{"prompt": row["prompt"], "response": response or row["answers"][0]} for row in rows]


def test_scores_over_http_are_those_of_python(reward):
    sent = [*items(), *items(response="the garden"), {**items()[0], "ended": False}]
    with client(reward) as http:
        answer = http.post("/v1/score", json={"items": sent}).json()
    assert (answer["model"], answer["reward"]) == ("embedded", "attention")
    prompts = [item["prompt"] for item in sent[:-1]]
    offline = reward.score(prompts, [item["response"] for item in sent[:-1]])
    got = [one["reward"] for one in answer["results"]]
    assert got[:-1] == pytest.approx(offline.reward.tolist(), abs=1e-4)
    assert got[-1] < got[0]  # cut off: behind the gate
    for name, values in offline.signals.items():
        assert [one["signals"][name] for one in answer["results"][:-1]] == pytest.approx(values.tolist(), abs=1e-4)


def test_prompts_with_fields_are_those_of_rows_and_bring_evidence(reward):
    story, question = "mary went to the garden . john is in the office .", "where is mary ?"
    documents = ["sandra is in the kitchen .", {"title": "a", "text": story}]
    prompts = [{"context": story, "question": question}, {"documents": documents, "question": question}]
    rows = rows_of([{**prompt, "response": "garden"} for prompt in prompts])
    with client(reward) as http:
        sent = [{"prompt": prompt, "response": "garden"} for prompt in prompts]
        results = http.post("/v1/score", json={"items": sent}).json()["results"]
        asked = {"prompt": prompts[0], "candidates": ["garden", "office"]}
        ranked = http.post("/v1/rank", json=asked).json()["candidates"]
        refused = http.post("/v1/score", json={"items": [{"prompt": {"context": story}, "response": "garden"}]})
    for result, row in zip(results, score_rows(reward, rows), strict=True):
        assert result["reward"] == pytest.approx(row["reward"], abs=1e-4)
        assert [one["span"] for one in result["evidence"]] == [[0, 6]]
        told, expected = (one["evidence"][0]["sources"] for one in (result, row))
        assert [source["span"] for source in told] == [source["span"] for source in expected]
    assert all(one["evidence"][0]["sources"] for one in ranked)
    assert refused.status_code == 422


def test_cut_off_before_the_first_token_is_worse_than_an_answer(reward):
    empty = {"prompt": PROMPT, "response": "", "ended": False}
    with client(reward) as http:
        assert http.post("/v1/score", json={"items": [empty]}).status_code == 200
        nothing, answer = http.post("/v1/score", json={"items": [empty, items()[0]]}).json()["results"]
    assert nothing["reward"] < answer["reward"]


def test_what_one_client_is_told_does_not_depend_on_the_others(reward):
    groups = [Group(row["prompt"], [row["answers"][0], "the garden"], [True, True]) for row in ROWS]
    together = score_groups(reward, [*groups, groups[0]])  # the same prompt twice: two groups
    for group, found in zip([*groups, groups[0]], together, strict=True):
        (alone,) = score_groups(reward, [group])
        assert [one["reward"] for one in found] == pytest.approx([one["reward"] for one in alone], abs=1e-4)


def test_rank_and_rerank_put_the_best_first(reward):
    candidates = ["the garden", ANSWER, "mary mary mary mary"]
    with client(reward) as http:
        ranked = http.post("/v1/rank", json={"prompt": PROMPT, "candidates": candidates}).json()["candidates"]
        asked = {"query": PROMPT, "documents": candidates, "top_n": 2, "return_documents": True, "model": "any"}
        again = http.post("/v1/rerank", json=asked).json()["results"]
    assert [one["reward"] for one in ranked] == sorted((one["reward"] for one in ranked), reverse=True)
    assert sorted(one["index"] for one in ranked) == [0, 1, 2]
    assert all(candidates[one["index"]] == one["response"] for one in ranked)
    assert [one["index"] for one in again] == [one["index"] for one in ranked[:2]]
    assert [one["document"]["text"] for one in again] == [one["response"] for one in ranked[:2]]
    assert [one["relevance_score"] for one in again] == [one["reward"] for one in ranked[:2]]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_may_be_objects_and_come_back_as_they_were_given(reward, path):
    given = [
        "the garden",
        {"text": ANSWER},
        {"title": "a story", "text": ANSWER, "id": 7, "source": {"pages": [1, None]}},
        {"title": None, "text": "office"},
    ]
    texts = ["the garden", ANSWER, f"a story\n{ANSWER}", "office"]
    with client(reward) as http:
        asked = {"query": PROMPT, "documents": given, "return_documents": True, "max_tokens_per_doc": 4096}
        found = http.post(path, json=asked).json()["results"]
        bare = http.post(path, json={**asked, "return_documents": False}).json()["results"]
        ranked = http.post("/v1/rank", json={"prompt": PROMPT, "candidates": texts}).json()["candidates"]
    assert [(one["index"], one["relevance_score"]) for one in found] == [
        (one["index"], one["reward"]) for one in ranked
    ]
    echoed = [{"text": one} if isinstance(one, str) else one for one in given]
    assert [one["document"] for one in found] == [echoed[one["index"]] for one in found]
    assert [one["index"] for one in bare] == [one["index"] for one in found]
    assert all(one["document"] is None for one in bare)


def test_openrlhf_gets_the_reward_of_what_follows_the_prompt(reward):
    end = reward.policy.tokenizer.eos_token
    body = {"query": [f"{PROMPT} {ANSWER} {end}", f"{PROMPT} {ANSWER}"], "prompts": [PROMPT] * 2, "labels": ["", ""]}
    with client(reward) as http:
        answer = http.post("/openrlhf", json=body).json()
        alone = http.post("/openrlhf", json={name: values[:1] for name, values in body.items()}).json()
        wrong = http.post("/openrlhf", json={**body, "prompts": [PROMPT, ROWS[1]["prompt"]]})
        uneven = http.post("/openrlhf", json={**body, "prompts": [PROMPT]})
    assert answer["scores"] == answer["rewards"] and len(answer["rewards"]) == 2
    offline = reward.score([PROMPT], [ANSWER])
    assert answer["rewards"][0] == pytest.approx(float(offline.reward[0]), abs=1e-4)
    assert alone["rewards"][0] == pytest.approx(answer["rewards"][0], abs=1e-4)
    assert answer["rewards"][1] < answer["rewards"][0]  # not ended
    assert answer["extra_logs"]["coherence"][0] == pytest.approx(float(offline.signals["coherence"][0]), abs=1e-4)
    assert (wrong.status_code, uneven.status_code) == (422, 422)
    assert "query[1]: the query does not begin with its prompt" in wrong.json()["detail"]
    assert "2 queries, 1 prompts" in uneven.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/score", b"{", 422, "JSON decode error"),
        ("/v1/score", b'{"items": []}', 422, "items: List should have at least 1 item"),
        (
            "/v1/score",
            b'{"items": [{"prompt": 3, "response": "a"}]}',
            422,
            "items[0].prompt: Input should be a valid string",
        ),
        ("/v1/score", b'{"items": [{"prompt": "  ", "response": "a"}]}', 422, "pattern"),
        ("/v1/score", b'{"items": [{"prompt": "a", "reponse": "a"}]}', 422, "reponse"),
        ("/v1/score", b'{"items": [{"prompt": "\xff", "response": "a"}]}', 400, "parsing the body"),
        ("/v1/score", b"[" * 100_000, 400, "parsing the body"),
        (
            "/v1/score",
            b'{"items": [{"prompt": "\\ud800", "response": "a"}]}',
            422,
            "unable to parse raw data as a unicode string",
        ),
        (
            "/v1/score",
            b'{"items": [{"prompt": "a", "response": "\\ud800"}]}',
            422,
            "half a surrogate pair at character 0",
        ),
        ("/v1/rank", b'{"prompt": "where is mary ?", "candidates": []}', 422, "at least 1 item"),
        ("/v1/rerank", b'{"query": "mary ?", "documents": ["a"], "top_n": 0}', 422, "greater than or equal to 1"),
        ("/v2/rerank", b'{"query": "mary ?", "documents": ["a", {"title": "b"}]}', 422, "documents[1].text: Field req"),
        ("/v2/rerank", b'{"query": "mary ?", "documents": [{"text": 3}]}', 422, "documents[0].text: Input should be"),
        ("/v2/rerank", b'{"query": "mary ?", "documents": [3]}', 422, "documents[0]: Input should be a valid string"),
        (
            "/rerank",
            b'{"query": "mary ?", "documents": [{"text": "a", "x": "\\ud800"}], "return_documents": true}',
            422,
            "documents[0]: Value error, half a surrogate pair",
        ),
        (
            "/rerank",
            b'{"query": "mary ?", "documents": [{"text": "a", "x": NaN}], "return_documents": true}',
            422,
            "documents[0]: Value error, Out of range float",
        ),
        (
            "/rerank",
            b'{"query": "mary ?", "documents": [{"text": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}]}",
            422,
            "documents[0]: Value error, nested deeper than 64",
        ),
        ("/v1/nothing", b"{}", 404, "Not Found"),
    ],
)
def test_bad_requests_are_told_and_the_server_lives(reward, path, body, status, words):
    with client(reward) as http:
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
        assert http.post("/v1/score", json={"items": items()}).status_code == 200


def test_limits_on_body_rows_tokens_and_context(reward):
    with client(reward, max_tokens=60, max_body=200_000) as http:
        many = http.post("/v1/score", json={"items": [{"prompt": "mary", "response": "a"}] * 2000})
        assert many.status_code == 422 and "at most 1024 items" in many.text
        large = http.post("/v1/score", json={"items": [{"prompt": "mary " * 50_000, "response": "a"}]})
        assert large.status_code == 413 and "larger than 200000 bytes" in large.json()["detail"]
        streamed = http.post("/v1/score", content=(b" " * 1000 for _ in range(300)))
        assert streamed.status_code == 413
        long = http.post("/v1/score", json={"items": [*items(ROWS[:1]), {"prompt": "mary " * 70, "response": "a"}]})
        assert long.status_code == 422 and "items[1]: 72 tokens, and 60 are allowed" in long.json()["detail"]
        control = http.post("/v1/score", json={"items": [{"prompt": "mary\x00\x1b[2J ?", "response": "\x07"}]})
        assert control.status_code == 200
    with client(reward) as http:
        context = http.post("/v1/score", json={"items": [{"prompt": "mary " * 5000, "response": "a"}]})
        assert context.status_code == 422 and "context holds" in context.json()["detail"]


def test_ten_thousand_prompts_at_once_are_too_many(reward):
    with client(reward) as http:
        answer = http.post("/v1/score", json={"items": [{"prompt": "mary", "response": "a"}] * 10_000})
        assert answer.status_code == 422
        assert http.get("/health").json() == {"status": "ok", "model": "embedded", "reward": "attention", "waiting": 0}


def test_a_reward_that_compares_refuses_a_response_alone(rewards):
    with client(rewards["length"]) as http:
        alone = http.post("/v1/score", json={"items": items(ROWS[:1])})
        assert alone.status_code == 422 and "items[0]: one response, and this reward compares" in alone.text
        two = http.post("/v1/score", json={"items": [*items(ROWS[:1]), *items(ROWS[:1], "the garden")]})
        assert two.status_code == 200 and sum(one["reward"] for one in two.json()["results"]) == pytest.approx(0)


def test_a_reward_that_depends_on_who_else_asks_is_not_served(reward):
    contrast = Reward(config_of({"weights": {"contrast": 1.0}, "normalise": "none"}), reward.policy)
    with pytest.raises(UserError, match="another client's"):
        create_app(contrast, "m", "contrast", ServeConfig())


def test_a_bearer_token_is_asked_for_everywhere_but_at_health(reward):
    with client(reward, token="sesame") as http:
        for headers in ({}, {"authorization": "Bearer Sesame"}, {"authorization": "Basic c2VzYW1l"}):
            answer = http.post("/v1/score", json={"items": items()}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            for path in ("/metrics", "/docs", "/openapi.json", "/nothing"):
                assert http.get(path, headers=headers).status_code == 401
        assert http.get("/health").status_code == 200
        good = {"authorization": "Bearer sesame"}
        assert http.post("/v1/score", json={"items": items()}, headers=good).status_code == 200
        assert http.get("/openapi.json", headers=good).status_code == 200


def test_a_body_is_not_read_before_the_token(served_with_token):
    host, port = served_with_token.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
        answer = line.recv(4096)  # with not a byte of the body sent
        assert answer.startswith(b"HTTP/1.1 401 ") and b"connection: close" in answer.lower()


def test_a_page_of_another_site_cannot_ask(served):
    _, url = served
    ready(url)
    port = url.rpartition(":")[2]
    for host, status in (("evil.example", 421), ("", 421), (f"LOCALHOST:{port}", 200), (f"[::1]:{port}", 200)):
        assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == status
    body = {"items": items()}
    answer = httpx.post(f"{url}/v1/score", json=body, headers={"Host": f"127.0.0.1.evil.example:{port}"})
    assert answer.status_code == 421 and "this server answers to" in answer.json()["detail"]


def test_the_page_of_the_api_names_every_route_and_asks_no_other_host(reward):
    with client(reward) as http:
        page = http.get("/docs").text
        paths = http.get("/openapi.json").json()["paths"]
    assert re.findall(r'(?:href|src)="([^"]*)"', page) == ["openapi.json"]
    assert "<script" not in page and "default-src 'none'" in page
    assert all(f" {path}</code>" in page for path in paths) and "<b>candidates</b>" in page


def test_idle_connections_make_room_and_end(reward):
    """Three times as many idle connections as there may be, and one that sends its body a byte at a time."""
    with process("--max-connections", "8", "--read-timeout", "2", "--reward", "length") as (_, url):
        ready(url)
        host, port = url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(24)]
        idle[-1].sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        for _ in range(3):
            assert httpx.post(f"{url}/v1/score", json={"items": items()[:1] * 2}, timeout=10).status_code == 200
        began = time.monotonic()
        for line in idle:
            with line, suppress(ConnectionResetError):
                assert line.recv(1) == b""  # closed by the server, without an answer
        assert time.monotonic() - began < 8
        assert ready(url)["status"] == "ok"


def test_metrics_count_requests_and_responses(reward):
    with client(reward) as http:
        http.post("/v1/score", json={"items": items()})
        http.post("/v1/score", content=b"{")
        http.get("/anything/at/all")
        text = http.get("/metrics").text
    assert 'adhere_requests_total{path="/v1/score",status="200"} 1.0' in text
    assert 'adhere_requests_total{path="/v1/score",status="422"} 1.0' in text
    assert 'adhere_requests_total{path="other",status="404"} 1.0' in text
    assert f"adhere_responses_scored_total {len(ROWS)}.0" in text
    assert "adhere_responses_waiting 0.0" in text


def group(number=0, size=1):
    return Group(f"prompt {number}", ["a"] * size, [True] * size)


def gated(batches, gate):
    """A scorer that waits for `gate` and notes what it was given together."""

    def score(groups):
        batches.append([g.prompt for g in groups])
        assert gate.wait(10)
        return [[{"reward": float(len(g.responses))}] * len(g.responses) for g in groups]

    return score


def test_what_waits_is_scored_together_and_the_queue_has_an_end():
    batches, gate = [], threading.Event()

    async def story():
        batcher = Batcher(gated(batches, gate), batch_size=4, queue_size=6)
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit([group(0)]))]
        while not batches:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher.submit([group(n)])) for n in range(1, 4)]
        tasks.append(asyncio.create_task(batcher.submit([group(4, size=2)])))
        await asyncio.sleep(0.01)
        assert batcher.waiting == 5
        with pytest.raises(Full) as full:
            await batcher.submit([group(5, size=2)])
        assert 1 <= full.value.retry_after <= 60
        gate.set()
        found = await asyncio.gather(*tasks)
        await batcher.stop()
        return found

    found = asyncio.run(story())
    assert [len(answer[0]) for answer in found] == [1, 1, 1, 1, 2]
    # three of one response each; with the next one's two there would be five
    assert batches == [["prompt 0"], ["prompt 1", "prompt 2", "prompt 3"], ["prompt 4"]]


def test_a_client_that_leaves_takes_its_place_in_the_queue_with_it():
    batches, gate = [], threading.Event()

    async def story():
        batcher = Batcher(gated(batches, gate), batch_size=4, queue_size=6)
        batcher.start()
        first = asyncio.create_task(batcher.submit([group(0)]))
        while not batches:
            await asyncio.sleep(0.001)
        leaving, staying = (asyncio.create_task(batcher.submit([group(n)])) for n in (1, 2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, staying)
        await batcher.stop()

    asyncio.run(story())
    assert batches == [["prompt 0"], ["prompt 2"]]


def test_a_group_that_cannot_be_scored_fails_alone():
    def score(groups):
        if any(g.prompt == "prompt 1" for g in groups):
            raise UserError("no")
        return [[{"reward": 1.0}] for _ in groups]

    async def story():
        batcher = Batcher(score, batch_size=8, queue_size=8)
        tasks = [asyncio.create_task(batcher.submit([group(n)])) for n in range(3)]
        await asyncio.sleep(0)
        batcher.start()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.stop()
        return found

    first, failed, last = asyncio.run(story())
    assert first == last == [[{"reward": 1.0}]] and isinstance(failed, UserError)


@pytest.fixture
def served(tmp_path, reward):
    """A server process with one thread, and its address."""
    save_heads(tmp_path, reward.heads)
    with process("--heads", str(tmp_path)) as found:
        yield found


@pytest.fixture
def served_with_token(monkeypatch):
    monkeypatch.setenv("ADHERE_TOKEN", "sesame")
    with process("--reward", "length") as (_, url):
        ready(url)
        yield url


@contextmanager
def process(*more):
    given = ["--model", str(model_path("causal")), "--port", "0", "--device", "cpu", "--json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "adhere", "serve", *given, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield running, json.loads("".join(iter(lambda: running.stdout.readline(), "}\n")) + "}")["url"]
    finally:
        running.kill()
        running.communicate()


def ready(url):
    for _ in range(200):
        try:
            return httpx.get(f"{url}/health").json()
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server did not come up")


@pytest.mark.slow
def test_a_server_under_load_hang_ups_and_a_clean_end(served, reward):
    running, url = served
    assert ready(url)["status"] == "ok"
    host, port = url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    for body in (b'{"items": [', json.dumps({"items": items() * 80}).encode()):  # hang up within, and while it waits
        with socket.create_connection((host, int(port))) as line:
            head = "POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
            line.sendall(f"{head}{len(body) + (body[-1:] == b'[')}\r\n\r\n".encode() + body)
            time.sleep(0.05)
    with socket.create_connection((host, int(port))) as line:
        line.sendall(b"\x00\xff\xfe nonsense\r\n\r\n")
        assert b"400" in line.recv(1000)

    found = {}

    def ask(number):
        row = ROWS[number % len(ROWS)]
        body = {"items": [{"prompt": row["prompt"], "response": row["answers"][0]}]}
        found[number] = httpx.post(f"{url}/v1/score", json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in found.values()} == {200}
    offline = reward.score([row["prompt"] for row in ROWS], [row["answers"][0] for row in ROWS]).reward.tolist()
    for number, answer in found.items():
        assert answer.json()["results"][0]["reward"] == pytest.approx(offline[number % len(ROWS)], abs=1e-4)

    large = http.client.HTTPConnection(host, int(port), timeout=60)
    large.request("POST", "/v1/score", json.dumps({"items": items() * 80}), {"content-type": "application/json"})
    while httpx.get(f"{url}/health").json()["waiting"] == 0:
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    answer = large.getresponse()
    assert answer.status == 200 and len(json.loads(answer.read())["results"]) == 80 * len(ROWS)
    assert running.wait(20) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heads", "nowhere"], "no copy heads here"),
        (["--reward", "atention"], "did you mean attention"),
        (["--reward", "contrast.yaml"], "contrast.yaml"),
        (["--timeout", "0"], "timeout is 0"),
        (["--port", "70000"], "cannot listen at 127.0.0.1:70000"),
        (["--host", "256.0.0.1", "--port", "0"], "cannot listen at 256.0.0.1"),
    ],
)
def test_bad_options_exit_with_2(more, words, capsys):
    port = [] if "--port" in more else ["--port", "0"]
    assert main(["serve", "--model", str(model_path("causal")), "--device", "cpu", *port, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(model_path("causal")), "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def api():
    """The OpenAPI description of a server in a thread of this process, of a model that takes messages."""
    policy = Policy.load(model_path("causal"), device="cpu")
    policy.tokenizer.chat_template = CHAT
    reward = Reward(config_of("attention"), policy)
    app = create_app(reward, "embedded", "attention", ServeConfig(), token="sesame")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    config = SchemathesisConfig.from_dict({"auth": {"openapi": {"HTTPBearer": {"bearer": "sesame"}}}})
    good = {"Authorization": "Bearer sesame"}
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=config, headers=good)
    server.should_exit = True
    thread.join()


PATHS = ["/v1/score", "/v1/rank", "/rerank", "/v1/rerank", "/v2/rerank", "/openrlhf", "/health", "/metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", PATHS)
def test_the_description_holds_for_generated_requests(api, path, mode):
    if mode is GenerationMode.NEGATIVE and path in ("/health", "/metrics"):
        pytest.skip("takes no input that could be wrong")
    assert sorted(api[path]) == ["get"] if path in ("/health", "/metrics") else ["post"]
    # A query must begin with its prompt, which OpenAPI cannot say: such requests are well formed, and refused.
    beyond = [positive_data_acceptance] if path == "/openrlhf" else []

    @settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=api[path]["get" if path in ("/health", "/metrics") else "post"].as_strategy(generation_mode=mode))
    def holds(case):
        case.call_and_validate(excluded_checks=beyond)

    holds()


def test_every_path_is_described(api):
    assert sorted(api) == sorted(PATHS)
