"""verl's and OpenRLHF's own code against a server of ours, where they are installed; their published calls anyway."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
import urllib.request

import pytest
import uvicorn

from adhere.errors import RunFailed, UserError
from adhere.integrations import http, verl
from adhere.integrations.http import JsonClient
from adhere.integrations.verl import compute_score
from adhere.model.policy import Policy
from adhere.ranking import Group, score_groups
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.serve.app import create_app
from adhere.serve.config import ServeConfig
from adhere.toy import make_rows, model_path

CHAT = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
ROWS = make_rows("conflict", "test", 4)
NAMES = ("agreement", "coherence", "support")


@pytest.fixture(scope="module")
def reward():
    policy = Policy.load(model_path("causal"), device="cpu")
    policy.tokenizer.chat_template = CHAT
    return Reward(config_of("attention"), policy)


@pytest.fixture(scope="module")
def url(reward):
    """A server in a thread of this process, and its address."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(reward, "embedded", "attention", ServeConfig()), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def expected(reward, row, ended=True):
    ((found,),) = score_groups(reward, [Group(row["prompt"], [row["answers"][0]], [ended])])
    return found["reward"]


@pytest.mark.parametrize("prompt", [lambda text: text, lambda text: [{"role": "user", "content": text}]])
def test_verl_a_custom_reward_function(url, reward, prompt):
    for row in ROWS:
        found = compute_score(
            data_source="stories",
            solution_str=row["answers"][0],
            ground_truth=row["answers"][0],
            extra_info={"prompt": prompt(row["prompt"]), "num_turns": None, "rollout_reward_scores": {}},
            url=url,
            reward_router_address=None,
        )
        assert found["score"] == pytest.approx(expected(reward, row), abs=1e-4)
        assert set(NAMES) < set(found)


def test_verl_says_what_is_missing(url, monkeypatch):
    with pytest.raises(UserError, match=r"extra_info\['prompt'\], or use AttentionRewardManager"):
        compute_score("stories", "a", None, {}, url=url)
    with pytest.raises(UserError, match=r"HTTP 422 items\[0\]\.prompt: .*pattern"):
        compute_score("stories", "a", None, {"prompt": "\x00"}, url=url)
    pauses = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    with pytest.raises(RunFailed, match="no answer"):
        compute_score("stories", "a", None, {"prompt": "where is mary ?"}, url="http://127.0.0.1:9")
    assert len(pauses) == http.ATTEMPTS - 1


def test_verl_a_reply_that_is_none_of_ours_is_no_reward(monkeypatch):
    monkeypatch.setattr(http.time, "sleep", lambda _seconds: None)
    for reply in ({"results": []}, {"results": [{"reward": "much", "signals": {}}]}, [], None):
        monkeypatch.setattr(JsonClient, "request", lambda *_, reply=reply: reply)
        with pytest.raises(RunFailed, match="is this `adhere serve`"):
            compute_score("stories", "a", None, {"prompt": "where ?"}, url="http://127.0.0.1:1")


def verl_config(url, **manager):
    from omegaconf import OmegaConf

    function = {"path": "pkg://adhere.integrations.verl", "name": "compute_score", "reward_kwargs": {"url": url}}
    return OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})


def verl_data(policy, row, ended):
    import numpy as np
    import torch
    from verl import DataProto

    def ids(text):
        return policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, response = ids(row["prompt"]), ids(row["answers"][0])
    response = response + [policy.tokenizer.eos_token_id] * ended
    blank = [policy.tokenizer.pad_token_id] * 3
    batch = {
        "prompts": torch.tensor([blank + prompt]),
        "responses": torch.tensor([response + blank]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * (len(prompt) + len(response)) + [0] * 3]),
    }

    def one(value):
        found = np.empty(1, dtype=object)
        found[0] = value
        return found

    known = {
        "raw_prompt": one([{"role": "user", "content": row["prompt"]}]),
        "reward_model": one({"ground_truth": row["answers"][0]}),
        "data_source": one("stories"),
        "extra_info": one({"prompt": row["prompt"]}),
    }
    return DataProto.from_single_dict({**batch, **known})


@pytest.mark.parametrize(
    "manager",
    [
        {"source": "register", "name": "naive"},
        {"source": "importlib", "name": "AttentionRewardManager", "module": {"path": "pkg://adhere.integrations.verl"}},
    ],
)
def test_verl_itself_takes_the_function_and_the_manager(url, reward, manager):
    pytest.importorskip("verl")
    from verl.trainer.ppo.reward import load_reward_manager

    async def run():
        loaded = load_reward_manager(verl_config(url, **manager), reward.policy.tokenizer)
        return [
            [await loaded.run_single(verl_data(reward.policy, row, ended)) for row in ROWS] for ended in (True, False)
        ]

    whole, cut = asyncio.run(run())
    knows = manager["source"] == "importlib"
    for row, found, short in zip(ROWS, whole, cut, strict=True):
        assert found["reward_score"] == pytest.approx(expected(reward, row), abs=1e-4)
        assert short["reward_score"] == pytest.approx(expected(reward, row, ended=not knows), abs=1e-4)
        assert set(NAMES) < set(found["reward_extra_info"])


def test_verl_the_manager_asks_for_an_address(reward):
    pytest.importorskip("verl")

    async def run():
        verl.AttentionRewardManager(verl_config(None), reward.policy.tokenizer, None)

    with pytest.raises(UserError, match=r"write \+reward\.custom_reward_function\.reward_kwargs\.url="):
        asyncio.run(run())


def openrlhf_query(policy, row, ended=True):
    """As OpenRLHF makes it: prompt and response as ids, decoded with special tokens."""
    ids = policy.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    said = policy.tokenizer(row["answers"][0], add_special_tokens=False)["input_ids"]
    return policy.tokenizer.decode([*ids, *said, *[policy.tokenizer.eos_token_id] * ended], skip_special_tokens=False)


def test_openrlhf_the_published_request(url, reward):
    body = {
        "query": [openrlhf_query(reward.policy, row) for row in ROWS],
        "prompts": [row["prompt"] for row in ROWS],
        "labels": [row["answers"][0] for row in ROWS],
    }
    request = urllib.request.Request(f"{url}/openrlhf", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        found = json.load(reply)
    assert found["rewards"] == found["scores"] == pytest.approx([expected(reward, row) for row in ROWS], abs=1e-4)
    assert all(len(values) == len(ROWS) for values in found["extra_logs"].values())


@pytest.mark.skipif(not importlib.util.find_spec("openrlhf"), reason="OpenRLHF is not installed")
def test_openrlhf_its_own_client(url, reward):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    async def run():
        executor = SingleTurnAgentExecutor([f"{url}/openrlhf"])
        return await asyncio.gather(
            *(
                executor._fetch_rewards_via_http([openrlhf_query(reward.policy, row, ended)], [row["prompt"]], [None])
                for row in ROWS
                for ended in (True, False)
            )
        )

    found = [reply["rewards"][0] for (reply,) in asyncio.run(run())]
    wanted = [expected(reward, row, ended) for row in ROWS for ended in (True, False)]
    assert found == pytest.approx(wanted, abs=1e-4)
