"""A checkpoint, from a folder or the hub, made into a network and a tokenizer that fit each other.

The one place that loads a network: policies, reward models and embedders. Every weight of the network comes from the
file, and every weight of the file has its place; safetensors only. What libraries raise becomes one line.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as speech

from adhere.errors import UnsupportedModel, UserError
from adhere.model import adapters
from adhere.model.adapters import some
from adhere.model.checkpoint_files import (
    CONFIG,
    has_tokenizer,
    one_line,
    require_model,
    require_tokenizer,
    require_whole,
    stored,
    weight_files,
)
from adhere.model.embedded import located
from adhere.model.families import soft_capped
from adhere.model.memory import give_back
from adhere.progress import Progress, silent

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADABLE = "give a folder or hub id that transformers can load"
PACKED = 16
"""Numbers of the network that one stored number may stand for, at most: quantised weights are packed."""
LAYERS = 1_000
"""Layers that any configuration may ask for: they are laid out in a moment, and some families count others than theirs
(Qwen 2's `max_window_layers`)."""
NO_ADAPTER = {"subfolder": ".no-adapter"}
"""Keeps transformers from applying an adapter by itself, frozen and without a look at its weights."""


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, then Apple's MPS, then the CPU."""
    if device != "auto":
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"unknown device {device!r}", fix="use cpu, cuda, cuda:0, mps or auto") from error
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (found.index or 0) >= there.get(found.type, math.inf):
            raise UserError(f"no device {device!r} on this machine", fix="use cpu or auto")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load `path` (a folder, a hub id or `toy-causal`, `toy-encdec`), causal or encoder–decoder as its configuration
    says, in evaluation mode.

    The folder may hold a LoRA adapter: its base is loaded and the adapter merged into it. Dropout stays off for good:
    the log-probs of an update must be those of the sample.
    Raises `UnsupportedModel`: no configuration, no tokenizer, no end-of-sequence token, pickle weights, a damaged file,
    weights that are missing or left over, or a vocabulary larger than the embedding.
    """
    model = load_network(
        path,
        lambda config: AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM,
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    _fit(model, tokenizer, path)
    give_back()  # what reading a large vocabulary took
    return model, tokenizer


def load_network(
    path: str,
    kind: Callable[[PretrainedConfig], Any],
    *,
    other_head: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> PreTrainedModel:
    """The network at `path`, in evaluation mode, of the auto class that `kind` picks from its configuration.

    `other_head`: the file may hold another head than the network, which gives way, and need not hold the network's;
    `settings` go before those of config.json. Raises `UnsupportedModel` as `load` does.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    path = located(path)
    adapter = _adapter(path)
    if adapter is not None and (base := adapters.base_of(path, adapter)) != path:
        named: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "attention": attention,
            "trust_remote_code": trust_remote_code,
            "progress": progress,
        }
        load_base = partial(load_network, base, kind, other_head=other_head, **named, **settings)
        return adapters.merge(_base_of(path, base, load_base), path, adapter)
    if Path(path).is_dir():
        require_model(Path(path))
    place = pick_device(device)
    with _damage_named(path):
        with one_line("cannot be loaded", _config_of(path), _remedy(trust_remote_code)):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)
            written, _ = PretrainedConfig.get_config_dict(path)
        if getattr(config, "quantization_config", "") is None:  # written as null, which transformers before 5.11 reads
            del config.quantization_config
        _choose_attention(config, attention, written, path)
        with one_line(*_refusal(config, path)), in_place_of_bars(progress):
            if (folder := Path(path) if Path(path).is_dir() else _cached(path)) is not None and weight_files(folder):
                _require_size(config, kind(config), folder, trust_remote_code)
            network, found = kind(config).from_pretrained(
                path,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are told by name, below
                adapter_kwargs=NO_ADAPTER,
                trust_remote_code=trust_remote_code,
                **({"device_map": {"": place}} if _quantiser(config) else {}),
            )
    _require_every_weight(network, found, written, path, other_head)
    if not _quantiser(config):
        torch.nn.Module.to(network, place)
    if adapter is not None:
        network = adapters.merge(network, path, adapter)
    network.eval()
    assert isinstance(network, PreTrainedModel)
    return network


