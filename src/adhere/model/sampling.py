"""Drawing responses: prefill each prompt once, expand its cache to K samples, decode; finished rows leave the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.errors import RunFailed
from adhere.model.endings import Endings
from adhere.model.families import shareable
from adhere.model.observe import AttentionObserver
from adhere.model.prefix import Window, extend, prefill
from adhere.model.settings import Sampling
from adhere.types import Prompts


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    prompts: Prompts,
    num_samples: int,
    sampling: Sampling,
    endings: Endings,
    pad: int,
    seed: int,
    watch: AttentionObserver | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_samples` responses to each prompt.

    `endings` say what ends a response, `pad` fills what follows; `watch` reads along. Returns ids
    [B, R] int64, mask [B, R] bool, ended [B] bool and log-probs [B, R] float32 under softmax(logits / temperature),
    before any truncation by top-p or top-k (what `Policy.read` gives again). The draw depends on
    `seed` and the batch alone.
    """
    device = prompts.ids.device
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
    share = shareable(model)
    size, places = len(index), prompts.ids.shape[1]
    ends = torch.tensor(sorted(endings.tokens), device=device)
    asked = prompts if share else prompts.select(index)
    last = 0 if model.config.is_encoder_decoder else places - 1
    with _watched(watch, slice(last, last + 1), places, len(asked), 0):
        prefix = prefill(model, asked, expandable=share)
    prefix = prefix.select(index) if share else prefix
    ids = torch.full((size, sampling.max_new_tokens), pad, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    logprobs = torch.zeros(ids.shape, device=device)
    ended = torch.zeros(size, dtype=torch.bool, device=device)
    rows = torch.arange(size, device=device)  # the batch rows still in the cache
    logits = prefix.logits[:, -1]
    for step in range(sampling.max_new_tokens):
        tokens, scores = _pick(logits.float(), sampling, generator)
        if watch is not None:
            watch.note(rows, logits)
        live = ~ended[rows]
        tokens = torch.where(live, tokens, pad)
        ids[rows, step], mask[rows, step] = tokens, live
        logprobs[rows, step] = scores * live
        ended[rows] |= (torch.isin(tokens, ends) | endings.reached(ids[rows, : step + 1])) & live
        going = ~ended[rows]
        if step + 1 == sampling.max_new_tokens or not going.any():
            break
        # Copying the cache to drop rows costs about one step, so wait until it halves the batch.
        if share and 2 * int(going.sum()) <= len(rows):
            keep = going.nonzero().squeeze(-1)
            rows, tokens, prefix = rows[keep], tokens[keep], prefix.select(keep)
        with _watched(watch, slice(0, 1), places, len(rows), step + 1):
            logits = extend(model, prefix, tokens[:, None])[:, -1]
    width = int(mask.sum(-1).max())
    return ids[:, :width], mask[:, :width], ended, logprobs[:, :width]


def _watched(
    watch: AttentionObserver | None, rows: slice, places: int, batch: int, step: int
) -> AbstractContextManager[None]:
    return (
        nullcontext() if watch is None else watch.around(Window(rows, slice(0, places), batch, slice(step, step + 1)))
    )


def _pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob: logits [n, V] float32 → [n] int64, [n] float32."""
    if logits.isnan().any() or logits.isposinf().any():
        raise RunFailed("the model's logits are not numbers", fix="look for NaN in its weights, or use --dtype float32")
    if sampling.temperature == 0:
        scores, tokens = logits.log_softmax(-1).max(-1)
        return tokens, scores
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    kept = logprobs
    if sampling.top_k:
        floor = kept.topk(min(sampling.top_k, kept.shape[-1])).values[:, -1:]
        kept = kept.masked_fill(kept < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = kept.softmax(-1).sort(descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= sampling.top_p
        kept = kept.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    tokens = torch.multinomial(kept.softmax(-1), 1, generator=generator)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)
