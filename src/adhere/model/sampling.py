"""Drawing responses: prefill each prompt once, expand its cache to K samples, decode; finished rows leave the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.errors import RunFailed
from adhere.model.constraints import Constraints
from adhere.model.endings import Endings
from adhere.model.families import shareable
from adhere.model.logits import bounded
from adhere.model.observe import DrawReader
from adhere.model.prefix import Window, extend, prefill, restart
from adhere.model.rope import draws, original_frequencies, outdated
from adhere.model.settings import Sampling
from adhere.progress import Progress, phase, silent
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
    watch: DrawReader | None = None,
    constraints: Constraints | None = None,
    progress: Progress = silent,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_samples` responses to each prompt.

    `endings` say what ends a response, `pad` fills what follows; `watch` reads along. Returns ids
    [B, R] int64, mask [B, R] bool, ended [B] bool and log-probs [B, R] float32 under softmax(logits / temperature)
    and `constraints`, before any truncation by top-p or top-k (what `Policy.read` gives again). The draw depends on
    `seed` and the batch alone. An end that was forced at the length limit did not end its response.

    Where RoPE depends on length, each token is drawn with the frequencies of the length so far, as by transformers'
    `generate`. Its log-prob is then that of the finished response only if the frequencies stayed
    (`rope.fixed_while_drawing`).
    """
    device = prompts.ids.device
    generator = torch.Generator(device).manual_seed(seed)
    size = len(prompts) * num_samples
    drawn = _Drawn.blank(size, sampling.max_new_tokens, pad, endings, device)
    for places in draws(model, prompts, sampling.max_new_tokens):
        rows = (places[:, None] * num_samples + torch.arange(num_samples, device=device)).flatten()
        whole = len(places) == len(prompts)
        asked = prompts if whole else prompts.select(places).trimmed()[0]
        _decode(model, asked, num_samples, sampling, constraints, drawn, rows, generator, watch, progress)
    width = int(drawn.mask.sum(-1).max())
    return drawn.ids[:, :width], drawn.mask[:, :width], drawn.ended, drawn.logprobs[:, :width]


@dataclass(frozen=True)
class _Drawn:
    """What has been drawn so far, of all rows of the batch."""

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    ended: Tensor
    endings: Endings
    ends: Tensor
    pad: int

    @classmethod
    def blank(cls, size: int, width: int, pad: int, endings: Endings, device: torch.device) -> _Drawn:
        ids = torch.full((size, width), pad, device=device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        ends = torch.tensor(sorted(endings.tokens), device=device)
        zeros = torch.zeros(ids.shape, device=device)
        return cls(ids, mask, zeros, torch.zeros_like(mask[:, 0]), endings, ends, pad)

    def add(self, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor, forced: bool) -> Tensor:
        """Token `step` of the responses `rows`; those that ended before get padding. An end that is `forced` ends
        none. Gives the rows that go on."""
        live = ~self.ended[rows]
        tokens = torch.where(live, tokens, self.pad)
        self.ids[rows, step], self.mask[rows, step] = tokens, live
        self.logprobs[rows, step] = logprobs * live
        if not forced:
            reached = self.endings.reached(self.ids[rows, : step + 1])
            self.ended[rows] |= (torch.isin(tokens, self.ends) | reached) & live
        return ~self.ended[rows]


def _decode(
    model: PreTrainedModel,
    prompts: Prompts,
    num_samples: int,
    sampling: Sampling,
    constraints: Constraints | None,
    drawn: _Drawn,
    rows: Tensor,
    generator: torch.Generator,
    watch: DrawReader | None,
    progress: Progress,
) -> None:
    """Fill the responses `rows` ([n · num_samples] int64) of `drawn`, which answer `prompts`."""
    index = torch.arange(len(prompts), device=rows.device).repeat_interleave(num_samples)
    share = shareable(model)
    places = prompts.ids.shape[1]
    asked = prompts if share else prompts.select(index)
    last = 0 if model.config.is_encoder_decoder else places - 1
    with original_frequencies(model):
        with phase(progress, "reading prompts"), _watched(watch, slice(last, last + 1), places, len(asked), 0):
            prefix, logits = prefill(model, asked, expandable=share)
        if share:
            prefix, logits = prefix.select(index), logits[index]
        for step in progress(range(sampling.max_new_tokens), "sampling", sampling.max_new_tokens):
            final = step + 1 == sampling.max_new_tokens
            logits = _sound(logits.float())
            if constraints is not None:
                at_limit = torch.full_like(rows, final, dtype=torch.bool)
                ids, mask = prompts.ids[index], prompts.mask[index]
                logits = constraints.apply(logits, ids, mask, drawn.ids[rows, :step], at_limit)
            picked = [_pick(part, sampling, generator) for part in bounded(logits, logits.shape[-1])]
            tokens, logprobs = (torch.cat(parts) for parts in zip(*picked, strict=True))
            if watch is not None:
                watch.note(rows, logits)
            going = drawn.add(
                step, rows, tokens, logprobs, final and constraints is not None and constraints.forces_end
            )
            if final or not going.any():
                break
            # Copying the cache to drop rows costs about one step, so wait until it halves the batch.
            if share and 2 * int(going.sum()) <= len(rows):
                keep = going.nonzero().squeeze(-1)
                rows, index, prefix = rows[keep], index[keep], prefix.select(keep)
            if outdated(model, prompts, step + 1):
                prefix, logits = restart(model, prompts.select(index), drawn.ids[rows, : step + 1], share)
                continue
            with _watched(watch, slice(0, 1), places, len(rows), step + 1):
                logits = extend(model, prefix, drawn.ids[rows, step : step + 1])[:, -1]


def _watched(watch: DrawReader | None, rows: slice, places: int, batch: int, step: int) -> AbstractContextManager[None]:
    return (
        nullcontext() if watch is None else watch.around(Window(rows, slice(0, places), batch, slice(step, step + 1)))
    )


def _sound(logits: Tensor) -> Tensor:
    """`logits`, which are numbers. Raises `RunFailed` where they are not."""
    if logits.isnan().any() or logits.isposinf().any():
        raise RunFailed("the model's logits are not numbers", fix="look for NaN in its weights, or use --dtype float32")
    return logits


def _pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob: logits [n, V] float32 → [n] int64, [n] float32."""
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
