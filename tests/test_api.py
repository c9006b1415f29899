"""The public functions: prompts, rewards and options in every form they take, each equal to the plain one; one list of
exports, each with an example; and what is refused before anything is written."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import datasets
import pytest
import torch

import adhere
from adhere import Lora, Policy, Reward, RewardConfig, Row, Sampling, UserError, audit, evaluate, rank, score, train
from adhere.config import load_config
from adhere.learn.settings import DPO, TrainConfig
from tests.families import save

TEXTS = [f"w{i} is in the w{i + 1} . where is w{i} ?" for i in range(6)]
FAMILIES = ("llama", "t5")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def policy(model):
    return Policy.load(model, device="cpu")


def w7(evidence):
    """The share of response tokens that are w7."""
    reading = evidence.reading
    word = (reading.response_ids == 19) & reading.response_mask
    return word.float().sum(-1) / reading.response_mask.sum(-1).clamp(min=1)


def forms(folder):
    """The same prompts in every form."""
    rows = [{"prompt": text} for text in TEXTS]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    return [TEXTS, tuple(TEXTS), rows, [Row(text) for text in TEXTS], dataset, path, str(path), iter(rows)]


def test_prompts_in_every_form_are_ranked_alike(policy, tmp_path):
    found = [rank(policy, prompts, reward=w7, num_samples=3, max_new_tokens=5) for prompts in forms(tmp_path)]
    assert len(found[0]) == len(TEXTS) and all(len(ranked.candidates) == 3 for ranked in found[0])
    for other in found[1:]:
        assert [ranked.candidates for ranked in other] == [ranked.candidates for ranked in found[0]]
    rewards = [[candidate["reward"] for candidate in ranked.candidates] for ranked in found[0]]
    assert rewards == [sorted(group, reverse=True) for group in rewards]


def test_rows_that_bring_candidates_are_ranked_by_them(policy):
    rows = [{"prompt": text, "candidates": ["w9 w9", "w7 w7", "w7 w9"]} for text in TEXTS]
    for ranked in rank(policy, rows, reward=w7):
        assert [candidate["response"] for candidate in ranked.candidates] == ["w7 w7", "w7 w9", "w9 w9"]
    with pytest.raises(UserError, match=r"row 2: no `candidates`, which 5 of 6 rows bring"):
        rank(policy, [rows[0], TEXTS[1], *rows[2:]], reward=w7)


@pytest.mark.parametrize("frozen", [False, True], ids=["scored", "trained"])
def test_a_reward_in_every_form_says_the_same(frozen, policy, tmp_path):
    rows = [{"prompt": TEXTS[0], "response": text} for text in ("w7 w7", "w9 w7", "w9")]
    config = RewardConfig({"tests.test_api:w7": 1.0})
    given = [
        w7,
        "tests.test_api:w7",
        {"weights": {"tests.test_api:w7": 1.0}},
        config,
        Reward(config, policy, reference=policy),
    ]
    found = []
    for number, reward in enumerate(given):
        if frozen:
            run = tmp_path / f"run-{number}"
            learner = Policy(policy.reference().model, policy.tokenizer)
            reward = Reward(config, learner, reference=learner) if isinstance(reward, Reward) else reward
            seen = []
            learner.model.requires_grad_(True)
            train(learner, TEXTS, reward=reward, output=run, steps=2, prompts_per_step=2, num_samples=4,
                  max_new_tokens=5, warmup_steps=0, learning_rate=1e-2, on_step=seen.append)  # fmt: skip
            found.append([(row["loss"], row["reward"]) for row in seen])
            written = load_config(TrainConfig, run / "config.yaml").reward
            assert "tests.test_api:w7" in (written if isinstance(written, str) else written["weights"])
        else:
            found.append([row["reward"] for row in score(policy, rows, reward=reward)])
    assert all(one == found[0] for one in found)


def test_a_function_that_no_module_holds_is_a_reward_too(policy):
    rows = [{"prompt": TEXTS[0], "response": text} for text in ("w7 w7 w7", "w9")]
    shorter = score(policy, rows, reward=lambda evidence: -evidence.reading.response_mask.float().sum(-1))
    assert shorter[0]["reward"] < shorter[1]["reward"]
    with pytest.raises(UserError, match=r"<lambda>' returned list; return a finite float tensor of shape \[2\]"):
        score(policy, rows, reward=lambda evidence: [0.0, 1.0])


def test_the_frozen_reader_of_a_given_reward_does_not_learn(model, tmp_path):
    """A reward that reads with the policy itself, as scoring does, would drift with it."""
    policy = Policy.load(model, device="cpu")
    before = policy.reference()
    reward = Reward(RewardConfig({"coherence": 1.0}, normalise="none"), policy, reference=policy)
    seen = []
    options = {"steps": 3, "prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 5, "learning_rate": 1e-2}
    train(policy, TEXTS, reward=reward, output=tmp_path / "own", on_step=seen.append, **options)
    named = []
    spec = {"weights": {"coherence": 1.0}, "normalise": "none"}
    again = Policy(before.model.requires_grad_(True), policy.tokenizer)
    train(again, TEXTS, reward=spec, output=tmp_path / "named", on_step=named.append, **options)
    assert [row["reward"] for row in seen] == [row["reward"] for row in named]


def test_the_run_says_what_it_was_told(model, tmp_path):
    policy = Policy.load(model, device="cpu", lora=Lora(rank=2, alpha=4))
    run = tmp_path / "run"
    done = train(
        policy, TEXTS, output=run, reward="length", algorithm="dpo", beta=0.3, sampling=Sampling(max_new_tokens=4),
        steps=1, prompts_per_step=2, num_samples=2, max_kl=7.0,
    )  # fmt: skip
    config = load_config(TrainConfig, run / "config.yaml")
    assert done.steps == 1 and (run / "model").is_dir()
    assert config.algorithm == DPO(beta=0.3) and config.sampling == Sampling(max_new_tokens=4)
    assert config.stopping.max_kl == 7.0 and (config.lora.rank, config.lora.alpha) == (2, 4)
    assert {"q_proj", "v_proj"} < set(config.lora.target_modules) or {"q", "v"} < set(config.lora.target_modules)
    assert (config.model, config.prompts, config.device) == (str(model), "(given in Python)", "cpu")
    resumed = train(
        policy, TEXTS, output=run, reward="length", algorithm=DPO(beta=0.3), max_new_tokens=4,
        steps=2, prompts_per_step=2, num_samples=2, resume=True,
    )  # fmt: skip
    assert resumed.steps == 2


def test_a_run_in_python_can_be_resumed_whatever_it_computes_in(model, tmp_path):
    """The weights change their type when training begins; what the run is told must not."""
    names = ("q",) if Policy.load(model, device="cpu").is_encoder_decoder else ("q_proj", "v_proj")
    lora = Lora(rank=2, alpha=4, dropout=0.1, target_modules=names)
    for name, adapter in (("all", None), ("lora", lora)):
        policy = Policy.load(model, device="cpu", lora=adapter)
        options = {"reward": "length", "output": tmp_path / name, "dtype": "bfloat16", "prompts_per_step": 2}
        train(policy, TEXTS, steps=1, num_samples=2, max_new_tokens=4, **options)
        train(policy, TEXTS, steps=2, num_samples=2, max_new_tokens=4, resume=True, **options)
        config = load_config(TrainConfig, tmp_path / name / "config.yaml")
        assert config.dtype == "bfloat16" and config.lora == adapter


def test_a_reference_that_the_reward_brings_goes_on_reading(model, tmp_path):
    """As in training by rounds: the reader and the start of KL stay those of the first."""
    policy = Policy.load(model, device="cpu")
    start = policy.reference()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.1)
    reward = Reward(RewardConfig({"coherence": 1.0}, normalise="none"), policy, reference=start)
    seen = []
    options = {"steps": 1, "prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 5}
    train(policy, TEXTS, reward=reward, output=tmp_path / "run", on_step=seen.append, **options)
    assert abs(seen[0]["kl"]) > 1e-3


def test_a_limit_leaves_the_first_rows(model, tmp_path):
    policy = Policy.load(model, device="cpu")
    for number, prompts in enumerate(forms(tmp_path)):
        run = tmp_path / f"run-{number}"
        train(policy, prompts, reward="length", output=run, steps=1, limit=2, prompts_per_step=2, num_samples=2,
              max_new_tokens=3, log_samples=9)  # fmt: skip
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert {row["prompt"] for row in rows} == set(TEXTS[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setps": 3}, "unknown option 'setps'; did you mean steps"),
        ({"learning_rat": 1.0, "max_new_token": 3}, "did you mean learning_rate.*\n.*did you mean max_new_tokens"),
        ({"lora_rank": 4}, "unknown option 'lora_rank'"),
        ({"steps": 0}, "steps is 0; set it to 1 or above"),
        ({"algorithm": "dpo", "kl_coef": 0.1}, "`kl_coef` is an option of .*, not of dpo"),
        ({"reward": "attenton"}, "unknown reward 'attenton'; did you mean attention"),
        ({"reward": "tests.test_api:w8"}, "has no function 'w8'"),
        ({"reward": "exact"}, "row 1: no `answers`"),
        ({"max_new_tokens": 5000}, "row 1: prompt and 5000 new tokens do not fit"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(options, message, tmp_path):
    policy = Policy.load(save("llama", tmp_path / "model"), device="cpu")
    with pytest.raises(UserError, match=message):
        train(policy, TEXTS, output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_every_function_offers_the_nearest_option(policy):
    for function, wrong, near in (
        (score, "batchsize", "batch_size"),
        (rank, "num_sample", "num_samples"),
        (audit, "max_new_token", "max_new_tokens"),
        (evaluate, "embeder", "embedder"),
    ):
        with pytest.raises(UserError, match=f"unknown option '{wrong}'; did you mean {near}"):
            function(policy, TEXTS, **{wrong: 1})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no rows are given"),
        ([TEXTS[0], "  "], "row 2: `prompt` is empty"),
        ([TEXTS[0], 3, None], "row 2: is a number; give text, a mapping or a Row\nrow 3: is null"),
        ([{"text": "w1"}], "row 1: no `prompt` or `messages`"),
        ({"train": TEXTS}, "of a DatasetDict, one split"),
        ("no/such/file.jsonl", "no/such/file.jsonl"),
    ],
)
def test_prompts_that_are_none_are_named(prompts, message, policy):
    with pytest.raises(UserError, match=message):
        rank(policy, prompts, reward="length")


def test_fields_of_rows_may_have_other_names(policy):
    rows = [{"story": text, "response": "w7"} for text in TEXTS]
    plain = score(policy, [{"prompt": text, "response": "w7"} for text in TEXTS], reward="length")
    assert [row["reward"] for row in score(policy, rows, reward="length", prompt_field="story")] == [
        row["reward"] for row in plain
    ]
    assert len(rank(policy, TEXTS, reward="length", prompt_field="story", num_samples=2, max_new_tokens=3)) == 6


def test_a_reward_of_another_policy_is_refused(policy, model):
    other = Policy.load(model, device="cpu")
    reward = Reward(RewardConfig({"length": 1.0}), other, reference=other)
    with pytest.raises(UserError, match="bound to another policy"):
        rank(policy, TEXTS, reward=reward)


def test_scores_have_the_order_and_the_groups_of_the_rows(policy):
    rows = [{"prompt": TEXTS[n % 2], "response": f"w{n}", "id": n} for n in range(6)]
    found = score(policy, rows, reward="certainty", batch_size=2)
    assert [row["id"] for row in found] == list(range(6))
    whole = Reward.resolve("certainty", policy).score([r["prompt"] for r in rows], [r["response"] for r in rows])
    assert torch.allclose(torch.tensor([row["reward"] for row in found]), whole.reward, atol=1e-4)


def test_audit_and_evaluate_take_rows_and_options(policy):
    rows = [{"prompt": text, "answers": ["w7"]} for text in TEXTS]
    verdict = audit(policy, rows, reward="length", num_samples=2, max_new_tokens=6)
    assert verdict.gameable(0.05) and not verdict.gameable(1.0)
    found = evaluate(policy, rows, num_samples=2, max_new_tokens=4, baseline=policy.reference(), judge="certainty")
    assert found.metrics["kl"].after.mean == pytest.approx(0, abs=1e-5)
    assert found.metrics["win_rate"].after.mean == 0.5
    with pytest.raises(UserError, match="`judge` compares with a baseline"):
        evaluate(policy, rows, judge="certainty")


def test_what_type_checkers_see_is_what_is_exported():
    tree = ast.parse(Path(adhere.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == adhere._HOME and set(adhere.__all__) == set(seen) and len(adhere.__all__) == len(seen)
    assert set(adhere.__all__) >= {"Policy", "Reward", "Row", "train", "score", "rank", "audit", "evaluate"}
    assert all(name in dir(adhere) for name in seen)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adhere.nothing  # noqa: B018


@pytest.mark.parametrize("name", adhere.__all__)
def test_every_export_has_an_example(name):
    assert ">>>" in (getattr(adhere, name).__doc__ or "")
