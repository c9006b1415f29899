"""Copy heads: a property of the model, measured by copying or, where a model does not copy, on its own answers; saved
whole or not at all, and the same wherever a response is scored."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from adhere.data import Row
from adhere.errors import RunFailed, UserError
from adhere.model.fingerprint import checksum, fingerprint
from adhere.model.policy import Policy
from adhere.model.settings import Lora
from adhere.ranking import score_rows
from adhere.reward import heads
from adhere.reward.heads import FILE_NAME, CopyHeads, copy_heads, load_heads, measure_on_answers, save_heads
from adhere.reward.passages import PASSAGES, repeated
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import build, save

FOUND = CopyHeads(torch.tensor([[0.5, 0.0], [0.25, 0.25]]), "copying", 40, -0.5, "0" * 32)


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request):
    return Policy.load(model_path(request.param), device="cpu")


def test_weights_are_in_proportion_to_the_scores():
    torch.testing.assert_close(FOUND.weights, torch.tensor([[0.5, 0.0], [0.25, 0.25]]))
    assert FOUND.weights.dtype == torch.float32
    assert FOUND.top(2) == [(0, 0, 0.5), (1, 0, 0.25)]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_measuring_on_answers_counts_the_policys_own_content_tokens(family, tmp_path):
    policy = Policy.load(save(family, tmp_path), device="cpu")
    prompts = policy.encode(["w1 w2 w3 w4 the w5 w6 w7 w8 w9 w10 w11 w12", "mary is in the garden ."])
    found = measure_on_answers(policy, prompts, 4, 0)
    rollout = policy.sample(prompts, 4, seed=0)
    content = rollout.response_mask & (rollout.response_ids >= 10)  # content from id 10 on
    assert found.tokens == int(content.sum()) > 0 and found.method == "answers"
    assert found.scores.shape == policy.attention_shape == (3, 4)
    assert found.logprob == pytest.approx(float(policy.read(rollout).logprobs[content].mean()), abs=1e-5)
    assert torch.equal(measure_on_answers(policy, prompts, 4, 0).scores, found.scores)


def test_answers_without_content_are_an_error_and_never_uniform_weights(policy, monkeypatch):
    monkeypatch.setattr(heads, "response_content", lambda rollout, _classes: torch.zeros_like(rollout.response_mask))
    with pytest.raises(UserError, match="hold no content token; give more prompts"):
        measure_on_answers(policy, policy.encode(["where is mary ?"]))


def test_a_model_that_cannot_read_the_passages_is_told_what_to_do(policy):
    unshipped = Policy(policy.model, policy.tokenizer)
    with pytest.raises(UserError, match="cannot spell the built-in passages; measure them on prompts of yours"):
        copy_heads(unshipped, cache=False)


def test_a_shipped_file_of_other_weights_is_not_taken(policy, tmp_path):
    save_heads(tmp_path, FOUND)
    moved = Policy(policy.model, policy.tokenizer, folder=tmp_path)
    with pytest.raises(UserError, match="cannot spell"):
        copy_heads(moved, cache=False)
    save_heads(tmp_path, replace(FOUND, model=policy.fingerprint()))
    assert torch.equal(copy_heads(moved, cache=False).scores, FOUND.scores)


def test_measured_heads_are_cached_by_the_weights_of_the_model(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("ADHERE_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(heads, "measure_by_copying", lambda p: calls.append(1) or replace(FOUND, model=p.fingerprint()))
    unshipped = Policy(policy.model, policy.tokenizer)
    first, second = copy_heads(unshipped), copy_heads(unshipped)
    assert torch.equal(first.scores, second.scores) and len(calls) == 1
    assert heads.cached(policy.fingerprint()).is_relative_to(tmp_path)


def test_a_sentence_to_repeat_stands_in_its_passage():
    for passage in PASSAGES:
        spans = repeated(passage)
        assert len(spans) == 2 and all(first > 0 and last <= len(passage) for first, last in spans)
        assert all(passage[last - 1] in ".。।" for _, last in spans)


def test_the_fingerprint_is_of_every_weight_and_nothing_else():
    model = build("llama")
    before = fingerprint(model)
    assert fingerprint(build("llama")) == before and len(before) == 32
    assert fingerprint(model.to(torch.bfloat16)) != before
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1e-6
    assert fingerprint(model) != before


def test_the_checksum_is_the_sum_it_says():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    words = values.view(torch.int32).tolist()
    assert checksum(values) == sum(word * (i % 65_521 + 1) for i, word in enumerate(words)) % 2**64


def test_without_its_adapter_a_model_is_the_one_that_the_adapter_was_put_on():
    bare = fingerprint(build("llama"))
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear")).get_base_model()
    assert fingerprint(adapted, adapters=False) == bare != fingerprint(adapted)


def test_the_reference_of_an_adapted_policy_has_the_heads_of_the_start(tmp_path):
    policy = Policy.load(model_path("causal"), device="cpu", lora=Lora(rank=2))
    assert policy.reference().fingerprint() == Policy.load(model_path("causal"), device="cpu").fingerprint()
    assert copy_heads(policy.reference()).method == "answers"


def test_heads_of_a_model_of_another_shape_are_refused(policy):
    with pytest.raises(UserError, match=r"copy heads of a model with 2 layers of 2 heads; this one has \d of \d"):
        Reward.named("attention", policy, FOUND)


def test_a_group_scores_the_same_whatever_else_is_in_the_file(policy):
    """Alone, among fifty rows in any order, in batches of any size: 1e-4 in float32."""
    stories = make_rows("conflict", "test", 25)
    rows = [Row(story["prompt"], response=text) for story in stories for text in (story["answers"][0], story["prior"])]
    alone = [line["reward"] for line in score_rows(Reward.named("attention", policy), rows[:2])]
    for seed, size in ((0, 64), (1, 3)):
        shuffled = random.Random(seed).sample(rows, len(rows))
        found = score_rows(Reward.named("attention", policy), shuffled, batch_size=size)
        here = {(row.prompt, row.response): line["reward"] for row, line in zip(shuffled, found, strict=True)}
        assert [here[row.prompt, row.response] for row in rows[:2]] == pytest.approx(alone, abs=1e-4)


def test_scoring_holds_no_second_network(policy):
    reward = Reward.named("attention", policy)
    assert reward.scorer is policy and reward.reference is None


@pytest.mark.parametrize("place", ["run", "run/own.safetensors"])
def test_saved_heads_come_back_and_leave_nothing_else(place, tmp_path):
    (tmp_path / "run").mkdir()
    path = save_heads(tmp_path / place, FOUND)
    again = load_heads(tmp_path / place)
    assert torch.equal(again.scores, FOUND.scores)
    assert replace(again, scores=FOUND.scores) == FOUND
    assert [p.name for p in (tmp_path / "run").iterdir()] == [path.name]


def test_a_save_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    save_heads(tmp_path, FOUND)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="no room on disk"):
        save_heads(tmp_path, replace(FOUND, tokens=1))
    assert load_heads(tmp_path).tokens == FOUND.tokens
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def broken(folder, tensors, **told):
    known = {"format": "1", "method": "copying", "tokens": "3", "logprob": "-1", "model": "x"}
    save_file(tensors, folder / FILE_NAME, known | told)
    return folder


GOOD = {"scores": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no copy heads here"),
        (lambda p: p, "no copy heads here"),
        (lambda p: (p / FILE_NAME).write_bytes(b"\x10garbage") and p, "is no file of copy heads"),
        (lambda p: broken(p, {"other": torch.ones(1)}), "is no file of copy heads"),
        (lambda p: broken(p, {"scores": torch.ones(4)}), "must be"),
        (lambda p: broken(p, {"scores": torch.tensor([[float("nan"), 1.0]])}), "must be"),
        (lambda p: broken(p, {"scores": torch.tensor([[-1.0, 1.0]])}), "must be"),
        (lambda p: broken(p, {"scores": torch.tensor([[2.0, 1.0]])}), "must be"),
        (lambda p: broken(p, {"scores": torch.zeros(1, 2)}), "not all 0"),
        (lambda p: broken(p, GOOD, method="guessing"), "must be"),
        (lambda p: broken(p, GOOD, format="9"), "has format 9, this version reads 1"),
        (lambda p: broken(p, GOOD, tokens="many"), "is no file of copy heads"),
    ],
)
def test_a_file_that_holds_no_heads_is_refused_by_name(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_heads(make(tmp_path))
