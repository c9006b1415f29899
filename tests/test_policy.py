"""Policy: encode, sample and reading agree with each other and with the plain way, causal and encoder–decoder; prompts
are encoded for the family; the reference stays put; bad checkpoints are refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from adhere.errors import UnsupportedModel, UserError
from adhere.model.policy import Policy
from adhere.model.prefix import plain_forwards
from adhere.model.settings import Lora, Sampling
from tests.families import VOCAB, build, save, tokenizer

PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 ?", "the w7 is in the w9 w10 w11 . where is w7 ?"]
FAMILIES = ["llama", "gemma2", "gpt2", "bart", "t5"]


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory):
    return Policy.load(save(request.param, tmp_path_factory.mktemp(request.param)), device="cpu")


def test_the_replay_of_a_sample_gives_the_log_probs_it_was_drawn_with(policy):
    prompts = policy.encode(PROMPTS)
    rollout = policy.sample(prompts, 5, sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=8), seed=1)
    reading = policy.read(rollout)
    assert rollout.response_ids.shape == reading.logprobs.shape
    assert (rollout.logprobs - reading.logprobs).abs().max() < 1e-4
    assert rollout.prompt_index.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    ends = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1).squeeze(-1) == policy.tokenizer.eos_token_id
    assert torch.equal(rollout.ended, ends)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.4])
def test_reading_while_sampling_is_the_replay_of_the_same_sample(policy, temperature):
    prompts = policy.encode(["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"])
    weights = torch.rand(policy.attention_shape, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=9, temperature=temperature)
    maps = {"attention": None, "copy_attention": weights / weights.sum()}
    read = policy.sample_and_read(prompts, 5, sampling, 4, maps)
    assert torch.equal(read.response_ids, policy.sample(prompts, 5, sampling=sampling, seed=4).response_ids)
    reading = policy.read(read.rollout, copy_weights=maps["copy_attention"])
    for name in ("logprobs", "entropy", "certainty", "attention", "copy_attention"):
        torch.testing.assert_close(getattr(read, name), getattr(reading, name), atol=1e-5, rtol=1e-5)
    assert policy.sample_and_read(prompts, 5, sampling, 4, {}).attention is None


def test_sampling_depends_on_the_seed_alone(policy):
    prompts = policy.encode(PROMPTS)
    draws = [policy.sample(prompts, 4, sampling=Sampling(max_new_tokens=8), seed=s).responses for s in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_takes_a_models_own_habits_and_what_is_given_goes_first():
    generation = GenerationConfig(temperature=0.6, top_p=0.9, max_new_tokens=7)
    assert Sampling.of(generation) == Sampling(temperature=0.6, top_p=0.9)
    assert Sampling.of(generation, temperature=1.2, max_new_tokens=5) == Sampling(1.2, 0.9, 0, 5)
    assert Sampling.of(GenerationConfig()) == Sampling()
    assert Sampling.of(GenerationConfig(top_k=20, typical_p=1.0)) == Sampling(top_k=20)
    with pytest.raises(UserError, match=r"samples with min_p \(0.1\).*set --temperature"):
        Sampling.of(GenerationConfig(min_p=0.1))
    assert Sampling.of(GenerationConfig(min_p=0.1, temperature=0.3), top_p=0.5) == Sampling(0.3, 0.5)


def test_greedy_equals_generate(policy):
    prompts = policy.encode(PROMPTS)
    ours = policy.sample(prompts, 1, sampling=Sampling(temperature=0, max_new_tokens=8))
    theirs = policy.network.generate(
        input_ids=prompts.ids, attention_mask=prompts.mask.long(), do_sample=False, max_new_tokens=8, num_beams=1
    )
    start = 1 if policy.is_encoder_decoder else prompts.ids.shape[1]
    for row, keep, full in zip(ours.response_ids, ours.response_mask, theirs[:, start:], strict=True):
        assert row[keep].tolist() == full[: int(keep.sum())].tolist()


def test_samples_follow_the_distribution_of_the_model(policy):
    """First tokens of 4,000 samples against softmax(logits): total variation within sampling error."""
    prompts = policy.encode(PROMPTS[:1])
    first = policy.sample(prompts, 4000, sampling=Sampling(max_new_tokens=1), seed=3).response_ids[:, 0]
    every = torch.arange(VOCAB)
    rollout = policy.sample(prompts, VOCAB, sampling=Sampling(max_new_tokens=1), seed=0)
    given = type(rollout)(
        prompts, rollout.prompt_index, every[:, None], torch.ones(VOCAB, 1).bool(), rollout.ended, ("",) * VOCAB
    )
    expected = policy.read(given, attention=False).logprobs[:, 0].exp()
    found = torch.bincount(first, minlength=VOCAB) / 4000
    assert abs(float(expected.sum()) - 1) < 1e-4
    assert float((found - expected).abs().sum()) / 2 < 0.06


def test_prompt_attention_is_a_share_of_one(policy):
    reading = policy.read(policy.sample(policy.encode(PROMPTS), 3, sampling=Sampling(max_new_tokens=6)))
    rows = reading.attention.sum(-1)[reading.response_mask]
    assert (rows <= 1 + 1e-5).all() and (rows > 0).all()
    assert (reading.attention[~reading.response_mask] == 0).all()
    assert reading.attention.masked_select(~reading.prompt_mask[:, None, :]).abs().max() < 1e-6
    if policy.is_encoder_decoder:
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def test_replay_in_small_chunks_changes_nothing(policy, monkeypatch):
    rollout = policy.sample(policy.encode(PROMPTS), 4, sampling=Sampling(max_new_tokens=7), seed=5)
    weights = torch.rand(3, 4)
    whole = policy.read(rollout, copy_weights=weights)
    monkeypatch.setattr(policy.reader.budget, "tokens", 1)
    pieces = policy.read(rollout, copy_weights=weights)
    for name in ("logprobs", "entropy", "certainty", "attention", "copy_attention"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-5), name


def test_eager_replay_is_the_same_numbers(policy, tmp_path):
    rollout = policy.sample(policy.encode(PROMPTS), 3, sampling=Sampling(max_new_tokens=6), seed=2)
    policy.network.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    eager = Policy.load(tmp_path, device="cpu", attention="eager")
    ours, theirs = policy.read(rollout), eager.read(rollout)
    assert (ours.attention - theirs.attention).abs().max() <= 1e-5
    assert (ours.logprobs - theirs.logprobs).abs().max() <= 1e-4


def test_the_attention_of_the_question_is_that_of_an_eager_forward(policy, monkeypatch):
    prompts = policy.encode(PROMPTS)
    rollout = policy.sample(prompts, 3, sampling=Sampling(max_new_tokens=6), seed=2)
    question = torch.zeros_like(prompts.mask)
    question[0, -6:-2] = question[1, -3:] = question[2, -4:] = True
    question &= prompts.mask
    weights = torch.rand(policy.attention_shape, generator=torch.Generator().manual_seed(0))
    reading = policy.read(rollout, copy_weights=weights, question=question)
    assert reading.copy_attention is not None
    if policy.is_encoder_decoder:
        expected = reading.copy_attention[:, 0]
    else:
        usual = policy.network.config._attn_implementation
        policy.network.set_attn_implementation("eager")
        positions = (prompts.mask.long().cumsum(-1) - 1).clamp(min=0)
        out = policy.network(
            prompts.ids, attention_mask=prompts.mask.long(), position_ids=positions, output_attentions=True
        )
        policy.network.set_attn_implementation(usual)
        combined = sum(torch.einsum("h,bhqk->bqk", w, maps) for w, maps in zip(weights, out.attentions, strict=True))
        mean = (combined * question[..., None]).sum(1) / question.sum(-1, keepdim=True).clamp(min=1)
        expected = mean[rollout.prompt_index]
    torch.testing.assert_close(reading.question_attention, expected, atol=1e-5, rtol=1e-4)
    plain = policy.read(rollout, copy_weights=weights)
    torch.testing.assert_close(reading.copy_attention, plain.copy_attention, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(policy.reader.budget, "tokens", 1)
    pieces = policy.read(rollout, copy_weights=weights, question=question)
    torch.testing.assert_close(pieces.question_attention, expected, atol=1e-5, rtol=1e-4)


def test_entropy_and_certainty_by_their_definitions(policy):
    rollout = policy.paired(PROMPTS, ["garden .", "w3", "in the w9"])
    reading = policy.read(rollout)
    logprobs = next(plain_forwards(policy.network, rollout)).logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    certainty = -logprobs.mean(-1) - torch.log(torch.tensor(float(VOCAB)))
    kept = rollout.response_mask
    assert torch.allclose(reading.entropy[kept], entropy[kept], atol=1e-4)
    assert torch.allclose(reading.certainty[kept], certainty[kept], atol=1e-3)


@pytest.mark.parametrize("spread", [(), ("entropy",), ("certainty",)])
def test_only_the_statistics_that_are_asked_for_are_read(policy, spread):
    rollout = policy.paired(PROMPTS, ["garden .", "w3", "in the w9"])
    whole, reading = policy.read(rollout), policy.read(rollout, attention=False, spread=spread)
    observed = policy.sample_and_read(rollout.prompts, 1, Sampling(max_new_tokens=2), 0, {}, spread=spread)
    torch.testing.assert_close(reading.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
    for name in ("entropy", "certainty"):
        assert (getattr(observed, name) is not None) == (name in spread)
        if name in spread:
            torch.testing.assert_close(getattr(reading, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
        else:
            assert getattr(reading, name) is None
    assert len(reading.select(torch.tensor([0, 2])).rollout) == 2


def test_given_pairs_keep_their_order_and_neighbours_group(policy):
    rollout = policy.paired([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]], ["garden", "w1", "w2", "w3"])
    assert rollout.prompt_index.tolist() == [0, 0, 1, 2]
    assert rollout.ended.all()
    alone = policy.read([PROMPTS[1]], ["w2"])
    together = policy.read(rollout)
    assert torch.allclose(together.logprobs[2, :2], alone.logprobs[0], atol=1e-5)


def test_prompts_are_padded_for_the_family(policy):
    mask = policy.encode(PROMPTS).mask
    padded = mask[1]
    assert bool(padded[0]) == policy.is_encoder_decoder
    assert bool(padded[-1]) != policy.is_encoder_decoder


def test_the_reference_does_not_move(policy):
    reference = policy.reference()
    before = reference.read(PROMPTS, ["w1", "w2", "w3"]).logprobs
    weight = policy.network.get_input_embeddings().weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    moved = policy.read(PROMPTS, ["w1", "w2", "w3"]).logprobs
    assert torch.equal(reference.read(PROMPTS, ["w1", "w2", "w3"]).logprobs, before)
    assert not torch.allclose(moved, before)
    with torch.no_grad():
        weight.copy_(saved)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_lora_needs_no_second_copy_and_saves_a_plain_model(family, tmp_path):
    policy = Policy.load(save(family, tmp_path / "base"), device="cpu", lora=Lora(rank=4, alpha=8))
    reference = policy.reference()
    assert reference.network is policy.network
    before = reference.read(PROMPTS, ["w1", "w2", "w3"]).logprobs
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    after = policy.read(PROMPTS, ["w1", "w2", "w3"]).logprobs
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(reference.read(PROMPTS, ["w1", "w2", "w3"]).logprobs, before)
    policy.save(tmp_path / "merged")
    plain = Policy.load(tmp_path / "merged", device="cpu")
    assert torch.allclose(plain.read(PROMPTS, ["w1", "w2", "w3"]).logprobs, after, atol=1e-4)


def test_copy_hits_of_a_policy_do_not_depend_on_chunks(policy, monkeypatch):
    rollout = policy.sample(policy.encode(PROMPTS), 4, sampling=Sampling(max_new_tokens=6), seed=9)
    copied = rollout.prompts.ids[rollout.prompt_index].unsqueeze(1) == rollout.response_ids.unsqueeze(-1)
    whole, logprob = policy.copy_hits(rollout, rollout.response_mask, copied)
    monkeypatch.setattr(policy.reader.budget, "tokens", 1)
    again = policy.copy_hits(rollout, rollout.response_mask, copied)
    assert torch.equal(again[0], whole) and again[1] == pytest.approx(logprob, abs=1e-5)
    assert whole.shape == (3, 4)


CHAT = "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} {% endfor %}w0 :"


def test_chat_messages_mark_what_the_template_wrote(tmp_path):
    words = tokenizer()
    words.chat_template = CHAT
    build("llama").save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    prompts = Policy.load(tmp_path, device="cpu").encode([[{"role": "w1", "content": "where is mary ?"}]])
    assert prompts.texts == ("<bos> w1 : where is mary ? w0 :",)
    assert prompts.template[0].tolist() == [True, True, True, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["  "], r"prompt 1: the prompt is empty"),
        (["w1 " * 200], r"prompt 1: the prompt has 200 tokens, the model's context holds 128"),
        ([[{"role": "user", "content": "hi"}]], r"prompt 1: messages, but the tokenizer has no chat template"),
        ([], "no prompts"),
    ],
)
def test_prompts_that_cannot_be_encoded(tmp_path, prompts, message):
    with pytest.raises(UserError, match=message):
        Policy.load(save("llama", tmp_path), device="cpu").encode(prompts)


def spoil_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def spoil_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def spoil_end(folder):
    words = tokenizer()
    words.eos_token = None
    words.save_pretrained(folder)


def spoil_vocabulary(folder):
    words = tokenizer()
    words.add_tokens(["brand", "new"])
    words.save_pretrained(folder)


def spoil_config(folder):
    (folder / "config.json").unlink()


def spoil_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_pickle, "pickle weights only"),
        (spoil_tokenizer, "holds no tokenizer"),
        (spoil_end, "no end-of-sequence token"),
        (spoil_vocabulary, "ids up to 65, the model embeds 64"),
        (spoil_config, "no config.json"),
        (spoil_family, "cannot be loaded"),
    ],
)
def test_checkpoints_that_are_refused(tmp_path, spoil, message):
    save("llama", tmp_path)
    spoil(tmp_path)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        Policy.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    words = tokenizer()
    words.pad_token = None
    build("llama").save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, device="cpu")
    short, long = policy.read(PROMPTS[1:2], ["w5"]), policy.read(PROMPTS[:2], ["w5 w6", "w5"])
    assert torch.allclose(short.logprobs[0], long.logprobs[1, :2], atol=1e-5)


def test_the_saved_model_loads_without_adhere(policy, tmp_path):
    policy.save(tmp_path)
    if not policy.is_encoder_decoder:
        attention = policy.network.config._attn_implementation
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        ids = policy.encode(PROMPTS[:1]).ids
        assert torch.allclose(plain(ids).logits, policy.network(ids).logits, atol=1e-5)
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("family", ["gemma2", "t5gemma"])
def test_a_soft_cap_is_never_left_out(family, tmp_path):
    """SDPA has none: what is loaded runs on eager attention, and what was loaded otherwise is refused."""
    policy = Policy.load(save(family, tmp_path), device="cpu")
    assert policy.network.config._attn_implementation == "eager"
    policy.network.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedModel, match=r"SDPA leaves out the soft cap.*attn_implementation='eager'"):
        Policy(policy.network, policy.tokenizer)


def test_a_family_that_bypasses_the_interface_is_served_by_eager_attention(tmp_path):
    config = AutoConfig.for_model(
        "led", vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=4, pad_token_id=0,
        decoder_start_token_id=2, eos_token_id=2, bos_token_id=1, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'led'.*--attention eager"):
        Policy.load(tmp_path, device="cpu").read(PROMPTS, ["w1", "w2", "w3"])
    reading = Policy.load(tmp_path, device="cpu", attention="eager").read(PROMPTS, ["w1 w2", "w2", "w3"])
    rows = reading.attention.sum(-1)[reading.response_mask]
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def test_responses_that_are_all_empty_have_nothing_to_read(policy):
    rollout = policy.respond(policy.encode(PROMPTS), [[], [], []], torch.arange(3))
    reading = policy.read(rollout)
    assert reading.logprobs.shape == reading.entropy.shape == (3, 0)
    some = policy.read(policy.respond(policy.encode(PROMPTS), [[], [7, 8], []], torch.arange(3)))
    assert (some.logprobs != 0).tolist() == [[False, False], [True, True], [False, False]]
    weights = torch.rand(policy.attention_shape)
    asked = policy.read(reading.rollout, copy_weights=weights, question=reading.rollout.prompts.mask)
    assert asked.question_attention.shape == (3, reading.rollout.prompts.ids.shape[1])
