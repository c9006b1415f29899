"""Tokenizers with the chat templates of well-known families, and tiny models that read them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from adhere.model.policy import Policy

_EACH = "{% for m in messages %}"
_CHATML = _EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
_ASK = "{% if add_generation_prompt %}"
_REFUSALS = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _EACH
    + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    + "{% endif %}{% endfor %}"
)

TEMPLATES = {
    "llama3": "{{ bos_token }}"
    + _EACH
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    + "{% endfor %}"
    + _ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "chatml": "{% if messages[0]['role'] != 'system' %}"
    + "{{ '<|im_start|>system\nYou are a helpful assistant named Mary.<|im_end|>\n' }}{% endif %}"
    + _CHATML
    + _ASK
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma": "{{ bos_token }}"
    + _REFUSALS
    + _EACH
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    + "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _ASK
    + "{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": "{{ bos_token }}"
    + _REFUSALS
    + _EACH
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    "qwen3": _EACH
    + "{% set said = m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] %}"
    + "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    + _ASK
    + "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "thinker": _CHATML + _ASK + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
}
END = {
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
    "thinker": "<|im_end|>",
}
"""What ends a turn. The tokenizer's own end is `</s>`."""
TAKES_SYSTEM = ("llama3", "chatml", "qwen3", "thinker")
SPECIAL = ["<pad>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<start_of_turn>"]
TEXT = """Mary went to the garden. John is in the office. Where is Mary? Question: Where is John? Answer: the kitchen
You are a helpful assistant named Mary. user assistant system model Be brief. The capital of France is Paris."""


def bpe(family: str | None = None, *, start: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template of `family`; `start`, `end`: what it adds to every text by itself."""
    special = [*SPECIAL, *dict.fromkeys(END.values()), "<think>", "</think>"]
    special = list(dict.fromkeys(special))
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    core.train_from_iterator(
        [TEXT] * 4,
        BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False),
    )
    if start or end:
        core.post_processor = TemplateProcessing(
            single=" ".join(["<s>"] * start + ["$A"] + ["</s>"] * end), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    words = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=sorted(set(END.values()) - {"</s>"}),
    )
    words.chat_template = None if family is None else TEMPLATES[family]
    return words


def policy_of(words: PreTrainedTokenizerFast, *, encoder: bool = False, **options) -> Policy:
    """A tiny random model that reads these words; `options` are the policy's."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(words)}
    if encoder:
        config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **ids)
        return Policy(T5ForConditionalGeneration(config).eval(), words, **options)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **ids
    )
    return Policy(LlamaForCausalLM(config).eval(), words, **options)
