"""LoRA, as PEFT knows it: adapters put on a network to be trained, and adapters of a folder merged into their base.

Only LoRA: what a prompt or prefix adapter adds is no weight, so it can be neither merged nor read as attention.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from adhere.errors import UnsupportedModel, UserError
from adhere.model.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    PICKLED,
    WEIGHTS,
    one_line,
    read_json,
    require_whole,
)
from adhere.model.precision import quantised, require_finite
from adhere.model.settings import Lora

ALL_LINEAR = ("all-linear",)
SHOWN = 3
"""Names of weights that an error tells; the rest are counted."""


def add(network: PreTrainedModel, lora: Lora) -> PeftModel:
    """New adapters on `network`, their weights float32; the base is frozen.

    Raises `UserError`: no such modules, or one whose weight is tied to another's, which merging would change too."""
    task = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    named = lora.target_modules != ALL_LINEAR
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=list(lora.target_modules) if named else ALL_LINEAR[0],
        task_type=task,
    )
    if tied := _tied(network).intersection(lora.target_modules):
        raise UserError(
            f"target_modules names {', '.join(sorted(tied))}, which shares its weight with the embedding",
            fix="leave it out: merged, the adapter would change both",
        )
    with _quiet_peft():
        try:
            return get_peft_model(network, config).eval()
        except ValueError as error:  # PEFT found none of them, or some that it has no adapter for
            names = ", ".join(lora.target_modules)
            raise UserError(f"no adapter for target_modules {names}", fix=_linear_names(network)) from error


def find(path: str) -> Path | None:
    """The folder (for a hub id, that of the cache) of the adapter at `path`; None where there is no adapter."""
    with one_line("cannot be loaded", path, "give a folder or hub id that transformers can load"):
        found = find_adapter_config_file(path)
    return None if found is None else Path(found).parent


def base_of(path: str, folder: Path) -> str:
    """The model that the adapter in `folder` belongs to: a folder, or a hub id.

    A relative path is tried from where we are and from the adapter's own folder. Raises `UnsupportedModel`: no name, a
    path where nothing is, or a model beside the adapter that is not the one it names.
    """
    config, where = read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    beside = (folder / CONFIG).exists() and any((folder / name).exists() for name in (WEIGHTS, INDEX))
    fix = f"set base_model_name_or_path to the model that the adapter was trained on{', `.` for this' * beside}"
    if not isinstance(named, str) or not named:
        if beside:
            return path
        raise UnsupportedModel("names no base model", where=where, fix=fix)
    places = [place for place in (Path(named).expanduser(), folder / named) if place.is_dir()]
    if beside and not any(place.samefile(folder) for place in places):
        raise UnsupportedModel(
            f"is an adapter for {named}, but a model lies beside it: it could be merged into that already",
            where=where,
            fix=f"move one of the two to a folder of its own, or {fix}",
        )
    if beside:
        return path
    places = [place for place in places if not place.samefile(folder)]
    if not places and (Path(named).is_absolute() or named.startswith((".", "~")) or named.count("/") > 1):
        raise UnsupportedModel(f"its base model {named} is not there", where=where, fix=fix)
    return str(places[0]) if places else named


def merge(network: PreTrainedModel, path: str, folder: Path) -> PreTrainedModel:
    """`network` with the adapter in `folder` merged into its weights, which can be trained as before.

    Raises `UnsupportedModel`: an adapter that is not LoRA, pickled or damaged weights, weights that fit other modules.
    """
    where = str(folder)
    fix = "give an adapter that was trained on this base with PEFT"
    if quantised(network):
        what = "its base is quantised: merging would round the adapter away"
        raise UnsupportedModel(what, where=where, fix="merge it into the base in full precision")
    with one_line("the adapter cannot be read", where, fix):
        config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedModel(f"the adapter is {kind}, not LoRA", where=where, fix="merge it with PEFT first")
    weights = load_file(_weights(path, folder))
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    with one_line("the adapter does not fit its base", where, fix), _quiet_peft():
        adapted = get_peft_model(network, config)
        result: Any = set_peft_model_state_dict(adapted, weights)
        missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save.default" in name]
        for what, names in (("lacks", missing), ("holds, but its base has no place for,", result.unexpected_keys)):
            if names:
                raise UnsupportedModel(f"the adapter {what} {some(names)}", where=where, fix=fix)
        merged = adapted.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.__dict__.pop("peft_config", None)  # some versions of PEFT leave it, and warn of it at the next adapter
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    return merged


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the network with its adapters merged into its weights, float32; `model` stays as it is.

    In bfloat16 the sum of weight and update would be rounded, and most of the update with it. Weights that have no
    adapter and are float32 already, the embedding above all, are shared with `model` rather than copied.
    Raises `UserError` where the base is quantised."""
    if quantised(model):
        raise UserError("an adapter cannot be merged into quantised weights", fix="use --save adapter")
    kept = {
        id(weight): weight
        for name, weight in model.named_parameters()
        if ".base_layer." not in name and "lora_" not in name and weight.dtype == torch.float32
    }
    found = copy.deepcopy(model, kept).float().merge_and_unload()
    assert isinstance(found, PreTrainedModel)
    return found


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapters alone, for `PeftModel.from_pretrained(base, folder)`.

    Raises `RunFailed` where a weight is not finite."""
    require_finite(model.named_parameters())
    # Left to itself PEFT asks the hub whether the vocabulary has grown. It has not: no token was added.
    model.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def dropout(network: PreTrainedModel) -> Iterator[None]:
    """Within this context the dropout of LoRA adapters is active; all other dropout stays off.

    So does that of an adapter on the language-model head: the backward pass runs the head again, out of this context.
    """
    head = {id(module) for module in network.get_output_embeddings().modules()}
    active = [
        part
        for name, module in network.named_modules()
        if name.endswith("lora_dropout")
        for part in module.modules()
        if isinstance(part, nn.Dropout) and id(part) not in head
    ]
    for part in active:
        part.train()
    try:
        yield
    finally:
        for part in active:
            part.eval()


def some(names: Any) -> str:
    """The first names of many, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _weights(path: str, folder: Path) -> Path:
    """The adapter's safetensors, fetched from the hub where `path` is not a folder."""
    file = folder / ADAPTER_WEIGHTS
    if not Path(path).is_dir():
        with one_line("its weights cannot be fetched", path, "give an adapter saved as safetensors"):
            file = Path(hf_hub_download(path, ADAPTER_WEIGHTS))
    elif not file.exists():
        pickled = any(other.suffix in PICKLED for other in folder.glob("adapter_model*"))
        what = "holds a pickled adapter only, which can run code when loaded" if pickled else f"holds no {file.name}"
        raise UnsupportedModel(what, where=str(folder), fix="save it again with PEFT, which writes safetensors")
    require_whole(file.parent)
    return file


def _tied(network: PreTrainedModel) -> set[str]:
    """The last names of modules whose weight is that of another module."""
    pairs = dict(getattr(network, "all_tied_weights_keys", None) or {})
    return {name.split(".")[-2] for name in [*pairs, *pairs.values()] if "." in name}


def _linear_names(network: PreTrainedModel) -> str:
    head = network.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in network.named_modules()
             if isinstance(module, nn.Linear) and module is not head}  # fmt: skip
    return f"choose among {', '.join(sorted(names))}, or leave it out for all of them"


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads an attribute of the network that transformers 5 calls deprecated. No other warning is hidden."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
