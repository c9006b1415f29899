"""Copy heads: the attention heads that look at the prompt token being repeated. A property of the model alone.

The model reads a passage and repeats one of its sentences by teacher forcing; a head scores where its most-attended
prompt position is exactly the position being repeated. A few heads in several hundred do so nearly always, all others
nearly never, so an average over all heads would hide them. Nothing is sampled and no user prompt takes part.

A model that never learned to repeat (a tiny or untrained one) has to be measured on its own answers to given prompts
instead, by an explicit call. How heads were measured, and on which weights, is part of the record.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adhere.errors import UnsupportedModel, UserError
from adhere.files import atomic_write
from adhere.progress import phase
from adhere.reward.passages import PASSAGES, repeated
from adhere.reward.salience import response_content, token_classes, user_tokens
from adhere.reward.signals import NO_WORD
from adhere.reward.words import Spelling
from adhere.types import Prompts, Rollout

if TYPE_CHECKING:
    from adhere.model.policy import Policy

FILE_NAME = "heads.safetensors"
FORMAT = "1"
Method = Literal["copying", "answers"]

# The first tokens of a repeated sentence say which sentence it is; nothing in the prompt foretells them.
_LEAD = 2
# A passage of which a tokenizer knows less than this cannot be read, and its positions tell nothing apart.
_READABLE = 0.95
# On models that repeat (135M to 270M parameters) the best head scores above 0.9; untrained ones stay below 0.1.
_LEAST_SCORE = 0.3
# Tokens of a piece, padding included: each is shown as it is done, and a forward of fewer takes no longer a token.
_PIECE_TOKENS = 2048
# Enough samples to tell a copy head (0.4 of its tokens) from the rest (0.05) on a few prompts.
ANSWERS = 4


@dataclass(frozen=True)
class CopyHeads:
    """Copy heads of one model, and how they were measured."""

    scores: Tensor
    """[L, H] float32 in [0, 1]: share of the repeated tokens whose prompt position the head attends to most."""
    method: Method
    """`copying`: sentences of built-in passages were repeated; `answers`: the model answered given prompts."""
    tokens: int
    """Tokens that were counted."""
    logprob: float
    """Mean log-prob of those tokens, nats: near 0 where a model repeats surely."""
    model: str
    """Fingerprint of the model (`adhere.model.fingerprint`)."""

    @property
    def weights(self) -> Tensor:
        """[L, H] float32, ∝ scores, sum 1: the weights of `Reading.copy_attention`."""
        return (self.scores.double() / self.scores.double().sum()).float()

    def top(self, count: int) -> list[tuple[int, int, float]]:
        """(layer, head, score) of the `count` highest scores."""
        values, places = self.scores.flatten().sort(descending=True, stable=True)
        heads = self.scores.shape[1]
        return [(p // heads, p % heads, v) for p, v in zip(places[:count].tolist(), values.tolist(), strict=False)]


def copy_heads(policy: Policy, *, cache: bool = True) -> CopyHeads:
    """The copy heads of a model: those shipped with its folder, else those in the user's cache, else measured now.

    Raises `UserError` where the model does not repeat what it reads.
    """
    with phase(policy.progress, "looking up copy heads"):  # the fingerprint reads every weight
        model = policy.fingerprint()
        places = ([policy.folder / FILE_NAME] if policy.folder is not None else []) + ([cached(model)] if cache else [])
        for place in places:
            if place.is_file() and (found := load_heads(place)).model == model:
                return found
    measured = measure_by_copying(policy)
    if cache:
        save_heads(places[-1], measured)
    return measured


def cached(model: str) -> Path:
    """Where the heads of the model with this fingerprint are kept: in ADHERE_CACHE, or in the user's cache folder."""
    return Path(os.environ.get("ADHERE_CACHE") or user_cache_dir("adhere")) / "heads" / f"{model}.safetensors"


def measure_by_copying(policy: Policy) -> CopyHeads:
    """Copy heads from the built-in passages, by teacher forcing: the same on every run, in seconds.

    Raises `UserError`: the tokenizer cannot spell the passages, or the model does not repeat them.
    """
    fix = "measure them on prompts of yours: adhere heads --model MODEL --prompts FILE --output FILE, then --heads FILE"
    found = _repeating(policy)
    if found is None:
        raise UserError("copy heads cannot be measured: the tokenizer cannot spell the built-in passages", fix=fix)
    rollout, copied = found
    counted = rollout.response_mask.clone()
    counted[:, :_LEAD] = False
    heads = _measured(policy, rollout, counted, copied, "copying")
    best = float(heads.scores.max())
    if best < _LEAST_SCORE:
        raise UserError(
            f"this model does not repeat what it reads (best head {best:.2f}, {heads.logprob:.1f} nats a token), "
            "so copying does not show its copy heads",
            fix=fix,
        )
    return heads


def measure_on_answers(policy: Policy, prompts: Prompts, num_samples: int = ANSWERS, seed: int = 0) -> CopyHeads:
    """Copy heads from the model's own answers to `prompts`: a hit is any prompt token like the one generated.

    For models that do not repeat passages. The result depends on the prompts, and says so in its `method`.
    Raises `UserError` where no head ever hit: uniform weights would turn grounding into something else under its name.
    """
    rollout = policy.sample(prompts, num_samples, seed=seed)
    classes, spelling = token_classes(policy.tokenizer), Spelling.of(policy.tokenizer)
    content = response_content(rollout, classes)
    keys = spelling.key(prompts.ids).masked_fill(~user_tokens(prompts, classes), NO_WORD)[rollout.prompt_index]
    copied = keys.unsqueeze(1) == spelling.key(rollout.response_ids).unsqueeze(-1)
    readers = "`agreement`, `grounding` and `comprehensiveness`"
    fix = f"give more prompts, or choose a reward that reads no copy heads: without {readers}"
    if not content.any():
        raise UserError("copy heads cannot be measured: the answers hold no content token", fix=fix)
    heads = _measured(policy, rollout, content, copied, "answers")
    if not heads.scores.any():
        raise UserError(
            f"copy heads cannot be measured: in {heads.tokens} content tokens no head's most-attended prompt token "
            "was the token generated",
            fix=fix,
        )
    return heads


