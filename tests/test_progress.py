"""Every long phase says how far it is, to whatever it was given for that: loading, copy heads, sampling, reading,
ranking, auditing, training and saving. From Python nothing is shown that was not asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as speech

import adhere
from adhere.cli import main
from adhere.data import Row
from adhere.learn.settings import TrainConfig
from adhere.learn.train import train
from adhere.measure.audit import audit
from adhere.measure.settings import AuditConfig
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.preferences.fit import fit
from adhere.preferences.settings import PreferenceConfig
from adhere.progress import silent
from adhere.reward import heads
from adhere.reward.heads import CopyHeads
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import save
from tests.progress import Seen

PROMPTS = [f"w{i} is in the w{i + 1} . where is w{i} ?" for i in range(6)]
BOTH = pytest.mark.parametrize("family", ["llama", "t5"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {family: save(family, tmp_path_factory.mktemp("models") / family) for family in ("llama", "t5")}


def some_heads(policy: Policy) -> CopyHeads:
    return CopyHeads(torch.ones(policy.attention_shape), "copying", 1, 0.0, policy.fingerprint())


@BOTH
def test_loading_counts_the_weights_and_the_librarys_own_bar_stays_away(folders, family, capfd) -> None:
    seen = Seen()
    policy = Policy.load(folders[family], device="cpu", progress=seen)
    ((title, total, counts),) = seen.outer()
    assert title == "loading weights" and counts == list(range(1, total + 1)) and total > 10
    assert policy.progress is policy.reference().progress is seen
    assert speech.set_tqdm_hook(None) is None  # as it was before
    assert capfd.readouterr() == ("", "")


@BOTH
def test_python_shows_nothing_unless_it_is_asked_to(folders, family, capfd, tmp_path) -> None:
    policy = Policy.load(folders[family], device="cpu")
    adhere.rank(policy, PROMPTS, reward="length", num_samples=2, max_new_tokens=4)
    policy.save(tmp_path)
    assert capfd.readouterr() == ("", "")
    policy.progress = adhere.progress_bars()
    adhere.rank(policy, PROMPTS, reward="length", num_samples=2, max_new_tokens=4)
    assert "ranking 0/6\nranking: reading prompts\nranking: sampling\n" in capfd.readouterr().err


@BOTH
def test_sampling_counts_tokens_and_stops_where_all_have_ended(folders, family) -> None:
    policy = Policy.load(folders[family], device="cpu")
    policy.progress = seen = Seen()
    rollout = policy.sample(policy.encode(PROMPTS), 2, sampling=Sampling(max_new_tokens=40, temperature=8.0), seed=1)
    longest = int(rollout.lengths.max())  # with its last token the loop is left
    assert [loop[1:] for loop in seen.loops] == [("reading prompts", 1, [1]), ("sampling", 40, [*range(1, longest)])]


@BOTH
def test_reading_counts_responses_however_few_fit_a_forward(folders, family) -> None:
    policy = Policy.load(folders[family], device="cpu")
    rollout = policy.sample(policy.encode(PROMPTS), 2, sampling=Sampling(max_new_tokens=4))
    policy.progress = seen = Seen()
    policy.reader.budget.tokens = 1
    policy.read(rollout)
    assert seen.outer() == [("reading", 12, list(range(1, 13)))]


@BOTH
def test_on_a_cpu_groups_are_read_one_after_the_other_and_never_cut(folders, family, monkeypatch) -> None:
    policy = Policy.load(folders[family], device="cpu")
    rollout = policy.sample(policy.encode(PROMPTS), 4, sampling=Sampling(max_new_tokens=4))
    whole = policy.read(rollout)
    monkeypatch.setattr("adhere.model.read.CPU_TOKENS_TOGETHER", 1)
    policy.progress = seen = Seen()
    pieces = policy.read(rollout)
    assert seen.outer() == [("reading", 24, [4, 8, 12, 16, 20, 24])]
    assert whole.attention is not None and pieces.attention is not None
    torch.testing.assert_close(pieces.attention, whole.attention, atol=1e-5, rtol=0)
    torch.testing.assert_close(pieces.logprobs, whole.logprobs, atol=1e-5, rtol=0)


@BOTH
def test_copy_heads_measured_piece_by_piece_are_those_of_one_forward(folders, family, monkeypatch) -> None:
    policy = Policy.load(folders[family], device="cpu")
    prompts = policy.encode([*PROMPTS, "w9 . " * 9 + "where is w9 ?"])
    monkeypatch.setattr(heads, "_PIECE_TOKENS", 10**9)
    whole = heads.measure_on_answers(policy, prompts, 3)
    monkeypatch.setattr(heads, "_PIECE_TOKENS", 1)
    policy.progress = seen = Seen()
    pieces = heads.measure_on_answers(policy, prompts, 3)
    assert torch.equal(pieces.scores, whole.scores) and pieces.tokens == whole.tokens
    assert pieces.logprob == pytest.approx(whole.logprob, abs=1e-5)
    assert ("measuring copy heads", 21, list(range(3, 22, 3))) in seen.outer()


@BOTH
def test_a_ranking_says_what_it_is_at_within_each_batch(folders, family) -> None:
    policy = Policy.load(folders[family], device="cpu")
    reward = Reward.named("attention", policy, some_heads(policy))
    policy.progress = seen = Seen()
    adhere.rank(policy, PROMPTS, reward=reward, num_samples=2, max_new_tokens=4, batch_size=4)
    assert seen.outer() == [("ranking", 6, [4, 6])]
    assert seen.titles() == {"ranking", "reading prompts", "sampling", "reading", "without the question"}
    seen.loops.clear()
    rows = [{"prompt": prompt, "response": "w1"} for prompt in PROMPTS]
    adhere.score(policy, rows, reward="length", batch_size=4)
    assert seen.outer()[-1] == ("scoring", 6, [4, 6])


@BOTH
def test_an_audit_counts_prompts_and_within_them_rewards(folders, family) -> None:
    policy = Policy.load(folders[family], device="cpu")
    rewards = {name: Reward.named(name, policy) for name in ("length", "overlap")}
    policy.progress = seen = Seen()
    audit(
        policy, [Row(text) for text in PROMPTS[:5]], rewards, AuditConfig(num_samples=2, max_new_tokens=4, batch_size=4)
    )
    assert seen.outer() == [("auditing", 5, [5])]  # the last prompt alone would have no other beside it
    assert (1, "scoring", 2, [1, 2]) in seen.loops


@BOTH
def test_training_counts_its_steps_from_the_checkpoint_on_and_tells_what_each_is_at(folders, family, tmp_path) -> None:
    config = TrainConfig(
        str(folders[family]), "", str(tmp_path / "run"), reward="length", steps=2, prompts_per_step=2, num_samples=2,
        sampling=Sampling(max_new_tokens=4), save_every=2, device="cpu",
    )  # fmt: skip
    rows = [Row(text) for text in PROMPTS]
    for steps, counts in ((2, [1, 2]), (3, [3])):
        seen = Seen()
        policy = Policy.load(folders[family], device="cpu", progress=seen)
        train(replace(config, steps=steps), policy, rows, tmp_path / "run", resume=steps == 3)
        assert ("training", steps, counts) in seen.outer()
        assert {"sampling", "reading", "updating", "saving a checkpoint"} <= seen.titles()
        assert ("saving the model", 1, [1]) in seen.outer()
        assert (1, "writing model shards", 1, [1]) in seen.loops


@BOTH
def test_fitting_a_reward_model_counts_its_steps(folders, family, tmp_path) -> None:
    pairs = [Row(text, chosen="w1", rejected="w2", where=text) for text in PROMPTS]
    config = PreferenceConfig(str(folders[family]), str(tmp_path / "rm"), steps=3, batch_size=2, device="cpu")
    seen = Seen()
    fit(config, pairs, progress=seen)
    assert ("fitting", 3, [1, 2, 3]) in seen.outer()


def test_the_command_line_shows_the_metrics_of_the_first_step_and_leaves_requests_silent(
    folders, tmp_path, capsys
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    words = (
        f"train --model {folders['llama']} --prompts {rows} --output {tmp_path / 'run'} --reward length --device cpu"
    )
    words += " --steps 3 --prompts-per-step 2 --num-samples 2 --max-new-tokens 4 --skip-audit"
    assert main(words.split()) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.index("training 0/3") > lines.index(next(line for line in lines if line.startswith("loading weights")))
    first = next(line for line in lines if line.startswith("training 1/3"))
    assert "  reward " in first and "  tokens/s " in first
    assert sum(line.startswith("training: sampling") for line in lines) == 1
    assert main([*words.replace("/run", "/again").split(), "--quiet"]) == 0
    assert not [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]


def test_what_the_model_layer_logs_is_said_as_a_warning_once(tmp_path, capsys, monkeypatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"response": "garden"}) + "\n" for row in make_rows("agree", "test", 4)))
    # As on a machine with little memory: a forward of more than 64 tokens does not fit.
    monkeypatch.setattr("adhere.model.read.CPU_FORWARD_TOKENS", 256)
    forwards = Policy.load(model_path("causal"), device="cpu").reader.__class__.forwards

    def little(self, part, share, make=None, question=None):
        if part.prompts.ids.numel() > 64:
            raise torch.OutOfMemoryError("no memory")
        return forwards(self, part, share, make, question)

    monkeypatch.setattr("adhere.model.read.Reader.forwards", little)
    words = ["score", "--model", "toy-causal", "--input", str(rows), "--output", str(tmp_path / "o.jsonl"), "--quiet"]
    assert main([*words, "--device", "cpu"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    # 176 tokens of the rollout at once do not fit, nor do half of them.
    assert said == [f"warning: out of memory: from here on at most {tokens} tokens at a time" for tokens in (88, 44)]


def test_silent_hands_on_what_it_gets() -> None:
    assert list(silent(iter("ab"), "spelling", 2)) == ["a", "b"]
