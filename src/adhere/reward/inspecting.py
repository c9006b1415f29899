"""An inspection with the copy heads: the sentences that a response was read from, what each token owes to its own word
and to the first of these sentences, and where every single head looked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adhere.inspection.inspection import COPY, Inspection
from adhere.inspection.panel import RESPONSE_DRAWN, Heads, Passage, sinks
from adhere.reward.evidence import gather
from adhere.reward.heads import CopyHeads
from adhere.reward.named import RewardConfig
from adhere.reward.salience import token_classes
from adhere.reward.signals import LOWEST_LOGPROB, copied_mass, sentence_mass
from adhere.reward.sources import LEAST_SHARE, context_sentences
from adhere.reward.words import Spelling
from adhere.types import Reading

if TYPE_CHECKING:
    from adhere.model.encode import Prompt
    from adhere.model.policy import Policy

HEAD_CELLS = 100_000
"""Cells of single heads that are kept: the strongest of each row, so that a page of all heads stays small."""


def inspect(
    policy: Policy,
    prompt: Prompt,
    response: str | None = None,
    *,
    heads: CopyHeads | None,
    max_new_tokens: int = 64,
    name: str = "",
) -> Inspection:
    """`Policy.inspect` with the copy heads, where there are any."""
    rollout = policy.answered(prompt, response, max_new_tokens, name)
    reading = policy.read(rollout, copy_weights=None if heads is None else heads.weights, spread=())
    return inspected(policy, reading, heads)


def inspected(
    policy: Policy, reading: Reading, heads: CopyHeads | None, figures: Mapping[str, float] | None = None
) -> Inspection:
    """A reading of one response, with attention, and with `copy_attention` where there are `heads`; one more forward of
    `policy` for the heads, and one for `drop`."""
    found = Inspection.of(reading, policy.tokenizer, figures)
    if heads is None or not len(found.response_tokens):
        return found
    classes = token_classes(policy.tokenizer)
    asked, said = reading.prompt_mask[0], reading.response_mask[0]
    sentences = context_sentences(reading.rollout.prompts, classes)
    passages, best = _passages(found, sentences[0, asked].cpu())
    tracks = {"grounding": _grounding(policy, reading, heads, classes)[said]}
    if best is not None:
        tracks["drop"] = _drop(policy, reading, sentences == best)[said]
    return replace(
        found,
        tracks={name: values.cpu() for name, values in tracks.items()},
        passages=passages,
        heads=_each_head(policy, reading, heads, ~sinks(found.attention, found.prompt_special)),
    )


def _passages(found: Inspection, sentences: Tensor) -> tuple[tuple[Passage, ...], int | None]:
    """The sentences [P] of the context that the copy heads read most, in order, and the number of the first among them;
    none where nothing of the context was attended to."""
    count = int(sentences.max()) + 1 if sentences.numel() else 0
    mass = sentence_mass(found.maps[COPY].sum(0), sentences, count)
    total = float(mass.sum())
    if total <= 0:
        return (), None
    shares, best = mass / total, int(mass.argmax())
    passages = []
    for number in range(count):
        places = (sentences == number).nonzero().flatten().tolist()
        if places and (number == best or shares[number] >= LEAST_SHARE):
            text = "".join(found.prompt_tokens[places[0] : places[-1] + 1]).strip()
            passages.append(Passage(places[0], places[-1] + 1, float(shares[number]), text))
    return tuple(passages), best


def _grounding(policy: Policy, reading: Reading, heads: CopyHeads, classes: Tensor) -> Tensor:
    """[R] the copy heads' attention of each token on its own word in the prompt: what the signal `grounding` means."""
    config = RewardConfig({"grounding": 1.0}, normalise="none")
    spelling = Spelling.of(policy.tokenizer)
    return copied_mass(gather(config, reading.rollout, policy, heads, classes, spelling, reading))[0]


def _drop(policy: Policy, reading: Reading, sentence: Tensor) -> Tensor:
    """[R] nats that each token loses without the tokens `sentence` [1, P] bool of the prompt."""
    without = policy.read_without(reading.rollout, torch.where(sentence, 0, -1))[0, 0]
    return reading.logprobs[0].clamp(min=LOWEST_LOGPROB) - without.clamp(min=LOWEST_LOGPROB)


def _each_head(policy: Policy, reading: Reading, heads: CopyHeads, own: Tensor) -> Heads:
    """Where the heads looked among the user's `own` words ([p] bool of the prompt without padding): all of them, or as
    many of the highest copy scores as `HEAD_CELLS` has room for."""
    asked, rows = reading.prompt_mask[0], int(reading.rollout.lengths[0])
    drawn = min(rows, RESPONSE_DRAWN)
    room = max(1, HEAD_CELLS // drawn)
    kept = torch.zeros(heads.scores.numel(), dtype=torch.bool)
    kept[heads.scores.flatten().argsort(descending=True, stable=True)[:room]] = True
    kept = kept.view_as(heads.scores)
    counted = torch.zeros_like(asked)
    counted[asked] = own.to(asked.device)
    count = max(1, HEAD_CELLS // (drawn * int(kept.sum())))
    places, values = policy.reader.strongest(reading.rollout, counted[None], count, kept)
    place = (asked.long().cumsum(0) - 1).cpu()  # padding is no token
    return Heads(heads.scores.cpu(), kept.nonzero(), place[places[:, :rows]], values[:, :rows])
