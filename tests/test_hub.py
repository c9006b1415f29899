"""`adhere train --push-to-hub` against a server on this machine that speaks what the client needs of the hub: what
arrives there, and what is said where something is refused, before training or after it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from adhere.cli import main
from tests.families import save

PROMPTS = [{"prompt": f"w{i} is in the w{i + 1} . where is w{i} ?"} for i in range(6)]
TOKEN = "hf_of_this_test"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "model")


class Hub:
    """What was asked of it, and the files that were pushed. `refuse`: what it does not do, and what it says then."""

    def __init__(self, refuse: dict[str, tuple[int, str]]) -> None:
        self.refuse = refuse
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        path = path.split("?")[0]
        for part, (status, said) in self.refuse.items():
            if part in path:
                return status, {"error": said}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/me/story", "id": "me/story", "name": "me/story"}
        if path == "/api/models/me/story/auth-check/write":
            return 200, {}
        if path == "/api/validate-yaml":  # of a card, which the client asks for before it commits
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/me/story/preupload/main":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if path == "/api/models/me/story/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                else:
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/me/story/commit/abc", "commitOid": "abc", "hookOutput": ""}
        return 404, {"error": f"no such thing here: {path}"}


@contextmanager
def a_hub(**refuse: tuple[int, str]) -> Iterator[Hub]:
    hub = Hub({name.replace("_", "/"): said for name, said in refuse.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
            body = self.chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, said = hub.answer(self.path, body) if known else (401, {"error": "Invalid username or password."})
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def chunks(self):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    """`adhere train --push-to-hub story`; its run is `folder/run`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    given = ["train", "--model", model, "--prompts", prompts, "--output", folder / "run", "--reward", "certainty"]
    given += ["--steps", "2", "--prompts-per-step", "2", "--num-samples", "2", "--max-new-tokens", "4"]
    return [*map(str, given), "--device", "cpu", "--skip-audit", "--push-to-hub", "story", *more]


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A function that points this process at a hub, with a token: constants that are read when the client is loaded."""

    def point(hub: Hub, token: str = TOKEN) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", token)

    return point


def test_the_finished_model_is_pushed_with_its_card(model, tmp_path, capsys, online):
    with a_hub() as hub:
        online(hub)
        assert main(arguments(model, tmp_path, "--json")) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["hub"] == f"{hub.url}/me/story"
    assert shown.err.splitlines()[-1] == f"pushed to {hub.url}/me/story"
    assert [(made["name"], made["visibility"]) for made in hub.created] == [("story", "private")]
    assert hub.messages == ["2 steps of adhere train"]
    folder = tmp_path / "run" / "model"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    card = ModelCard(hub.files["README.md"].decode())
    assert "# me/story" in card.text and "name = 'me/story'  # on the hub" in card.text


def test_of_two_processes_one_writes_and_pushes(model, tmp_path):
    """`torchrun` with the hub in the environment: one log, one table with the responses of both, one commit."""
    script = tmp_path / "train.py"
    script.write_text("import sys\nfrom adhere.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    given = arguments(model, tmp_path, "--trackers", "tensorboard", "--num-samples", "3")
    settings = {
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with a_hub() as hub:
        environment = {**os.environ, **settings, "HF_ENDPOINT": hub.url}
        done = subprocess.run([*launch, *given], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(hub.created) == len(hub.messages) == 1 and "model.safetensors" in hub.files
    assert [line for line in done.stderr.splitlines() if "model in" in line or "pushed" in line] == [
        f"2 steps; model in {tmp_path / 'run' / 'model'}, report in {tmp_path / 'run' / 'report.html'}",
        f"pushed to {hub.url}/me/story",
    ]
    run = tmp_path / "run"
    table = pandas.read_parquet(run / "completions")
    assert table.groupby(["step", "prompt"]).size().tolist() == [3] * 4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spread = table.groupby("step")["signals/certainty"].std().tolist()
    assert [row["reward_std"] for row in metrics] == pytest.approx(spread, rel=1e-5)
    assert len(list((run / "tensorboard").glob("events.*"))) == 1


def test_what_the_hub_refuses_is_told_before_training(model, tmp_path, capsys, online):
    with a_hub() as hub:
        online(hub, "hf_of_nobody")
        assert main(arguments(model, tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "error" in line] == [
        "error: push_to_hub story: the hub does not take it: Invalid username or password; "
        "check token and name, or leave --push-to-hub out"
    ]
    assert not (tmp_path / "run").exists()


def test_a_repository_that_one_may_only_read_is_told_before_training(model, tmp_path, capsys, online):
    with a_hub(**{"auth-check": (403, "No right to write")}) as hub:
        online(hub)
        assert main(arguments(model, tmp_path)) == 2
    assert "the hub does not take it: No right to write" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_is_made_on_the_hub_for_prompts_that_cannot_be_used(model, tmp_path, capsys, online):
    with a_hub() as hub:
        online(hub)
        assert main(arguments(model, tmp_path, "--max-new-tokens", "1000")) == 2
    assert "new tokens" in capsys.readouterr().err
    assert not hub.created and not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_model_and_the_command_that_pushes_it(model, tmp_path, capsys, online):
    with a_hub(commit_main=(403, "Storage limit reached")) as hub:
        online(hub)
        assert main(arguments(model, tmp_path, "--hub-public")) == 1
    folder = tmp_path / "run" / "model"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Storage limit reached" in told[0]
    assert told[0].endswith(f"push it with: hf upload me/story {folder} .")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert [made["visibility"] for made in hub.created] == ["public"]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("repo", "offline", "message"),
    [
        ("me/story", True, "HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out"),
        ("me/story", False, "no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        ("me/story/x", False, "is no name of a repository; write NAME or OWNER/NAME"),
        ("../x", True, "is no name of a repository"),
    ],
)
def test_what_is_missing_is_told_at_once(model, tmp_path, capsys, monkeypatch, repo, offline, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Told before anything is read: there is no such file of prompts.
    given = ["--model", str(model), "--prompts", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "run")]
    assert main(["train", *given, "--push-to-hub", repo]) == 2
    assert capsys.readouterr().err.startswith(f"error: push_to_hub {repo}: {message}")
    assert not (tmp_path / "run").exists()
