"""Several rewards on the same responses, with no more forwards than they need together; and where a response looked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from adhere.model.policy import Policy
from adhere.reward.evidence import gather, spread_read
from adhere.reward.heads import CopyHeads
from adhere.reward.named import Reads
from adhere.reward.reward import Reward
from adhere.reward.salience import TokenClass, classes_of, question_tokens
from adhere.reward.signals import sentence_mass
from adhere.reward.sources import document_sentences
from adhere.types import Reading, Rollout

HEADS = {"copy heads": "copy_attention", "all heads": "attention"}
"""Whose attention says where a response looked → the map of a reading."""
# Options that weigh what was read; all others change what is read.
_WEIGHING = {"weights", "normalise", "gates", "learn_from", "logprob_floor"}
_WEIGHING |= {"scorer", "made_for", "ngram", "focus_clamp", "head_weights"}
# What is read alike whatever is done with the attention.
_PLAIN = Reads.LOGPROBS | Reads.ENTROPY | Reads.CERTAINTY | Reads.QUESTION | Reads.UNASKED


def read_together(policy: Policy, rollout: Rollout, rewards: Mapping[str, Reward], heads: CopyHeads) -> Reading:
    """One reading of `rollout` for all `rewards`, with the maps of `HEADS`. Equal prompts that are neighbours are
    computed once, though each stays a group of its own."""
    texts, roles = rollout.prompts.texts, rollout.prompts.roles
    new = [n == 0 or texts[n] != texts[n - 1] or not torch.equal(roles[n], roles[n - 1]) for n in range(len(texts))]
    first = torch.tensor(new, device=rollout.prompt_index.device)
    prompts = rollout.prompts.select(first.nonzero().flatten())
    shared = replace(rollout, prompts=prompts, prompt_index=(first.cumsum(0) - 1)[rollout.prompt_index])
    spread = sorted({name for reward in rewards.values() for name in spread_read(reward.config)})
    question = question_tokens(prompts, next(iter(rewards.values())).classes)
    reading = policy.read(shared, copy_weights=heads.weights, spread=spread, question=question)
    return replace(reading, rollout=rollout)


def score_together(policy: Policy, rewards: Mapping[str, Reward], reading: Reading) -> dict[str, Tensor]:
    """What each reward gives to the responses of a reading by `read_together`, {name: [B]}: as much as by itself.

    Rewards for which the same prompts are changed share the forwards on those.
    """
    groups: dict[Hashable, dict[str, Reward]] = {}
    for name, reward in rewards.items():
        kept = (getattr(reward.config, f.name) for f in fields(reward.config) if f.name not in _WEIGHING)
        plain = reward.config.reads | _PLAIN == _PLAIN
        groups.setdefault(() if plain else (id(reward.heads), *kept), {})[name] = reward
    scores: dict[str, Tensor] = {}
    for group in groups.values():
        one = next(iter(group.values()))
        weights = {name: 0.0 for reward in group.values() for name in reward.config.weights}
        config = replace(one.config, weights=weights | {"coherence": 0.0})  # log-probs are there, for whatever gate
        evidence = gather(config, reading.rollout, policy, one.heads, one.classes, one.spelling, reading)
        scores |= {name: reward.score_evidence(evidence).reward for name, reward in group.items()}
    return {name: scores[name] for name in rewards}


def top_sentences(reading: Reading, heads: str, classes: Tensor) -> list[tuple[int, int] | None]:
    """For each response, the characters of the sentence of the documents that it attends to most; None where it said
    nothing, or the tokenizer does not tell where tokens stand. The attention of special tokens does not count."""
    attention = getattr(reading, HEADS[heads])
    rollout = reading.rollout
    said = rollout.response_mask & (classes_of(rollout.response_ids, classes) != TokenClass.SPECIAL)
    looked = (attention * said[..., None]).sum(1).cpu()
    known = [document_sentences(rollout.prompts, number) for number in range(len(rollout.prompts))]
    found: list[tuple[int, int] | None] = []
    for row, number in enumerate(rollout.prompt_index.tolist()):
        spans, places = known[number]
        mass = sentence_mass(looked[row], places, len(spans))
        found.append(spans[int(mass.argmax())][1:] if spans and float(mass.max()) > 0 else None)
    return found
