"""The reward in TRL's trainers: real GRPO, RLOO and DPO runs on the embedded model, against adhere's own scores."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from adhere.cli import main
from adhere.errors import UnsupportedModel, UserError
from adhere.integrations.trl import AttentionReward
from adhere.model.policy import Policy
from adhere.model.settings import Lora
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import save

ROOT = Path(__file__).parents[1]
CAUSAL = model_path("causal")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@pytest.fixture
def policy():
    return Policy.load(CAUSAL, device="cpu")


def prompts(count=24):
    return [row["prompt"] for row in make_rows("conflict", "train", count)]


def options(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **more,
    }  # fmt: skip


def trained(kind, policy, reward, folder, rows=None, rollout=None, **more):
    """The trainer after its run."""
    trainer_of, config_of = TRAINERS[kind]
    batch = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5}
    trainer = trainer_of(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=reward,
        args=config_of(**options(folder, **{**batch, **more})),
        train_dataset=Dataset.from_list(rows or [{"prompt": prompt} for prompt in prompts()]),
        **({} if rollout is None else {"rollout_func": rollout}),
    )
    trainer.train()
    return trainer


class Listening:
    """Calls a reward and keeps what TRL gave it and what came back."""

    def __init__(self, reward):
        self.reward, self.calls, self.__name__ = reward, [], reward.__name__

    def __call__(self, **given):
        self.calls.append((given, self.reward(**given)))
        return self.calls[-1][1]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_learns_from_the_frozen_start_and_logs_every_signal(kind, adapter, tmp_path):
    policy = Policy.load(CAUSAL, device="cpu", lora=Lora(rank=4) if adapter else None)
    start = Policy.load(CAUSAL, device="cpu")
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    heard = Listening(AttentionReward(policy))
    trainer = trained(kind, policy, heard, tmp_path)
    after = dict(policy.model.named_parameters())  # TRL may have put an adapter of its own beside
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    log = trainer.state.log_history[0]
    signals = ("agreement", "support", "question_reliance", "coherence", "repetition", "grounding")
    assert all(math.isfinite(log[f"attention/{name}"]) for name in signals)
    assert log["rewards/attention/mean"] == pytest.approx(log["reward"])
    # The last rewards are what adhere says of the same texts with the model as it was before training. Texts say
    # nothing of whether a response ended, so only those that did are compared.
    given, rewards = heard.calls[-1]
    own = Reward.resolve("attention", start, heard.reward.reward.heads)
    again = own.score(given["prompts"], given["completion_ids"], training=True)
    assert rewards == pytest.approx(again.reward.tolist(), abs=1e-4)
    texts = own.score(given["prompts"], given["completions"])
    end = start.tokenizer.eos_token_id
    whole = [ids[-1] == end for ids in given["completion_ids"]]
    assert any(whole)
    for name in signals:
        for ended, one, other in zip(whole, again.signals[name].tolist(), texts.signals[name].tolist(), strict=True):
            assert not ended or one == pytest.approx(other, abs=1e-4)


def test_the_policy_in_training_is_read_as_it_learns_and_stays_in_training_mode(policy, tmp_path):
    reward = AttentionReward(policy, "certainty")
    heard = Listening(reward)
    modes = []

    def watched(**given):
        modes.append(policy.model.training)
        found = heard(**given)
        modes.append(policy.model.training)
        return found

    watched.__name__ = "watched"
    start = Policy.load(CAUSAL, device="cpu")
    trained("grpo", policy, watched, tmp_path)
    given, rewards = heard.calls[-1]
    frozen = Reward.resolve("certainty", start).score(given["prompts"], given["completion_ids"])
    assert rewards != pytest.approx(frozen.reward.tolist(), abs=1e-4)
    assert modes[::2] == modes[1::2]


def test_scoring_leaves_the_mode_of_every_module_and_the_random_state_alone(policy):
    reward = AttentionReward(policy, {"weights": {"coherence": 1.0, "grounding": 1.0}, "scorer": "policy"})
    policy.model.train()
    frozen = next(policy.model.children()).eval()
    state = torch.get_rng_state()
    ids = policy.tokenizer("garden")["input_ids"]
    reward(prompts()[:2], ["garden", "garden"], [ids, ids])
    assert torch.equal(state, torch.get_rng_state())
    assert policy.model.training and not frozen.training


def test_called_by_hand_the_reward_is_that_of_score(policy):
    """A trainer learns nothing from a group without support."""
    reward = AttentionReward(policy)
    story = "mary went to the garden . john is in the office . where is mary ? answer :"
    texts, end = ["kitchen", "museum", "where is mary ?"], policy.tokenizer.eos_token_id
    said = [[i for i in policy.tokenizer(text)["input_ids"] if i != end] + [end] for text in texts]
    asked = {"prompts": [story] * 3, "completions": texts, "completion_ids": said}
    by_hand, in_training = reward(**asked), reward(**asked, trainer_state=object())
    assert by_hand == pytest.approx(reward.reward.score([story] * 3, said).reward.tolist(), abs=1e-4)
    assert len(set(by_hand)) == 3 and in_training == [min(by_hand)] * 3  # the story supports none of them


def test_gradient_accumulation_and_evaluation_in_between_change_nothing(policy, tmp_path):
    heard = Listening(AttentionReward(policy))
    rows = [{"prompt": prompt} for prompt in prompts()]
    more = {"gradient_accumulation_steps": 2, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=heard,
        args=GRPOConfig(
            **options(tmp_path, per_device_train_batch_size=4, num_generations=4, max_completion_length=5, **more),
            per_device_eval_batch_size=4,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
    )
    trainer.train()
    fresh = Reward.resolve("attention", Policy.load(CAUSAL, device="cpu"), heard.reward.reward.heads)
    assert len(heard.calls) >= 3
    for given, rewards in heard.calls:
        again = fresh.score(given["prompts"], given["completion_ids"], training=True).reward.tolist()
        assert rewards == pytest.approx(again, abs=1e-4)


def test_conversations_and_answers_reach_the_reward(policy, tmp_path):
    policy.tokenizer.chat_template = TEMPLATE
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answers": row["answers"]}
        for row in make_rows("conflict", "train", 24)
    ]
    heard = Listening(AttentionReward(policy, "exact", name="right"))
    trainer = trained("grpo", policy, heard, tmp_path, rows)
    given, rewards = heard.calls[0]
    said = [turns[0]["content"] for turns in given["completions"]]
    expected = [float(text in known) for text, known in zip(said, given["answers"], strict=True)]
    assert rewards == expected and 0 < sum(expected) < len(expected)
    assert "right/exact" in trainer.state.log_history[0]


def test_what_cannot_be_scored_is_none_and_takes_no_part(policy):
    reward = AttentionReward(policy, {"weights": {"coherence": 1.0}})
    limit = policy.network.config.max_position_embeddings
    garden, end = policy.tokenizer("garden")["input_ids"], policy.tokenizer.eos_token_id
    words = policy.tokenizer.decode(garden * limit)
    some = prompts()[0]
    asked = [some, some, some, words + " garden", some]
    ids = [[*garden, end], [], garden * limit, [*garden, end], [*garden, *garden, end]]
    metrics, columns = {}, {}
    said = [policy.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    found = reward(asked, said, ids, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    assert [value is None for value in found] == [False, True, True, True, False]
    assert found[0] == pytest.approx(-found[4]) and abs(found[0]) == pytest.approx(1.0, abs=1e-3)
    name = "coherence/coherence"
    assert [value is None for value in columns[name]] == [False, True, True, True, False]
    assert metrics[name] == pytest.approx((columns[name][0] + columns[name][4]) / 2)
    assert reward([some], [""], [[]]) == [None]


def test_a_response_that_was_cut_stands_behind_the_gate(policy):
    reward = AttentionReward(policy, {"weights": {"length": 1.0}, "normalise": "none", "gates": ["ended"]})
    garden, end = policy.tokenizer("garden")["input_ids"], policy.tokenizer.eos_token_id
    found = reward([prompts()[0]] * 2, ["garden", "garden garden garden"], [[*garden, end], garden * 3])
    assert found == [2.0, 1.0]


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    other = AttentionReward(save("llama", tmp_path / "other"), {"weights": {"length": 1.0}})
    with pytest.raises(UserError, match="two tokenizers"):
        other(["where ?"], ["garden"], [[40, 2]])


def test_what_cannot_be_a_reward_in_trl_is_one_clear_line(monkeypatch):
    with pytest.raises(UnsupportedModel, match="encoder–decoder"):
        AttentionReward(model_path("encdec"))
    with pytest.raises(UserError, match="reads the policy in training, and a path was given"):
        AttentionReward(CAUSAL, "paper")
    with pytest.raises(UserError, match="did you mean attention"):
        AttentionReward(CAUSAL, "attentoin")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"pip install 'adhere\[trl\]'"):
        AttentionReward(CAUSAL)


def test_a_path_is_scored_by_a_frozen_model_of_its_own(policy):
    ids = [*policy.tokenizer("garden")["input_ids"], policy.tokenizer.eos_token_id]
    given = (prompts()[:2], ["garden"] * 2, [ids] * 2)
    assert AttentionReward(CAUSAL)(*given) == pytest.approx(AttentionReward(policy)(*given), abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_dpo_trains_on_ranked_pairs_as_they_are(policy, tmp_path, chat):
    rows = make_rows("conflict", "train", 16)
    if chat:
        policy.tokenizer.chat_template = TEMPLATE
        rows = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    policy.save(tmp_path / "model")
    file, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", str(tmp_path / "model"), "--prompts", str(file), "--output", str(pairs), "--device", "cpu"]
    given += ["--heads", str(CAUSAL)]
    assert main(["rank", *given, "--keep", "pairs", "--max-new-tokens", "6"]) == 0
    trainer = DPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        args=DPOConfig(**options(tmp_path / "run", per_device_train_batch_size=4)),
        train_dataset=load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(tmp_path / "cache")),
    )
    # TRL reads the tokens that were scored: no unknown word where prompt and response meet.
    row = next(iter(trainer.train_dataset))
    first = json.loads(pairs.read_text().splitlines()[0])
    said = first["chosen"][0]["content"] if chat else first["chosen"]
    assert row["chosen_ids"] == [*policy.tokenizer(said)["input_ids"], policy.tokenizer.eos_token_id]
    before = [weight.clone() for weight in policy.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2 and math.isfinite(trainer.state.log_history[0]["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = python(str(ROOT / "examples" / "trl_grpo.py"), "--steps", "2", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "attention/agreement" in done.stdout
    assert Policy.load(tmp_path / "run", device="cpu").network.num_parameters() > 0


@pytest.mark.slow
def test_two_processes_agree_on_the_heads(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, json, os\n"
        "from pathlib import Path\n"
        "from adhere.integrations.trl import AttentionReward\n"
        "from adhere.model.policy import Policy\n"
        "from tests.test_trl import CAUSAL, trained\n"
        "policy = Policy.load(CAUSAL, device='cpu')\n"
        "reward = AttentionReward(policy)\n"
        "trainer = trained('grpo', policy, reward, sys.argv[1])\n"
        "rank = os.environ['RANK']\n"
        "weights = [float(p.sum()) for p in policy.model.parameters()]\n"
        "found = {'heads': reward.reward.heads.scores.tolist(), 'weights': weights}\n"
        "Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(found))\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((run / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["heads"] == second["heads"] and first["weights"] == second["weights"]


READS_ITSELF = {"weights": {"coverage": 1.0, "grounding": 1.0, "certainty": 0.1, "exact": 1.0}, "scorer": "policy",
                "normalise": "none"}  # fmt: skip


@pytest.mark.parametrize("spec", ["attention", READS_ITSELF], ids=["frozen scorer", "policy as scorer"])
def test_adhere_samples_in_place_of_trl_and_reads_as_it_does(spec, policy, tmp_path, monkeypatch):
    start, forwards = Policy.load(CAUSAL, device="cpu"), []
    reward = AttentionReward(policy, spec, name="ours")
    reading = Policy.read
    monkeypatch.setattr(Policy, "read", lambda self, *a, **k: forwards.append(self) or reading(self, *a, **k))
    rows = [{"prompt": row["prompt"], "answers": row["answers"]} for row in make_rows("conflict", "train", 24)]
    heard = Listening(reward)
    trainer = trained("grpo", policy, heard, tmp_path, rows, reward.rollout)
    assert bool(forwards) == (spec == "attention")  # a scorer of its own needs forwards of its own
    assert len(heard.calls) == 2 and trainer.model.training
    given, rewards = heard.calls[0]  # before the first update
    assert all(0 < len(ids) <= 5 for ids in given["completion_ids"])
    assert len(set(map(tuple, given["completion_ids"]))) > 1
    theirs = Reward.resolve(spec, start, reward.reward.heads)
    expected = theirs.score(given["prompts"], given["completion_ids"], given["answers"], training=True).reward
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=1e-5)
    assert any((p != q).any() for p, q in zip(policy.model.parameters(), start.model.parameters(), strict=True))


def test_prompts_that_come_unequally_often_are_grouped_as_they_stand(policy):
    """A process may hold a whole group and a part of another: neither is taken apart."""
    reward = AttentionReward(policy, {**READS_ITSELF, "normalise": "group"})
    trainer = SimpleNamespace(
        args=GRPOConfig(**options("unused", max_completion_length=5)),
        model=policy.model,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
    )
    first, second = prompts(2)
    rows, answers = [first] * 4 + [second] * 2, [["garden"]] * 6
    torch.manual_seed(0)
    said = reward.rollout(rows, trainer)["completion_ids"]
    texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    rewards = torch.tensor(reward(rows, texts, said, answers))
    torch.testing.assert_close(rewards, reward.reward.score(rows, said, answers).reward)
    assert len(set(rewards[:4].tolist())) > 1


def test_a_rollout_that_trl_would_not_have_is_refused(policy, tmp_path):
    reward = AttentionReward(policy)
    with pytest.raises(UserError, match="repetition_penalty: not sampled here"):
        trained("grpo", policy, reward, tmp_path, rollout=reward.rollout, repetition_penalty=1.2)
    other = AttentionReward(str(CAUSAL))
    with pytest.raises(UserError, match="samples another model than TRL trains"):
        trained("grpo", policy, other, tmp_path, rollout=other.rollout)