def save_heads(path: str | Path, heads: CopyHeads) -> Path:
    """Write `heads` to the file `path`, or to heads.safetensors in the folder `path`; whole or not at all."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() or not path.suffix else path
    told = {"format": FORMAT, "method": heads.method, "tokens": str(heads.tokens)}
    told |= {"logprob": repr(heads.logprob), "model": heads.model}
    atomic_write(path, save({"scores": heads.scores.detach().float().cpu().contiguous()}, told))
    return path


def load_heads(path: str | Path) -> CopyHeads:
    """What `save_heads` wrote: a file, or a folder that holds one (a run, a model). Raises `UserError` otherwise."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    fix = "measure the heads anew: adhere heads --model MODEL --output FILE"
    if not path.is_file():
        raise UserError("no copy heads here", where=str(path), fix=fix)
    try:
        with safe_open(path, framework="pt") as file:
            told, scores = file.metadata() or {}, file.get_tensor("scores")
        if told["format"] != FORMAT:
            raise UserError(f"has format {told['format']}, this version reads {FORMAT}", where=str(path), fix=fix)
        method, tokens, logprob, model = told["method"], int(told["tokens"]), float(told["logprob"]), told["model"]
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"is no file of copy heads ({error})", where=str(path), fix=fix) from None
    good = scores.dim() == 2 and bool(torch.isfinite(scores).all()) and float(scores.min()) >= 0
    if not good or not 0 < float(scores.max()) <= 1 or method not in get_args(Method):
        raise UserError("holds no copy heads: `scores` must be [L, H] in [0, 1], not all 0", where=str(path), fix=fix)
    return CopyHeads(scores.float(), "copying" if method == "copying" else "answers", tokens, logprob, model)


def check_shape(heads: CopyHeads, policy: Policy) -> None:
    """Raise `UserError` unless `heads` has the layers and heads of the model."""
    if heads.model != policy.fingerprint() and tuple(heads.scores.shape) != policy.attention_shape:
        layers, count = heads.scores.shape
        raise UserError(
            f"copy heads of a model with {layers} layers of {count} heads; this one has {{}} of {{}}".format(
                *policy.attention_shape
            ),
            fix="measure the heads of this very model: adhere heads --model MODEL",
        )


def _measured(policy: Policy, rollout: Rollout, counted: Tensor, copied: Tensor, method: Method) -> CopyHeads:
    hits = torch.zeros(policy.attention_shape, dtype=torch.long)
    total, tokens = 0.0, int(counted.sum())
    pieces = rollout.chunks(_PIECE_TOKENS)
    title = "measuring copy heads"
    for piece in policy.progress(pieces, title, len(rollout), size=lambda piece: len(piece.rollout)):
        here = counted[piece.rows, piece.columns]
        if not here.any():
            continue
        own, logprob = policy.copy_hits(piece.rollout, here, copied[piece.rows, piece.columns, piece.span])
        hits, total = hits + own.cpu(), total + logprob * int(here.sum())
    return CopyHeads((hits.double() / tokens).float(), method, tokens, total / tokens, policy.fingerprint())


def _repeating(policy: Policy) -> tuple[Rollout, Tensor] | None:
    """Every readable passage with two of its sentences as responses, token by token as the prompt has them; and the
    prompt position that each token repeats, [B, R, P] bool. None where no passage can be read."""
    tokenizer = policy.tokenizer
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            "copy heads are measured with the offsets of a fast tokenizer, and this one is slow",
            fix="save a tokenizer.json beside the model",
        )
    texts: list[str] = []
    spans: list[list[list[int]]] = []
    for passage in PASSAGES:
        text = passage + "\n\n"
        encoded = tokenizer(text, return_offsets_mapping=True)
        known = [token != tokenizer.unk_token_id for token in encoded["input_ids"]]
        offsets = encoded["offset_mapping"]
        # Several tokens may share a character (byte-level vocabularies), and some stand for none (special tokens).
        within = [
            [i for i, (start, end) in enumerate(offsets) if end > start and first <= start and end <= last]
            for first, last in repeated(passage)
        ]
        if sum(known) >= _READABLE * len(known) and all(len(places) > _LEAD + 1 for places in within):
            texts.append(text)
            spans.append(within)
    if not texts:
        return None
    prompts = policy.encode_texts(texts)
    responses, copied, index = [], [], []
    for number, within in enumerate(spans):
        first = int(prompts.mask[number].int().argmax())
        for places in within:
            positions = [place + first for place in places]
            responses.append(prompts.ids[number, positions].tolist())
            copied.append(torch.tensor(positions))
            index.append(number)
    rollout = policy.respond(prompts, responses, torch.tensor(index))
    repeats = torch.nn.utils.rnn.pad_sequence(copied, True, -1).to(policy.device)
    return rollout, repeats.unsqueeze(-1) == torch.arange(prompts.ids.shape[1], device=policy.device)
