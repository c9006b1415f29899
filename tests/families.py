"""Tiny random models of many families, built from configuration: what the capture and prefix tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 64
T5_IS_EAGER = Version(transformers.__version__) < Version("5.15")
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_experts": 2}

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "phi3": _SMALL,
    "smollm3": _SMALL,
    "olmo2": _SMALL,
    "gpt_neox": {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
    "opt": {
        **{k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "head_dim", "intermediate_size")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "gpt2": _GPT2,
    "mistral": {**_SMALL, **_WINDOW},
    "gemma2": {**_SMALL, **_WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_SMALL, **_WINDOW, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_SMALL, **_WINDOW, **_EXPERTS},
    "cohere": _SMALL,
    "granite": _SMALL,
    "mixtral": {**_SMALL, **_EXPERTS},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "pegasus": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "t5gemma": {},
}

SWITCH = 16
"""Tokens at which the RoPE of the models below changes."""
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": SWITCH,
    "factor": 8.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
LENGTH_ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": ("phi3", {"original_max_position_embeddings": SWITCH, "rope_parameters": _LONGROPE}),
    "phimoe longrope": (
        "phimoe",
        {**_EXPERTS, "rope_parameters": {**_LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3}},
    ),
    "qwen2 longrope": ("qwen2", {"rope_parameters": _LONGROPE}),
    "llama dynamic": ("llama", {"max_position_embeddings": SWITCH, "rope_parameters": _DYNAMIC}),
    "gemma3_text dynamic": (
        "gemma3_text",
        {
            **_WINDOW,
            "max_position_embeddings": SWITCH,
            "rope_parameters": {"sliding_attention": _PLAIN_ROPE, "full_attention": _DYNAMIC},
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "t5gemma longrope": ("t5gemma", {"rope_parameters": _LONGROPE}),
    "t5gemma dynamic": ("t5gemma", {"max_position_embeddings": SWITCH, "rope_parameters": _DYNAMIC}),
}
"""RoPE that depends on length: name → family and what its configuration adds."""


def build(name: str) -> PreTrainedModel:
    """A tiny model of a family (or of `LENGTH_ROPE`) with random weights, large enough that attention is far from
    uniform."""
    torch.manual_seed(0)
    family, added = LENGTH_ROPE.get(name, (name, {}))
    if family in ("t5", "mt5") and T5_IS_EAGER:
        pytest.skip("T5 passes through the attention interface from transformers 5.15 on")
    if family == "t5gemma":
        config = _t5gemma(added)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    elif family not in SEQ2SEQ:
        config = AutoConfig.for_model(family, **{**CAUSAL.get(family, _SMALL), **added})
        capped = "attn_logit_softcapping" in CAUSAL.get(family, {})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None)
    else:
        config = AutoConfig.for_model(family, **SEQ2SEQ[family])
        model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def _t5gemma(added: dict[str, Any]) -> Any:
    part = {
        **_SMALL,
        **_WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "vocab_size": VOCAB,
        **added,
    }
    config = AutoConfig.for_model(
        "t5gemma", encoder=part, decoder={**part, "cross_attention_hidden_size": 32}, vocab_size=VOCAB
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return config


WORDS = [f"w{i}" for i in range(VOCAB - 12)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `VOCAB` ids: pad, bos, eos, unk, a few real words and w0, w1, …"""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "is", "in", ".", "?", "where", "mary", "garden", *WORDS]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save(family: str, folder: Path) -> Path:
    """A tiny model of `family` and its tokenizer in `folder`, as `save_pretrained` writes them."""
    build(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
