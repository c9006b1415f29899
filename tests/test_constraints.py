"""Decoding constraints of generation_config: obeyed in sampling and in reading alike, against transformers' `generate`
and the scores it gives; or refused by name."""

from __future__ import annotations

import pytest
import torch

from adhere.errors import RunFailed, UnsupportedModel
from adhere.learn.learner import Learner
from adhere.model.constraints import OBEYED, Constraints
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from tests.families import VOCAB, build, save, tokenizer

PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 w3 w4 w3 ?", "the w7 is in the w9 w10 w11 . where is w7 ?"]
FAMILIES = ["llama", "bart", "t5"]
MANY = list(range(4, 40))
CONSTRAINTS = {
    "sequence_bias": [[[40], 9.0], [[40, 41], 20.0]],
    "encoder_repetition_penalty": 1.5,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in MANY] + [[41, 42], [42, 43]],
    "min_length": 15,
    "min_new_tokens": 5,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": MANY,
    "begin_suppress_tokens": [2, *MANY],
}


def constrained(family, **constraints):
    policy = Policy(build(family), tokenizer())
    policy.network.generation_config.update(**constraints)
    return policy


def test_each_constraint_that_is_obeyed_is_tried_here():
    assert set(CONSTRAINTS) == set(OBEYED)


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_draw_and_its_reading_are_those_of_generate(family, name):
    policy = constrained(family, **{name: CONSTRAINTS[name]})
    sampling = Sampling(temperature=0, max_new_tokens=8)
    rollout = policy.sample(policy.encode(PROMPTS), 1, sampling=sampling)
    reading = policy.read(rollout, attention=False)
    assert (reading.logprobs - rollout.logprobs).abs().max() < 1e-4
    for row, prompt in enumerate(PROMPTS):
        ids = policy.encode([prompt]).ids
        theirs = policy.network.generate(
            ids, do_sample=False, max_new_tokens=8, return_dict_in_generate=True, output_scores=True
        )
        kept = rollout.response_ids[row][rollout.response_mask[row]]
        start = 1 if policy.is_encoder_decoder else ids.shape[1]
        assert kept.tolist() == theirs.sequences[0, start:].tolist()
        scores = torch.cat(theirs.scores).log_softmax(-1)
        expected = scores.gather(1, kept[:, None])[:, 0]
        assert torch.allclose(reading.logprobs[row][: len(kept)], expected, atol=1e-4)
        entropy = -(scores.exp() * scores.masked_fill(scores == -torch.inf, 0)).sum(-1)
        assert torch.allclose(reading.entropy[row][: len(kept)], entropy, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_constraints_together_hold_in_draw_reading_and_learning(family):
    policy = constrained(
        family, min_new_tokens=3, suppress_tokens=[5, 6], repetition_penalty=1.3, no_repeat_ngram_size=3,
        forced_eos_token_id=2, bad_words_ids=[[7], [8, 9]],
    )  # fmt: skip
    sampling = Sampling(temperature=0.7, max_new_tokens=9)
    rollout = policy.sample(policy.encode(PROMPTS), 6, sampling=sampling, seed=3)
    said = [row[kept].tolist() for row, kept in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    assert all(2 not in row[:3] and not {5, 6, 7} & set(row) for row in said)
    assert all(row[-1] == 2 for row in said if len(row) == 9)
    reading = policy.read(rollout)
    assert (reading.logprobs - rollout.logprobs).abs().max() < 1e-4
    observed = policy.sample_and_read(rollout.prompts, 6, sampling, 3, {"attention": None})
    for name in ("logprobs", "entropy", "certainty", "attention"):
        torch.testing.assert_close(getattr(observed, name), getattr(reading, name), atol=1e-4, rtol=1e-4)
    learner = Learner(policy, value_head=False)
    out = learner(rollout)
    assert torch.allclose(out.logprobs, reading.logprobs, atol=1e-4)
    assert torch.allclose(out.entropy, reading.entropy, atol=1e-4)
    out.logprobs.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.network.parameters() if p.grad is not None)


def test_an_end_that_is_forced_at_the_limit_does_not_end_a_response():
    policy = constrained("bart", forced_eos_token_id=2, sequence_bias=[[[2], 2.0]])
    rollout = policy.sample(policy.encode(PROMPTS), 100, sampling=Sampling(max_new_tokens=4), seed=0)
    cut = rollout.lengths == 4
    assert cut.any() and (~cut).any()
    assert torch.equal(rollout.ended, ~cut)
    last = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    assert (last == 2).all()
    # Where it was forced nothing else could have come.
    for logprobs in (rollout.logprobs, policy.read(rollout).logprobs):
        assert logprobs[cut, 3].eq(0).all()
        assert logprobs[~cut].gather(1, rollout.lengths[~cut, None] - 1).lt(-1e-3).all()


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_given_response_is_read_without_the_constraint_it_breaks(family):
    """Someone else's words: their log-prob is the model's own, never minus infinity; the rest stays constrained."""
    free = Policy(build(family), tokenizer())
    policy = constrained(family, suppress_tokens=[tokenizer().convert_tokens_to_ids("garden")])
    unconstrained, reading = (p.read(PROMPTS[:1], ["the garden ."]) for p in (free, policy))
    assert torch.isfinite(reading.logprobs).all()
    assert torch.allclose(reading.logprobs[0, 1], unconstrained.logprobs[0, 1], atol=1e-5)
    assert (reading.logprobs[0, [0, 2, 3]] > unconstrained.logprobs[0, [0, 2, 3]]).all()


def test_a_text_begins_with_the_token_that_the_model_forces():
    policy = constrained("bart", forced_bos_token_id=9)
    drawn = policy.sample(policy.encode(PROMPTS), sampling=Sampling(max_new_tokens=6), seed=1)
    assert (drawn.response_ids[:, 0] == 9).all() and drawn.logprobs[:, 0].eq(0).all()
    given = policy.paired(PROMPTS, ["garden", "", "w1"])
    assert (given.response_ids[:, 0] == 9).all()
    assert policy.read(given).logprobs[:, 0].eq(0).all()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_sampling_cannot_obey_is_refused_by_name_when_it_is_loaded(family, tmp_path):
    folder = save(family, tmp_path)
    config = build(family).generation_config
    config.guidance_scale = 2.5
    config.save_pretrained(folder)
    with pytest.raises(
        UnsupportedModel, match=r"guidance_scale \(2.5\).*remove it from generation_config.json"
    ) as caught:
        Policy.load(folder, device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_constraints_has_none():
    policy = constrained("llama", repetition_penalty=1.0, suppress_tokens=[], min_length=0, no_repeat_ngram_size=0)
    assert policy.constraints is None


def test_constraints_that_leave_nothing_to_say_are_told():
    policy = constrained("llama", suppress_tokens=list(range(VOCAB)))
    with pytest.raises(RunFailed, match=r"leaves no token to say \(suppress_tokens\)"):
        policy.sample(policy.encode(PROMPTS), sampling=Sampling(max_new_tokens=2))


def test_padding_is_no_part_of_what_may_not_be_repeated():
    """Penalties read each prompt without its padding, so that neighbours change nothing."""
    policy = constrained("llama", repetition_penalty=2.0, no_repeat_ngram_size=1)
    rules = Constraints.of(policy.network, [2])
    prompts = policy.encode(["w1", "w2 w3 w4 w5"])
    given = torch.zeros(2, 0, dtype=torch.long)
    logits = torch.ones(2, VOCAB)
    limit = torch.zeros(2, dtype=torch.bool)
    together = rules.apply(logits, prompts.ids, prompts.mask, given, limit)
    assert together[0].isfinite().sum() == VOCAB - 1 and together[1].isfinite().sum() == VOCAB - 4
