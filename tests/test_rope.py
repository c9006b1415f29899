"""RoPE that depends on length (LongRoPE, dynamic NTK): log-probs of a draw, of a reading and of the plain forward of
each row alone agree below, across and above the switch, whoever the neighbours are; gradients too; other kinds of RoPE
share their prefixes as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adhere.learn.learner import Learner
from adhere.model.context import context_length
from adhere.model.policy import Policy
from adhere.model.rope import depends_on_length
from adhere.model.settings import Sampling
from adhere.reward.preference import logits
from tests.families import LENGTH_ROPE, SWITCH, build, tokenizer

# Within, across and beyond the switch at 16: prompts of 5, 9 and 18 words, responses of 2, 11 and 16 tokens.
PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14", "w1 w2 w3 " * 6]
RESPONSES = ["w1", "w2 w3 w4 w5 w6 w7 w8 w9 w10 w11", "w3 " * 15]


@pytest.fixture(scope="module", params=LENGTH_ROPE)
def policy(request):
    return Policy(build(request.param), tokenizer())


def every_pair(policy):
    prompts = [prompt for prompt in PROMPTS for _ in RESPONSES]
    return policy.paired(prompts, RESPONSES * len(PROMPTS))


def plain(network, rollout, row):
    """Log-probs of one row by a plain forward of its prompt and its whole response."""
    place = int(rollout.prompt_index[row])
    prompt = rollout.prompts.ids[place][rollout.prompts.mask[place]].tolist()
    response = rollout.response_ids[row][rollout.response_mask[row]]
    if network.config.is_encoder_decoder:
        given = torch.tensor([[network.config.decoder_start_token_id, *response.tolist()[:-1]]])
        seen = torch.ones_like(given)  # else T5Gemma masks a padding token that was drawn
        out = network(
            torch.tensor([prompt]), decoder_input_ids=given, decoder_attention_mask=seen, use_cache=False
        ).logits[0]
    else:
        out = network(torch.tensor([[*prompt, *response.tolist()]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (out / rollout.temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0]


@torch.no_grad()
def worst(policy, rollout, logprobs):
    """The largest difference to the plain forward of each row alone, by a copy that has seen no other."""
    return max(
        float(
            (plain(copy.deepcopy(policy.network), rollout, row) - logprobs[row][rollout.response_mask[row]]).abs().max()
        )
        for row in range(len(rollout))
    )


def test_a_reading_is_the_plain_forward_of_each_row_alone(policy):
    assert depends_on_length(policy.network)
    rollout = every_pair(policy)
    reading = policy.read(rollout, copy_weights=torch.ones(3, 4) / 12)
    assert worst(policy, rollout, reading.logprobs) < 1e-4
    assert torch.allclose(reading.attention, reading.copy_attention, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_attention_to_the_prompt_is_that_of_the_row_alone(name):
    policy = Policy(build(name), tokenizer())
    rollout = every_pair(policy)
    together = policy.read(rollout)
    for row in range(len(rollout)):
        alone = policy.read(rollout.compact(torch.tensor([row])).rollout)
        kept, prompt = rollout.response_mask[row], together.prompt_mask[row]
        assert torch.allclose(together.attention[row][kept][:, prompt], alone.attention[0], atol=1e-5)


@pytest.mark.parametrize("room", [4, 12], ids=["on either side", "across"])
def test_a_draw_gives_the_log_probs_of_its_finished_rows(policy, room):
    prompts = policy.encode(PROMPTS)
    sampling = Sampling(temperature=0.8, max_new_tokens=room)
    rollout = policy.sample(prompts, 2, sampling=sampling, seed=2)
    assert worst(policy, rollout, rollout.logprobs) < 1e-4
    reading = policy.read(rollout)
    assert (rollout.logprobs - reading.logprobs).abs().max() < 1e-4
    observed = policy.sample_and_read(prompts, 2, sampling, 2, {"attention": None})
    assert torch.equal(observed.response_ids, rollout.response_ids)
    for name in ("logprobs", "entropy", "attention"):
        assert torch.allclose(getattr(observed, name), getattr(reading, name), atol=1e-4)


def test_a_greedy_draw_is_that_of_generate(policy):
    ours = policy.sample(policy.encode(PROMPTS), 1, sampling=Sampling(temperature=0, max_new_tokens=10))
    # Phi-3's own `generate` computes the keys anew where the factors switch; without a cache every model does.
    cached = "dynamic" in str(policy.network.config.get_text_config(decoder=True).rope_parameters)
    for row, prompt in enumerate(PROMPTS):
        ids = policy.encode([prompt]).ids
        theirs = copy.deepcopy(policy.network).generate(ids, do_sample=False, max_new_tokens=10, use_cache=cached)
        kept = ours.response_ids[row][ours.response_mask[row]]
        start = 1 if policy.is_encoder_decoder else ids.shape[1]
        assert kept.tolist() == theirs[0, start : start + len(kept)].tolist()


def test_gradients_are_those_of_the_plain_forwards(policy):
    rollout = every_pair(policy)
    weights = torch.linspace(-1, 2, rollout.response_mask.numel()).view_as(rollout.response_mask)
    policy.network.zero_grad()
    (Learner(policy, value_head=False)(rollout).logprobs * weights).sum().backward()
    ours = {name: p.grad for name, p in policy.network.named_parameters() if p.grad is not None}
    theirs = {name: torch.zeros_like(gradient) for name, gradient in ours.items()}
    for row in range(len(rollout)):
        alone = copy.deepcopy(policy.network)
        alone.zero_grad()
        (plain(alone, rollout, row) * weights[row][rollout.response_mask[row]]).sum().backward()
        for name, p in alone.named_parameters():
            theirs[name] += 0 if p.grad is None else p.grad
    apart = sum((ours[name] - theirs[name]).square().sum() for name in ours) ** 0.5
    assert apart <= 1e-4 * sum(gradient.square().sum() for gradient in theirs.values()) ** 0.5


def test_reading_leaves_no_frequencies_behind(policy):
    """Dynamic NTK would keep those of the longest row it has seen: someone's own forward is what it was."""
    ids = torch.arange(3, 3 + SWITCH + 2)[None]
    given = {"decoder_input_ids": ids} if policy.is_encoder_decoder else {}
    with torch.no_grad():
        before = policy.network(ids, **given).logits
        policy.read(every_pair(policy))
        policy.sample(policy.encode(PROMPTS), sampling=Sampling(max_new_tokens=12))
        after = policy.network(ids, **given).logits
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_a_reward_model_reads_each_row_as_alone(name):
    config = build(name).config
    config.num_labels = 1
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [list(range(3, 3 + length)) for length in (4, 16, 17, 30, 17)]
    with torch.no_grad():
        alone = torch.stack([copy.deepcopy(network)(torch.tensor([row])).logits.squeeze() for row in rows])
        assert torch.allclose(logits(network, rows), alone, atol=1e-5)


def test_dynamic_ntk_stretches_the_context():
    assert context_length(build("llama dynamic")) == 8 * SWITCH
    assert context_length(build("llama")) == context_length(build("phi3 longrope")) == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ],
    ids=["linear", "yarn", "llama3"],
)  # fmt: skip
def test_other_kinds_do_not_depend_on_length(rope):
    config = build("llama").config
    config.rope_parameters = {**rope, "rope_theta": 1e4}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    assert not depends_on_length(network)
    policy = Policy(network, tokenizer())
    rollout = every_pair(policy)
    assert worst(policy, rollout, policy.read(rollout).logprobs) < 1e-4
