"""The forwards that gather what a reward's signals read; nothing is computed that no signal asks for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adhere.errors import UserError
from adhere.model.context import require_fit
from adhere.progress import phase
from adhere.reward import controls
from adhere.reward.heads import CopyHeads
from adhere.reward.named import PREFERENCE, SIGNALS, Reads, RewardConfig
from adhere.reward.salience import (
    TokenClass,
    attended,
    classes_of,
    context_tokens,
    question_only,
    question_tokens,
    response_content,
    salience,
    user_tokens,
    written_tokens,
)
from adhere.reward.signals import Evidence, cited_sentence
from adhere.reward.sources import context_sentences
from adhere.reward.words import Spelling
from adhere.types import Prompts, Reading, Rollout

if TYPE_CHECKING:
    from adhere.model.policy import Policy


def maps_read(config: RewardConfig, heads: CopyHeads | None) -> dict[str, Tensor | None]:
    """The attention maps that the signals of `config` read, and the head weights of each (None: all heads alike)."""
    maps: dict[str, Tensor | None] = {"attention": None} if Reads.ATTENTION in config.reads else {}
    own = any(name not in SIGNALS and not name.startswith(PREFERENCE) for name in config.weights)
    if heads is not None and (Reads.COPY in config.reads or own):
        maps["copy_attention"] = heads.weights
    return maps


def spread_read(config: RewardConfig) -> tuple[str, ...]:
    """What the signals of `config` read of the whole next-token distribution: each costs a pass over the vocabulary."""
    asked = {"entropy": Reads.ENTROPY, "certainty": Reads.CERTAINTY}
    return tuple(name for name, flag in asked.items() if flag in config.reads)


def gather(
    config: RewardConfig,
    rollout: Rollout,
    scorer: Policy,
    heads: CopyHeads | None,
    classes: Tensor,
    spelling: Spelling,
    reading: Reading | None = None,
) -> Evidence:
    """What the signals of `config` read of a rollout, from one forward of `scorer` and one more for each prompt that is
    changed (`contrast`, `reliance`, `question_reliance`, `comprehensiveness`, and without each sentence `leave_one_out`
    and `selfcite`); none for text alone.

    `reading`: what `scorer` has read of the rollout already. `classes` [V] and `spelling` are those of its tokenizer.
    """
    reads = config.reads
    maps = maps_read(config, heads)
    seen = "attention" in maps
    question = question_tokens(rollout.prompts, classes)
    if reads == Reads.TEXT:
        reading = _unread(rollout)
    else:
        if reading is None:
            reading = scorer.read(
                rollout,
                attention=seen,
                copy_weights=maps.get("copy_attention"),
                spread=spread_read(config),
                question=question if Reads.ASKING in reads else None,
            )
        reading = controls.shuffled(reading) if config.shuffle else reading
    # Text alone has no attention for `self` to read, and reads no salience either.
    weighed = salience(config.salience if seen else "content", reading, classes)
    own = user_tokens(rollout.prompts, classes)
    said = rollout.response_mask & (classes_of(rollout.response_ids, classes) != TokenClass.SPECIAL)
    by_sentence = bool(reads & (Reads.ASKING | Reads.LEFT_OUT))
    sentences = context_sentences(rollout.prompts, classes) if by_sentence else None
    evidence = Evidence(
        reading,
        weighed,
        response_content(rollout, classes),
        spelling.words(rollout.prompts.ids, own)[rollout.prompt_index],
        spelling.words(rollout.response_ids, said),
        spelling.key(rollout.response_ids),
        context_tokens(rollout.prompts, classes)[rollout.prompt_index],
        question[rollout.prompt_index],
        written_tokens(rollout.prompts, classes)[rollout.prompt_index],
        sentences=None if sentences is None else sentences[rollout.prompt_index],
        contrast_logprobs=_contrast(rollout, scorer) if Reads.CONTRAST in reads else None,
        question_logprobs=_after_question(rollout, scorer, classes) if Reads.QUESTION in reads else None,
        unasked_logprobs=_without_question(rollout, scorer, classes) if Reads.UNASKED in reads else None,
        ablated_logprobs=(
            _without_attended(reading, scorer, classes, config.ablate) if Reads.ABLATED in reads else None
        ),
        left_out_logprobs=_without_each(rollout, scorer, sentences) if Reads.LEFT_OUT in reads else None,
        head_mass=scorer.head_mass(rollout, weighed) if Reads.HEADS in reads else None,
        keep=own[rollout.prompt_index] if config.renormalise else None,
    )
    return replace(evidence, cited_logprobs=_cited_alone(evidence, scorer)) if Reads.CITED in reads else evidence


def _unread(rollout: Rollout) -> Reading:
    """A reading by no model. NaN, not 0: what reads it after all is caught."""
    nothing = torch.full(rollout.response_mask.shape, math.nan, device=rollout.response_mask.device)
    return Reading(rollout, nothing)


def _without_attended(reading: Reading, scorer: Policy, classes: Tensor, share: float) -> Tensor:
    """[B, R] log-probs of the responses without the `share` of the context that the copy heads attend to most."""
    assert reading.copy_attention is not None
    prompts = reading.rollout.prompts
    dropped = attended(reading, reading.copy_attention, classes, share)
    rest = prompts.only(prompts.mask & ~dropped, left=not scorer.is_encoder_decoder)
    with phase(scorer.progress, "ablated prompts"):
        return _logprobs(scorer, reading.rollout, rest)


def _after_question(rollout: Rollout, scorer: Policy, classes: Tensor) -> Tensor:
    """[B, R] log-probs of the responses after the question alone."""
    asked, _ = question_only(rollout.prompts, classes, left=not scorer.is_encoder_decoder)
    with phase(scorer.progress, "the question alone"):
        return _logprobs(scorer, rollout, asked)


def _without_question(rollout: Rollout, scorer: Policy, classes: Tensor) -> Tensor:
    """[B, R] log-probs of the responses after the prompt without its question; after the whole prompt where it is
    nothing but a question."""
    prompts = rollout.prompts
    keep = prompts.mask & ~question_tokens(prompts, classes)
    keep = torch.where((keep & context_tokens(prompts, classes)).any(-1, keepdim=True), keep, prompts.mask)
    unasked = prompts.only(keep, left=not scorer.is_encoder_decoder)
    with phase(scorer.progress, "without the question"):
        return _logprobs(scorer, rollout, unasked)


def _without_each(rollout: Rollout, scorer: Policy, sentences: Tensor | None) -> Tensor:
    """[B, S, R] log-probs of the responses without each sentence [N, P] of the context."""
    assert sentences is not None
    with phase(scorer.progress, "without each sentence"):
        return scorer.read_without(rollout, sentences)


def _cited_alone(evidence: Evidence, scorer: Policy) -> Tensor:
    """[B, R] log-probs of the responses with the sentence that each cites as the whole context."""
    rollout, sentences = evidence.reading.rollout, evidence.sentences
    assert sentences is not None
    prompts = rollout.prompts.select(rollout.prompt_index)  # each response keeps a sentence of its own
    keep = prompts.mask & ((sentences < 0) | (sentences == cited_sentence(evidence)[:, None]))
    alone = prompts.only(keep, left=not scorer.is_encoder_decoder)
    apart = replace(rollout, prompt_index=torch.arange(len(rollout), device=keep.device))
    with phase(scorer.progress, "the cited sentence alone"):
        return _logprobs(scorer, apart, alone)


def _contrast(rollout: Rollout, scorer: Policy) -> Tensor:
    """[B, R] log-probs of the responses after the next prompt of the batch that reads differently."""
    texts = rollout.prompts.texts
    if len(set(texts)) < 2:
        raise UserError(
            "signal contrast needs another prompt in the batch", fix="score several different prompts at once"
        )
    count = len(texts)
    other = [next(j % count for j in range(i + 1, i + count) if texts[j % count] != texts[i]) for i in range(count)]
    moved = rollout.prompts.select(torch.tensor(other, device=rollout.prompts.ids.device))
    require_fit(scorer.network, replace(rollout, prompts=moved))  # of these prompts alone, another may be longer
    with phase(scorer.progress, "another prompt"):
        return _logprobs(scorer, rollout, moved)


def _logprobs(scorer: Policy, rollout: Rollout, prompts: Prompts) -> Tensor:
    """[B, R] log-probs of the responses after other prompts."""
    return scorer.read(replace(rollout, prompts=prompts), attention=False, spread=()).logprobs