def _require_size(config: PretrainedConfig, kind: Any, folder: Path, trust_remote_code: bool) -> None:
    """Raise `UnsupportedModel` where config.json asks for far more than the weights hold: it would be allocated first.

    Layers are counted before the network is laid out, which takes time for each, and then its numbers, without any
    memory for them."""
    tensors, numbers = stored(folder)
    where, fix = str(folder / CONFIG), "give the config.json that belongs to the weights"
    for name, value in _sizes(config.to_dict()):
        if "layer" in name and value > max(tensors, LAYERS):
            raise UnsupportedModel(f"{name} is {value:,}, and the weights are {tensors} tensors", where=where, fix=fix)
    with torch.device("meta"):
        network = kind.from_config(config, trust_remote_code=trust_remote_code)
    if (asked := sum(weight.numel() for weight in network.parameters())) > PACKED * numbers:
        what = f"describes a network of {asked:,} numbers, and the weights hold {numbers:,}"
        raise UnsupportedModel(what, where=where, fix=fix)


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and of those within it, by name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif isinstance(value, int):
            yield str(name), value


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Where what was fetched of a hub id cannot be loaded because a file is damaged, say which."""
    try:
        yield
    except UnsupportedModel:
        if (cached := _cached(path)) is not None:
            require_whole(cached)
        raise


@contextmanager
def in_place_of_bars(progress: Progress) -> Iterator[None]:
    """As long as the block runs, `progress` shows the loops that transformers would draw bars of its own for: weights
    that are loaded, files that are written."""

    def shown(bar: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        items = given[0] if given else named.get("iterable")
        if not isinstance(items, Collection):
            return bar(*given, **named)
        return progress(items, str(named.get("desc", "loading")).lower(), len(items))

    before = speech.set_tqdm_hook(shown)
    try:
        yield
    finally:
        speech.set_tqdm_hook(before)


def _base_of(path: str, base: str, load_base: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The base of the adapter at `path`; an error names both."""
    try:
        return load_base()
    except UnsupportedModel as error:
        raise UnsupportedModel(error.what, where=f"{path}, its base {error.where or base}", fix=error.fix) from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`; where an adapter has none of its own, that of its base.

    Raises `UnsupportedModel`: no tokenizer, or one that cannot be read."""
    path = located(path)
    adapter = _adapter(path)
    if adapter is not None and not has_tokenizer(adapter) and (base := adapters.base_of(path, adapter)) != path:
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
    folder = Path(path)
    if folder.is_dir():
        require_tokenizer(folder)
        require_whole(folder)
    named = folder / "tokenizer.json"
    with one_line("the tokenizer cannot be loaded", str(named if named.exists() else path), LOADABLE):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _adapter(path: str) -> Path | None:
    """The folder of the adapter at `path`, if one is there. Raises `UnsupportedModel` where `path` is no folder."""
    if not Path(path).is_dir() and (Path(path).exists() or path.startswith((".", "/", "~"))):
        raise UnsupportedModel("is not a folder", where=path, fix="give a model folder or a hub id")
    return adapters.find(path)


def _cached(path: str) -> Path | None:
    """The folder of the cache that holds what was fetched of a hub id."""
    if Path(path).is_dir():
        return None
    try:
        found = try_to_load_from_cache(path, CONFIG)
    except ValueError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def _choose_attention(config: PretrainedConfig, attention: str, written: Mapping[str, Any], where: str) -> None:
    """Set the attention implementation: `auto` is what the configuration says, where this machine has that.

    Older versions of transformers left a private `_attn_implementation` in config.json, which is no wish of anybody's:
    that gives way to the default. Raises `UnsupportedModel` for a written `attn_implementation` that is not there."""
    if attention != "auto":
        config._attn_implementation = attention
        return
    if soft_capped(config):
        config._attn_implementation = "eager"
        return
    asked = config._attn_implementation
    if not isinstance(asked, str) or not asked.startswith("flash_attention") or importlib.util.find_spec("flash_attn"):
        return
    if "attn_implementation" in written:
        raise UnsupportedModel(
            f"config.json asks for {asked}, which is not installed",
            where=where,
            fix="take attn_implementation out of config.json (the default reads the same), or use --attention eager",
        )
    config._attn_implementation = None


def _quantiser(config: PretrainedConfig) -> str | None:
    """How the weights are quantised, in transformers' word; None where they are not."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return None if said is None else str(getattr(method, "value", method))


def _refusal(config: PretrainedConfig, path: str) -> tuple[str, str, str]:
    """What is said where no network can be made: what, where, fix. The files of the weights are known to be whole."""
    if (method := _quantiser(config)) is None:
        return "no model can be made of it", _config_of(path), LOADABLE
    what = f"its weights are quantised ({method}) and cannot be loaded"
    return what, path, "install what they need, or give the model unquantised"


def _config_of(path: str) -> str:
    """Where the configuration is, for an error."""
    return str(Path(path) / CONFIG) if Path(path).is_dir() else path


def _remedy(trust_remote_code: bool) -> str:
    return LOADABLE if trust_remote_code else f"{LOADABLE}; --trust-remote-code runs code that comes with a model"


def _require_every_weight(
    network: PreTrainedModel, found: dict[str, Any], written: Mapping[str, Any], where: str, other_head: bool
) -> None:
    """Raise `UnsupportedModel` unless the file gave every weight its value, and each of its own had a place.

    Weights that are tied, and those that a family is known to store needlessly, transformers has left out already."""
    fix = "give the whole checkpoint, with the config.json that belongs to it"
    if written.get("tie_word_embeddings") is False and _is_tied(network):  # T5 ties a head that is not in the file
        found["missing_keys"].add("lm_head.weight")
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"], key=lambda key: str(key[0]))
        more = len(found["mismatched_keys"]) - 1
        what = f"{name} is {list(stored)} in the file and {list(wanted)} by config.json"
        raise UnsupportedModel(f"{what}, and {more} more" if more else what, where=where, fix=fix)
    told = {"missing_keys": "lacks the weights", "unexpected_keys": "holds weights that config.json has no place for:"}
    for key, what in told.items():
        if odd := [name for name in found[key] if not other_head or _in_body(network, name)]:
            raise UnsupportedModel(f"{what} {some(odd)}", where=where, fix=fix)


def _is_tied(network: PreTrainedModel) -> bool:
    """Whether the head reads the embedding's own weight."""
    head = network.get_output_embeddings()
    return head is not None and head.weight is network.get_input_embeddings().weight


def _in_body(network: PreTrainedModel, name: str) -> bool:
    """Whether a weight belongs to what lies below the head. A pooler is a head too: not every checkpoint has one."""
    part = name.removeprefix(f"{network.base_model_prefix}.").split(".")[0]
    return part != "pooler" and part in dict(network.base_model.named_children())


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UnsupportedModel(
            "the tokenizer has no end-of-sequence token", where=where, fix='set one: tokenizer.eos_token = "</s>"'
        )
    if tokenizer.pad_token_id is None:
        # Every mask is carried beside the ids, so what fills the padding is never read.
        tokenizer.pad_token = tokenizer.eos_token
    rows = embedding_rows(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UnsupportedModel(
            f"the tokenizer has ids up to {largest}, the model embeds {rows}",
            where=where,
            fix="use the tokenizer the model was trained with, or model.resize_token_embeddings",
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can read."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]
