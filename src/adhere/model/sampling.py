"""Drawing responses: prefill each prompt once, hold it once for its K samples, decode; finished rows leave the batch.

Each response has a random generator of its own, so that it is the same whichever others are drawn beside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adhere.errors import RunFailed
from adhere.model.capture import attention_in_parts, reads_parts
from adhere.model.constraints import Constraints
from adhere.model.endings import Endings
from adhere.model.families import shareable
from adhere.model.logits import bounded
from adhere.model.memory import TokenBudget, freeing, freeing_layers
from adhere.model.observe import DrawReader
from adhere.model.prefix import Window, extend, prefill, restart
from adhere.model.rope import draws, original_frequencies, outdated
from adhere.model.settings import Sampling
from adhere.progress import Progress, phase, silent
from adhere.types import Prompts

CACHE_BYTES = 3 << 27
"""Keys and values that a draw may hold on a CPU."""
SHARE_OF_DEVICE = 4
"""On a CUDA device they may take one of so many parts of its memory."""


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    prompts: Prompts,
    num_samples: int,
    sampling: Sampling,
    endings: Endings,
    pad: int,
    seed: int,
    budget: TokenBudget,
    watch: DrawReader | None = None,
    constraints: Constraints | None = None,
    progress: Progress = silent,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_samples` responses to each prompt.

    `endings` say what ends a response, `pad` fills what follows; `watch` reads along. Returns ids
    [B, R] int64, mask [B, R] bool, ended [B] bool and log-probs [B, R] float32 under softmax(logits / temperature)
    and `constraints`, before any truncation by top-p or top-k (what `Policy.read` gives again). A response depends on
    `seed`, its place in the batch and its prompt alone, however many are drawn at a time: as many as `budget` lets, and
    half where memory runs out. An end that was forced at the length limit did not end its response.

    Where RoPE depends on length, each token is drawn with the frequencies of the length so far, as by transformers'
    `generate`. Its log-prob is then that of the finished response only if the frequencies stayed
    (`rope.fixed_while_drawing`).
    """
    each = prompts.ids.shape[1] + sampling.max_new_tokens
    size, device = len(prompts) * num_samples, prompts.ids.device

    def work(max_tokens: int) -> _Drawn:
        generators = [torch.Generator(device).manual_seed(_seed(seed, row)) for row in range(size)]
        drawn = _Drawn.blank(size, sampling.max_new_tokens, pad, endings, device)
        if watch is not None:
            watch.restart()
        for rows in freeing(_parts(model, prompts, num_samples, sampling, max(1, max_tokens // each))):
            used, index = (rows // num_samples).unique(return_inverse=True)
            asked = prompts if len(used) == len(prompts) else prompts.select(used)
            if watch is None:  # whose maps are as wide as all prompts
                asked, _ = asked.trimmed()
            _decode(model, asked, index, sampling, constraints, drawn, rows, generators, watch, progress)
        return drawn

    drawn = budget.run(work, each, size * each)
    width = int(drawn.mask.sum(-1).max())
    return drawn.ids[:, :width], drawn.mask[:, :width], drawn.ended, drawn.logprobs[:, :width]


def cached_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values a draw may hold at a time."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    most = CACHE_BYTES
    if model.device.type == "cuda":
        most = max(most, torch.cuda.get_device_properties(model.device).total_memory // SHARE_OF_DEVICE)
    return max(1, int(most // (2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)))


def _parts(
    model: PreTrainedModel, prompts: Prompts, num_samples: int, sampling: Sampling, most: int
) -> Iterator[Tensor]:
    """The responses ([n] int64 each) that are drawn beside each other: at most so many."""
    samples = torch.arange(num_samples, device=prompts.ids.device)
    for places in draws(model, prompts, sampling.max_new_tokens):
        rows = (places[:, None] * num_samples + samples).flatten()
        yield from rows.tensor_split(math.ceil(len(rows) / most))


def _seed(seed: int, row: int) -> int:
    return random.Random(f"{seed}/{row}").getrandbits(63)


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
    index: Tensor,
    sampling: Sampling,
    constraints: Constraints | None,
    drawn: _Drawn,
    rows: Tensor,
    generators: Sequence[torch.Generator],
    watch: DrawReader | None,
    progress: Progress,
) -> None:
    """Fill the responses `rows` ([n] int64) of `drawn`, which answer the prompts `index` ([n] int64) of `prompts`.
    `generators`: one for each response of the batch."""
    share = shareable(model)
    places = prompts.ids.shape[1]
    asked = prompts if share else prompts.select(index)
    last = 0 if model.config.is_encoder_decoder else places - 1
    with original_frequencies(model), attention_in_parts(model):
        watched = _watched(watch, slice(last, last + 1), places, len(asked), 0)
        with phase(progress, "reading prompts"), watched, freeing_layers(model):
            prefix, logits = prefill(model, asked, expandable=share)
        if share:
            room = sampling.max_new_tokens - 1
            held_once = room and reads_parts(model)
            prefix, logits = prefix.shared(index, room) if held_once else prefix.select(index), logits[index]
        for step in progress(range(sampling.max_new_tokens), "sampling", sampling.max_new_tokens):
            final = step + 1 == sampling.max_new_tokens
            logits = _sound(logits.float())
            if constraints is not None:
                at_limit = torch.full_like(rows, final, dtype=torch.bool)
                ids, mask = prompts.ids[index], prompts.mask[index]
                logits = constraints.apply(logits, ids, mask, drawn.ids[rows, :step], at_limit)
            own = bounded(rows, logits.shape[-1])
            picked = [
                _pick(part, sampling, [generators[row] for row in some.tolist()])
                for part, some in zip(bounded(logits, logits.shape[-1]), own, strict=True)
            ]
            tokens, logprobs = (torch.cat(parts) for parts in zip(*picked, strict=True))
            if watch is not None:
                watch.note(step, rows, logits, index)
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


def _pick(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob: logits [n, V] float32 → [n] int64, [n] float32.

    By an exponential race, as `torch.multinomial` does it: the least of E_v / p_v, E_v ~ Exp(1), is v with probability
    p_v. Each row draws its E from a generator of its own.
    """
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
    race = torch.empty_like(kept)
    for row, generator in zip(race, generators, strict=True):
        row.exponential_(generator=generator)
    tokens = kept.softmax(-1).div_(race).argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
