"""When memory runs out: half the tokens at a time, said once, and the same numbers; one forward too large is an error;
the logits of a large vocabulary are never all there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adhere.errors import RunFailed
from adhere.model.chunks import chunks
from adhere.model.memory import TokenBudget, out_of_memory
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from tests.families import build, tokenizer

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
PROMPTS = ["w1 w2 w3"] * 5 + ["w4 w5"] * 2 + ["w6"]
RESPONSES = ["w1 w2 w3 w4", "w5", "w6 w7", "", "w8 w9", "w1", "w2 w3", "w4 w5 w6"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU)], ids=["cuda", "cpu"]
)
def test_work_is_done_with_half_the_tokens_until_it_fits(error, caplog):
    tried = []

    def work(tokens):
        tried.append(tokens)
        if tokens > 300:
            raise error
        return tokens

    budget = TokenBudget(1000)
    with caplog.at_level("WARNING"):
        assert budget.run(work, least=10) == 250
        assert budget.run(work, least=10) == 250
    assert tried == [1000, 500, 250, 250]
    assert [r.message.split(" at most ")[1] for r in caplog.records] == [
        "500 tokens at a time",
        "250 tokens at a time",
    ]


def test_other_errors_pass_and_one_forward_too_large_is_told():
    def fail(error):
        raise error

    with pytest.raises(RuntimeError, match="shape"):
        TokenBudget(100).run(lambda tokens: fail(RuntimeError("shape mismatch")), least=1)
    with pytest.raises(RunFailed, match=r"out of memory with 60 tokens at a time; use fewer samples") as caught:
        TokenBudget(100).run(lambda tokens: fail(RuntimeError(CPU)), least=60)
    assert caught.value.exit_code == 1


def test_what_the_cpu_says_when_its_memory_is_full():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def scarce(network, rows):
    """A network whose forwards fail with more than `rows` rows, as they do on a full device."""

    def check(_module, _args, given):
        ids = given.get("input_ids")
        if ids is not None and len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return network.get_decoder().register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_reading_that_does_not_fit_is_read_in_smaller_pieces(family, caplog):
    policy = Policy(build(family), tokenizer())
    rollout = policy.paired(PROMPTS, RESPONSES)
    copied = rollout.prompts.ids[rollout.prompt_index].unsqueeze(1) == rollout.response_ids.unsqueeze(-1)
    whole, (hits, logprob) = policy.read(rollout), policy.copy_hits(rollout, rollout.response_mask, copied)
    mass = policy.head_mass(rollout, rollout.prompts.mask[rollout.prompt_index].float())
    handle = scarce(policy.network, 2)
    with caplog.at_level("WARNING"):
        pieces = policy.read(rollout)
        for name in ("logprobs", "entropy", "certainty", "attention"):
            assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-5), name
        found = policy.copy_hits(rollout, rollout.response_mask, copied)
        assert torch.equal(found[0], hits) and found[1] == pytest.approx(logprob, abs=1e-5)
        again = policy.head_mass(rollout, rollout.prompts.mask[rollout.prompt_index].float())
    assert torch.allclose(again, mass, atol=1e-5)
    halvings = len(caplog.records)
    policy.read(rollout)
    assert len(caplog.records) == halvings > 0
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bart", "t5", "phi3 longrope"])
def test_samples_are_the_same_however_many_are_drawn_at_a_time(family):
    policy = Policy(build(family), tokenizer())
    prompts, sampling = policy.encode(["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]), Sampling(max_new_tokens=9)
    each = prompts.ids.shape[1] + 9
    whole = policy.sample(prompts, 5, sampling=sampling, seed=3)
    assert len({tuple(row) for row in whole.response_ids.tolist()}) > 10
    for rows in (1, 4, 7):
        policy.drawing.tokens = rows * each
        parts = policy.sample(prompts, 5, sampling=sampling, seed=3)
        assert torch.equal(parts.response_ids, whole.response_ids) and torch.equal(parts.ended, whole.ended)
        assert torch.allclose(parts.logprobs, whole.logprobs, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_samples_read_as_they_are_drawn_are_the_same_however_many_at_a_time(family):
    policy = Policy(build(family), tokenizer())
    prompts, sampling = policy.encode(["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]), Sampling(max_new_tokens=9)
    whole = policy.sample_and_read(prompts, 5, sampling, 3, {"attention": None})
    policy.drawing.tokens = 4 * (prompts.ids.shape[1] + 9)
    parts = policy.sample_and_read(prompts, 5, sampling, 3, {"attention": None})
    assert torch.equal(parts.response_ids, whole.response_ids)
    for name in ("logprobs", "entropy", "certainty", "attention"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-5), name


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_draw_that_does_not_fit_is_drawn_in_smaller_parts(family, caplog):
    policy = Policy(build(family), tokenizer())
    prompts, sampling = policy.encode(["w1 w2 w3", "w4 w5 w6"]), Sampling(max_new_tokens=6)
    whole = policy.sample(prompts, 4, sampling=sampling, seed=1)
    handle = scarce(policy.network, 2)
    with caplog.at_level("WARNING"):
        parts = policy.sample(prompts, 4, sampling=sampling, seed=1)
    assert torch.equal(parts.response_ids, whole.response_ids)
    tokens = 8 * (prompts.ids.shape[1] + 6)
    said = "out of memory: from here on at most {} tokens at a time"
    assert [record.message for record in caplog.records] == [said.format(tokens // 2), said.format(tokens // 4)]
    policy.sample(prompts, 4, sampling=sampling, seed=1)
    assert len(caplog.records) == 2, "said once"
    handle.remove()


def test_chunks_cut_a_large_group_and_lose_no_row():
    policy = Policy(build("llama"), tokenizer())
    rollout = policy.paired(PROMPTS, RESPONSES)
    places = rollout.prompts.ids.shape[1]
    for most in (1, 12, 20, 10_000):
        seen = []
        for chunk in chunks(policy.network, rollout, most):
            part, rows, columns, span = chunk.rollout, chunk.rows, chunk.columns, chunk.span
            picked = torch.arange(len(rollout))[rows]
            seen += picked.tolist()
            assert len(part) == 1 or part.prompts.ids.numel() + part.response_ids.numel() <= max(most, 1)
            assert torch.equal(rollout.response_ids[rows, columns], part.response_ids)
            asked = rollout.prompts.ids[rollout.prompt_index[picked]][:, span]
            assert torch.equal(asked, part.prompts.ids[part.prompt_index]) and span.stop <= places
        assert seen == list(range(len(rollout)))


LARGE_VOCABULARY = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from adhere.learn.learner import Learner
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from benchmarks.memory import peak_mb
from tests.families import CAUSAL, tokenizer

torch.set_num_threads(1)
config = AutoConfig.for_model("gemma3_text", **{**CAUSAL["gemma3_text"], "vocab_size": 200_000})
policy = Policy(AutoModelForCausalLM.from_config(config).eval(), tokenizer())
rollout = policy.paired(["w1 w2 w3"] * 16, ["w5 " * 40] * 16)
policy.read(rollout.compact(torch.arange(1)).rollout)
print(peak_mb(lambda: policy.read(rollout)))
learner = Learner(policy, value_head=False)
learner(rollout.compact(torch.arange(1)).rollout).logprobs.sum().backward()
print(peak_mb(lambda: learner(rollout).logprobs.sum().backward()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_logits_of_a_large_vocabulary_are_never_all_there():
    """16 × 41 tokens of 200,000 logits would be 500 MB at once, and three or four copies of it."""
    command = [sys.executable, "-c", LARGE_VOCABULARY]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    reading, learning = map(float, out.stdout.split())
    assert reading < 400
    assert learning < 500
