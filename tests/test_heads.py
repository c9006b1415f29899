"""Copy heads: weights from hits, measured on a real model's own samples, saved whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from adhere.errors import RunFailed, UserError
from adhere.model.policy import Policy
from adhere.reward.heads import FILE_NAME, copy_weights, load_heads, measure, save_heads
from adhere.reward.salience import token_classes
from tests.families import save


def test_weights_are_the_heads_shares_of_the_hits():
    hits = torch.tensor([[6, 0], [1, 1]])
    for total in (10, torch.tensor(10)):
        weights = copy_weights(hits, total)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, torch.tensor([[0.75, 0.0], [0.125, 0.125]]))


@pytest.mark.parametrize(("total", "message"), [(0, "hold no content token"), (9, "in 9 content tokens no head")])
def test_no_hits_are_an_error_and_never_uniform_weights(total, message):
    with pytest.raises(UserError, match=message):
        copy_weights(torch.zeros(2, 2, dtype=torch.long), total)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_measuring_counts_on_the_policys_own_content_tokens(family, tmp_path):
    policy = Policy.load(save(family, tmp_path), device="cpu")
    prompts = policy.encode(["w1 w2 w3 w4 the w5 w6 w7 w8 w9 w10 w11 w12", "mary is in the garden ."])
    classes = token_classes(policy.tokenizer)
    hits, total = measure(policy, prompts, 4, 0, classes)
    rollout = policy.sample(prompts, 4, seed=0)
    assert total == int((rollout.response_mask & (rollout.response_ids >= 10)).sum()) > 0  # content from id 10 on
    assert hits.shape == (3, 4) and hits.min() >= 0 and hits.max() <= total
    assert torch.equal(measure(policy, prompts, 4, 0, classes)[0], hits)


def test_saved_heads_come_back_and_leave_nothing_else(tmp_path):
    weights = torch.tensor([[0.25, 0.75]])
    path = save_heads(tmp_path / "run", weights)
    assert path == tmp_path / "run" / FILE_NAME
    assert torch.equal(load_heads(tmp_path / "run"), weights)
    save_heads(tmp_path / "run", weights.flip(1).T)
    assert torch.equal(load_heads(tmp_path / "run"), weights.flip(1).T)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_a_save_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    weights = torch.tensor([[0.25, 0.75]])
    save_heads(tmp_path, weights)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="no room on disk"):
        save_heads(tmp_path, torch.ones(1, 2) / 2)
    assert torch.equal(load_heads(tmp_path), weights)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def broken(tmp_path, tensors):
    save_file(tensors, tmp_path / FILE_NAME)
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "no copy-head weights here"),
        (lambda p: (p / FILE_NAME).write_text("{}") and p, "not a safetensors file"),
        (lambda p: broken(p, {"other": torch.ones(1, 1)}), "must be"),
        (lambda p: broken(p, {"copy_weights": torch.ones(4) / 4}), "must be"),
        (lambda p: broken(p, {"copy_weights": torch.tensor([[float("nan"), 1.0]])}), "must be"),
        (lambda p: broken(p, {"copy_weights": torch.tensor([[-1.0, 2.0]])}), "must be"),
        (lambda p: broken(p, {"copy_weights": torch.ones(1, 2)}), "sum to 2, not 1"),
    ],
)
def test_what_is_no_head_file_is_said_by_name(tmp_path, make, message):
    with pytest.raises(UserError, match=rf"{FILE_NAME}: .*{message}"):
        load_heads(make(tmp_path))
