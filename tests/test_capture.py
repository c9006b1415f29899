"""Captured attention equals eager `output_attentions`, family by family: decoder-only and cross-attention, left and
right padding, unequal lengths, grouped keys, sliding windows, soft caps and sinks; refusals name the family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adhere.errors import UnsupportedModel, UserError
from adhere.model.accumulate import CopyHits, WeightedMap
from adhere.model.capture import IMPLEMENTATION, capture, verify
from adhere.model.families import attention_layers
from tests.families import CAUSAL, SEQ2SEQ, VOCAB, build

PROMPT, RESPONSE = 13, 6


def eager_maps(model, inputs):
    """Every map of an eager forward: [L, B, H, Q, S]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    model.set_attn_implementation(before)
    return torch.stack(out.cross_attentions if model.config.is_encoder_decoder else out.attentions)


def batch(model, side):
    """Three sequences of unequal length, padded on `side`, and the rows and columns that are worth comparing."""
    torch.manual_seed(3)
    lengths = torch.tensor([PROMPT, PROMPT - 4, PROMPT - 9])
    places = torch.arange(PROMPT)
    mask = places[None] < lengths[:, None] if side == "right" else places[None] >= PROMPT - lengths[:, None]
    ids = torch.randint(3, VOCAB, (3, PROMPT)) * mask
    extra = torch.randint(3, VOCAB, (3, RESPONSE))
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": extra, "use_cache": False}
        return inputs, slice(0, RESPONSE), slice(0, PROMPT)
    whole = torch.cat([mask, torch.ones(3, RESPONSE, dtype=torch.bool)], dim=1).long()
    inputs = {"input_ids": torch.cat([ids, extra], dim=1), "attention_mask": whole, "use_cache": False}
    return inputs, slice(PROMPT - 1, PROMPT + RESPONSE - 1), slice(0, PROMPT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_capture_equals_eager_attention(family, side):
    model = build(family)
    inputs, rows, columns = batch(model, side)
    maps = eager_maps(model, inputs)
    weights = torch.rand(maps.shape[0], maps.shape[2])
    weights /= weights.sum()
    shape = (3, rows.stop - rows.start, PROMPT)
    uniform, weighted = WeightedMap(shape, model.device), WeightedMap(shape, model.device, weights)
    implementation = model.config._attn_implementation
    with capture(model, rows, columns, [uniform, weighted]):
        model(**inputs)
    assert model.config._attn_implementation == implementation
    expected = maps[..., rows, columns]
    counted = (
        inputs["attention_mask"].bool()[:, rows]
        if not model.config.is_encoder_decoder
        else torch.ones(3, RESPONSE).bool()
    )
    difference = (uniform.result() - expected.mean((0, 2))).abs()[counted].max()
    assert difference <= 1e-5, f"{family}: {difference:.1e}"
    difference = (weighted.result() - torch.einsum("lh,lbhrc->brc", weights, expected)).abs()[counted].max()
    assert difference <= 1e-5, f"{family}, weighted: {difference:.1e}"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_output_of_the_own_attention_function_equals_eager(family):
    """Soft caps and sinks are not in SDPA, so while capturing the forward itself runs on our function."""
    model = build(family)
    inputs, rows, columns = batch(model, "left")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs).logits
    keep = WeightedMap((3, RESPONSE, PROMPT), model.device)
    with capture(model, rows, columns, [keep]):
        found = model(**inputs).logits
    counted = inputs["attention_mask"].bool()
    assert (found - expected).abs()[counted].max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5", "gemma2"])
def test_copy_hits_count_the_rows_whose_most_attended_token_is_the_target(family):
    model = build(family)
    inputs, rows, columns = batch(model, "left")
    maps = eager_maps(model, inputs)[..., rows, columns]
    prompt = inputs["input_ids"][:, :PROMPT]
    best = torch.stack([prompt[b][maps[:, b].argmax(-1)] for b in range(3)], dim=1)  # [L, B, H, rows]
    targets = best[0, :, 0].clone()  # so that head (0, 0) always hits
    counted = torch.ones(3, RESPONSE, dtype=torch.bool)
    counted[1, 2:] = False
    hits = CopyHits(prompt[:, None, :] == targets[..., None], counted)
    with capture(model, rows, columns, [hits]):
        model(**inputs)
    expected = ((best == targets[None, :, None]) & counted[None, :, None]).sum((1, 3))
    assert torch.equal(hits.result(), expected)
    assert hits.result()[0, 0] == counted.sum()


def test_tiles_of_any_size_give_the_same_map(monkeypatch):
    model = build("qwen3")
    inputs, rows, columns = batch(model, "left")
    found = []
    for elements in (1, 10_000_000):
        monkeypatch.setattr("adhere.model.capture.TILE_ELEMENTS", elements)
        keep = WeightedMap((3, RESPONSE, PROMPT), model.device)
        with capture(model, rows, columns, [keep]):
            model(**inputs)
        found.append(keep.result())
    assert torch.allclose(found[0], found[1], atol=1e-7)


def test_layers_without_weight_are_not_computed():
    model = build("llama")
    inputs, rows, columns = batch(model, "left")
    weights = torch.zeros(3, 4)
    weights[1, 2] = 1.0
    keep = WeightedMap((3, RESPONSE, PROMPT), model.device, weights)
    assert [keep.wants(layer) for layer in range(3)] == [False, True, False]
    with capture(model, rows, columns, [keep]):
        model(**inputs)
    assert torch.allclose(keep.result(), eager_maps(model, inputs)[1, :, 2][:, rows, columns], atol=1e-6)


def test_weights_of_another_model_are_refused():
    model = build("llama")
    inputs, rows, columns = batch(model, "left")
    keep = WeightedMap((3, RESPONSE, PROMPT), model.device, torch.full((3, 8), 1 / 24))
    with pytest.raises(UserError, match=r"\[3, 8\].*4 heads"), capture(model, rows, columns, [keep]):
        model(**inputs)


def test_bfloat16_capture_passes_the_self_check():
    verify(build("llama").to(torch.bfloat16))


def test_a_family_that_bypasses_the_interface_is_refused_by_name():
    config = AutoConfig.for_model(
        "led", vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=4, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"'led'.*eager"):
        verify(AutoModelForSeq2SeqLM.from_config(config).eval())


def test_a_forward_that_skips_layers_is_refused():
    """A model whose configuration promises more attention layers than its forward runs must not pass silently."""
    model = build("llama")
    model.model.layers = model.model.layers[:2]
    with pytest.raises(UnsupportedModel, match="'llama'"):
        verify(model)


def test_the_self_check_sees_attention_that_eager_does_not_have(monkeypatch):
    model = build("llama")
    from adhere.model import capture as module

    honest = module._Scores.probabilities
    monkeypatch.setattr(module._Scores, "probabilities", lambda self, b, r: honest(self, b, r).roll(1, -1))
    with pytest.raises(UnsupportedModel, match="differs from eager"):
        verify(model)


def test_hybrid_models_count_their_attention_layers_only():
    config = AutoConfig.for_model(
        "lfm2", vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert attention_layers(model) == 1
    verify(model)
    assert model.config._attn_implementation != IMPLEMENTATION
