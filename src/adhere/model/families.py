"""Where a family keeps the attention that reaches the prompt, and what it cannot do.

Rules, not a table of names: they hold for every family that follows transformers' conventions, and `capture.verify`
compares the outcome with eager attention before any reward is computed from it.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from adhere.errors import UnsupportedModel


def prompt_attention_modules(model: PreTrainedModel) -> frozenset[int]:
    """The ids of the modules whose attention reaches the prompt: in an encoder–decoder the decoder's attention that is
    not causal, elsewhere every module of the model."""
    if not model.config.is_encoder_decoder:
        return frozenset(id(module) for module in model.modules())
    decoder = model.get_decoder()
    return frozenset(id(module) for module in decoder.modules() if not getattr(module, "is_causal", True))


def layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of encoder and decoder, in order; none of a family that does not mark them as such."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def attention_layers(model: PreTrainedModel) -> int:
    """How many layers' attention reaches the prompt; recurrent layers of a hybrid do not count.

    Raises `UnsupportedModel` for a family whose attention modules do not say what they are."""
    if model.config.is_encoder_decoder:
        if count := len(prompt_attention_modules(model)):
            return count
        raise bypasses(model)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return int(config.num_hidden_layers)
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def shareable(model: PreTrainedModel) -> bool:
    """Whether the key/value cache of this model can be expanded from prompts to responses. A recurrent state cannot."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    return not model._is_stateful and all(kind in ("full_attention", "sliding_attention") for kind in kinds)


def decoder_start(model: PreTrainedModel) -> int:
    """The token that every decoder sequence of an encoder–decoder begins with.

    Raises `UnsupportedModel` where the configuration names none."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(model.generation_config, "decoder_start_token_id", None)
    if start is None:
        raise UnsupportedModel(
            f"the {model.config.model_type!r} configuration names no decoder_start_token_id",
            fix="set it in the model's config.json",
        )
    return int(start)


def soft_capped(config: PretrainedConfig) -> bool:
    """Whether attention scores pass through a soft cap (Gemma 2), which SDPA cannot apply. Before transformers 5.21 it
    leaves the cap out without a word."""
    parts = [config.get_text_config(decoder=True), getattr(config, "encoder", None)]
    return any(getattr(part, "attn_logit_softcapping", None) for part in parts)


def refuse_dropped_soft_cap(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` where the forwards of `model` leave out its soft cap: log-probs would be another
    model's."""
    if model.config._attn_implementation == "sdpa" and soft_capped(model.config):
        raise UnsupportedModel(
            f"SDPA leaves out the soft cap on attention scores of the family {model.config.model_type!r}",
            where=model.config.name_or_path or None,
            fix="load it with attn_implementation='eager'",
        )


def bypasses(model: PreTrainedModel) -> UnsupportedModel:
    """The error for a family whose attention does not pass through transformers' attention interface."""
    return UnsupportedModel(
        f"the family {model.config.model_type!r} keeps attention away from transformers' attention interface",
        fix="load it with attention='eager' (--attention eager): exact, but slower and with full maps in memory",
    )
