"""Which model this is, as a short text: the same for the same weights, another after any training."""

from __future__ import annotations

import json
from hashlib import blake2b

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PERIOD = 65_521
_PERIODS = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(network: PreTrainedModel, *, adapters: bool = True) -> str:
    """32 hexadecimal digits of the architecture and of every weight. `adapters=False` leaves LoRA weights out.

    Exact and independent of device and thread count, because the checksum of a tensor is a sum of integers. Weights in
    another dtype are other weights.
    """
    digest = blake2b(digest_size=16)
    config = network.config.get_text_config(decoder=True)
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    digest.update(json.dumps(shape).encode())
    seen: set[int] = set()
    for name, weight in sorted(network.named_parameters(remove_duplicate=False)):
        if weight.data_ptr() in seen or (not adapters and ".lora_" in name):
            continue
        seen.add(weight.data_ptr())
        key = (name.replace(".base_layer", ""), list(weight.shape), str(weight.dtype), checksum(weight.detach()))
        digest.update(json.dumps(key).encode())
    return digest.hexdigest()


def checksum(values: Tensor) -> int:
    """Σ bits_i · (i mod 65,521 + 1) mod 2^64, over the bit patterns of `values`: depends on each value and its place.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    words = values.contiguous().view(-1).view(_WORDS[values.element_size()])
    whole = len(words) // _PERIOD * _PERIOD
    # Summed by place first, so that the long pass over the weights is one addition each.
    # A few periods at a time, because the sum makes 64 bits of every word before it adds them.
    sums = torch.zeros(_PERIOD, dtype=torch.int64, device=words.device)
    for periods in words[:whole].view(-1, _PERIOD).split(_PERIODS):
        sums += periods.sum(0, dtype=torch.int64)
    sums[: len(words) - whole] += words[whole:]
    return int((sums * torch.arange(1, _PERIOD + 1, device=words.device)).sum()) % 2**64
