"""Judge ideas for the reward by ranking alone: right over wrong among a prompt's own samples, beside the default.

    python benchmarks/reward_study/ideas.py [--prompts 300] [--kinds causal encdec]

Four groups. *Which attention* says what is taken out of the context: other head weights, attention followed through
the layers, the evidence of each response for itself. *What is taken away*: several shares at once (ERASER's area over
the perturbation curve), the two most attended sentences whole, everything but those, all. *Which tokens* count in the
two means of log-probs: the surprising ones, the uncertain ones, content alone, a sum, a sum over the group's mean
length. *Binding*: does the attended sentence also hold what the question names. Everything else is the default reward.
Last, what labels could do with all of it: a logistic regression on right and wrong pairs, cross-validated by prompt.
Validation stories; a figure is over prompts, the difference to the default paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from rank import SAMPLES, SPLITS, fitted, stories
from torch import Tensor

from adhere.data import Row
from adhere.measure.stats import Estimate, bootstrap, paired_bootstrap
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.group import gate
from adhere.reward.named import NAMED
from adhere.reward.reward import Reward
from adhere.reward.salience import attended, context_tokens, question_only
from adhere.reward.signals import LOWEST_LOGPROB, Evidence, renormalise
from adhere.text import is_answer
from adhere.toy import model_path
from adhere.types import Reading, Rollout, masked_mean

Weigh = Callable[[Evidence, Tensor], Tensor]
"""[B, R] nats a token → [B]."""


def mean(evidence: Evidence, values: Tensor) -> Tensor:
    return masked_mean(values, evidence.reading.response_mask)


def weighted(evidence: Evidence, values: Tensor, weight: Tensor) -> Tensor:
    weight = weight.clamp(min=1e-6) * evidence.reading.response_mask
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)


def over_expected(evidence: Evidence, values: Tensor) -> Tensor:
    """A sum over the tokens, divided by the mean length of the group."""
    lengths, group = evidence.reading.response_mask.sum(-1).float(), evidence.reading.rollout.prompt_index
    count = group.bincount()
    return total(evidence, values) / (group.bincount(lengths) / count).clamp(min=1.0)[group].to(values.dtype)


def total(evidence: Evidence, values: Tensor) -> Tensor:
    return (values * evidence.reading.response_mask).sum(-1)


TOKENS: dict[str, Weigh] = {
    "tokens weighed by entropy": lambda e, v: weighted(e, v, e.reading.entropy),
    "tokens weighed by surprisal": lambda e, v: weighted(e, v, -e.reading.logprobs),
    "content tokens alone": lambda e, v: masked_mean(v, e.content),
    "sum over tokens": total,
    "sum over the group's mean length": over_expected,
}


def value(reward: Reward, evidence: Evidence, ablated: Tensor, weigh: Weigh = mean) -> Tensor:
    """The default reward [B] from log-probs with and without the attended context, the means taken by `weigh`."""
    scores = reward.judge(replace(evidence, ablated_logprobs=ablated))
    weights, logprobs = reward.config.weights, evidence.reading.logprobs.clamp(min=LOWEST_LOGPROB)
    parts = {name: found for name, found in scores.signals.items() if name not in ("coherence", "comprehensiveness")}
    parts["coherence"] = weigh(evidence, logprobs)
    parts["comprehensiveness"] = weigh(evidence, logprobs - ablated.clamp(min=LOWEST_LOGPROB))
    rollout = evidence.reading.rollout
    return gate(sum(weights[name] * part for name, part in parts.items()), rollout.prompt_index, rollout.ended)


def without(
    reward: Reward, reading: Reading, attention: Tensor, *, each: bool = False, share: float | None = None
) -> Tensor:
    """[B, R] log-probs without the context that `attention` [B, R, P] falls on most; `each`: on its own most."""
    rollout = reading.rollout
    if each:
        rollout = replace(
            rollout,
            prompts=rollout.prompts.select(rollout.prompt_index),
            prompt_index=torch.arange(len(rollout)),
        )
        reading = replace(reading, rollout=rollout)
    dropped = attended(reading, attention, reward.classes, share or reward.config.ablate)
    return read(reward, rollout, rollout.prompts.mask & ~dropped)


def read(reward: Reward, rollout: Rollout, keep: Tensor) -> Tensor:
    """[B, R] log-probs after the tokens `keep` [N, P] of the prompts alone."""
    rest = rollout.prompts.only(keep, left=not reward.policy.is_encoder_decoder)
    return reward.policy.read(replace(rollout, prompts=rest), attention=False).logprobs.clamp(min=LOWEST_LOGPROB)


def sentences(reward: Reward, rollout: Rollout) -> Tensor:
    """[N, P] int64: the number of the context's sentence that a token is in, from 0; −1 outside of the context."""
    prompts = rollout.prompts
    context = context_tokens(prompts, reward.classes)
    ends = context & (prompts.ids == reward.policy.tokenizer.convert_tokens_to_ids("."))
    return torch.where(context, ends.cumsum(-1) - ends.long(), -1)


def attended_sentences(reward: Reward, reading: Reading, count: int) -> Tensor:
    """[N, P] bool: the tokens of the `count` sentences that the responses to a prompt together attend to most."""
    assert reading.copy_attention is not None
    rollout = reading.rollout
    place = sentences(reward, rollout)
    looked = torch.zeros(place.shape).index_add(0, rollout.prompt_index, reading.copy_attention.sum(1))
    mass = torch.zeros(len(place), int(place.max()) + 1).scatter_add(1, place.clamp(min=0), looked * (place >= 0))
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter(
        1, mass.topk(min(count, mass.shape[1]), dim=1).indices, True
    )
    return chosen.gather(1, place.clamp(min=0)) & (place >= 0)


def takings(reward: Reward, evidence: Evidence) -> dict[str, Tensor]:
    """Other things to take away: [B, R] each, what stands in the place of the log-probs without the evidence."""
    reading, logprobs = evidence.reading, evidence.reading.logprobs.clamp(min=LOWEST_LOGPROB)
    rollout, attention = reading.rollout, reading.copy_attention
    assert attention is not None
    mask, told = rollout.prompts.mask, attended_sentences(reward, reading, 2)
    context = context_tokens(rollout.prompts, reward.classes)
    asked = read(reward, rollout, mask & ~context)
    shares = torch.stack([without(reward, reading, attention, share=share) for share in (0.05, 0.1, 0.3)])
    return {
        "5, 10 and 30 %, the mean": shares.mean(0),
        "the two most attended sentences": read(reward, rollout, mask & ~told),
        "the whole context": asked,
        # What the attended sentences alone give, over the question alone: a gain, so it is taken from the log-probs.
        "all but the two most attended sentences": logprobs - (read(reward, rollout, mask & (told | ~context)) - asked),
    }


def head_maps(policy: Policy, reading: Reading) -> Tensor:
    """[L, H, B, R, P]: the attention of each head by itself."""
    config = policy.network.config
    shape = (config.num_decoder_layers if policy.is_encoder_decoder else config.num_hidden_layers,
             config.num_heads if policy.is_encoder_decoder else config.num_attention_heads)  # fmt: skip
    maps = []
    for place in range(shape[0] * shape[1]):
        one = torch.zeros(shape)
        one.view(-1)[place] = 1.0
        found = policy.read(reading.rollout, attention=False, copy_weights=one).copy_attention
        assert found is not None
        maps.append(found)
    return torch.stack(maps).unflatten(0, shape)


def head_weights(reward: Reward, evidence: Evidence, maps: Tensor) -> dict[str, Tensor]:
    """Other ways to weigh heads, [L, H] each."""
    policy, reading = reward.policy, evidence.reading
    rollout = reading.rollout
    ids = rollout.prompts.ids[rollout.prompt_index]
    context = context_tokens(rollout.prompts, reward.classes)[rollout.prompt_index]
    top = maps.argmax(-1)
    shape = top.shape[:2]
    said = ids.expand(*shape, *ids.shape).gather(-1, top) == rollout.response_ids
    inside = context.expand(*shape, *context.shape).gather(-1, top)
    retrieval = (said & inside & evidence.content).sum((-1, -2)).float()
    # The same head without the context: one that turns to the question when there is nothing else to read.
    asked, _ = question_only(rollout.prompts, reward.classes, left=not policy.is_encoder_decoder)
    alone = head_maps(policy, replace(reading, rollout=replace(rollout, prompts=asked))).sum(-1)
    beside = (maps * (rollout.prompts.mask[rollout.prompt_index] & ~context)[:, None]).sum(-1)
    turned = ((alone - beside) * reading.response_mask).sum((-1, -2)).clamp(min=0.0)
    return {
        "all heads": torch.ones(shape),
        "retrieval heads": retrieval,
        "heads that turn to the context": turned,
    }


@torch.no_grad()
def flow(policy: Policy, reading: Reading) -> Tensor:
    """[B, R, P]: attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928), half of each layer passed on unmixed.

    Encoder–decoder: the encoder's rollout, read through the mean cross attention of the decoder's layers.
    """
    rollout, network = reading.rollout, policy.network
    ids, mask = (part[rollout.prompt_index] for part in (rollout.prompts.ids, rollout.prompts.mask))

    def through(layers: tuple[Tensor, ...]) -> Tensor:
        found = torch.eye(layers[0].shape[-1])
        for layer in layers:
            found = (layer.mean(1) + torch.eye(layer.shape[-1])) / 2 @ found
        return found

    if policy.is_encoder_decoder:
        start = torch.full_like(rollout.response_ids[:, :1], network.config.decoder_start_token_id)
        said = torch.cat([start, rollout.response_ids[:, :-1]], 1)
        out = network(input_ids=ids, attention_mask=mask, decoder_input_ids=said, output_attentions=True)
        return torch.stack(out.cross_attentions).mean((0, 2)) @ through(out.encoder_attentions)
    whole = torch.cat([ids, rollout.response_ids], 1)
    shown = torch.cat([mask, rollout.response_mask], 1)
    out = network(
        input_ids=whole, attention_mask=shown, position_ids=(shown.cumsum(-1) - 1).clamp(min=0), output_attentions=True
    )
    places = ids.shape[1]
    return through(out.attentions)[:, places - 1 : -1, :places]


def binding(reward: Reward, evidence: Evidence) -> Tensor:
    """[B]: share of the attention to the context that falls on sentences which hold a word of the question."""
    reading = evidence.reading
    prompts = reading.rollout.prompts
    place = sentences(reward, reading.rollout)
    told = torch.zeros_like(prompts.mask)
    for row, ids in enumerate(prompts.ids):
        words = [set(ids[place[row] == n].tolist()) for n in range(int(place[row].max()) + 1)]
        question = set(ids[prompts.mask[row] & (place[row] < 0)].tolist())
        # What nearly every sentence says ("is", "the", the full stop) names nothing.
        named = {word for word in question if 0 < sum(word in some for some in words) <= len(words) / 2}
        for n, some in enumerate(words):
            told[row] |= (place[row] == n) & bool(some & named)
    index = reading.rollout.prompt_index
    looked = renormalise(evidence.copy_attention, (place >= 0)[index])
    return masked_mean((looked * told[index][:, None]).sum(-1), evidence.content)


def ranked(values: Tensor, right: Tensor) -> list[float | None]:
    """For each prompt, the share of (right, wrong) pairs of its samples in the right order; None where it has none."""
    found: list[float | None] = []
    for mine, good in zip(values.view(-1, SAMPLES), right.view(-1, SAMPLES), strict=True):
        gap = mine[good][:, None] - mine[~good][None]
        found.append(None if gap.numel() == 0 else float(((gap > 1e-6).float() + 0.5 * (gap.abs() <= 1e-6)).mean()))
    return found


def shown(figure: Estimate, sign: str = "") -> str:
    return f"{figure.mean:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"


def study(kind: str, count: int) -> None:
    policy = Policy.load(model_path(kind), device="cpu")
    reader = Policy.load(model_path(kind), device="cpu", attention="eager")
    reward = Reward(NAMED["attention"], policy)
    values: dict[str, list[Tensor]] = {}
    right: list[Tensor] = []
    rows = stories("validation", count)
    for first in range(0, len(rows), 50):
        part = rows[first : first + 50]
        prompts = policy.encode([row.prompt for row in part], [row.answers for row in part])
        rollout = policy.sample(prompts, SAMPLES, sampling=Sampling(max_new_tokens=8), seed=first)
        right.append(
            torch.tensor([is_answer(said, part[n // SAMPLES].answers) for n, said in enumerate(rollout.responses)])
        )
        for name, found in judged(reward, reader, reward.evidence(rollout, policy)).items():
            values.setdefault(name, []).append(found)
    print(f"\n{kind}\n\n{table({name: torch.cat(found) for name, found in values.items()}, torch.cat(right), rows)}")


def judged(reward: Reward, reader: Policy, evidence: Evidence) -> dict[str, Tensor]:
    """The reward [B] in each of its forms; the default comes first."""
    reading, ablated = evidence.reading, evidence.ablated_logprobs
    assert reading.copy_attention is not None and ablated is not None
    maps = head_maps(reward.policy, reading)
    found = {"default": value(reward, evidence, ablated)}
    for name, weights in head_weights(reward, evidence, maps).items():
        mixed = torch.einsum("lh,lhbrp->brp", weights / weights.sum(), maps)
        found[name] = value(reward, evidence, without(reward, reading, mixed))
    found["attention followed through the layers"] = value(
        reward, evidence, without(reward, reading, flow(reader, reading))
    )
    found["each response's own evidence"] = value(
        reward, evidence, without(reward, reading, reading.copy_attention, each=True)
    )
    for name, taken in takings(reward, evidence).items():
        found[f"taken away: {name}"] = value(reward, evidence, taken)
    for name, weigh in TOKENS.items():
        found[name] = value(reward, evidence, ablated, weigh)
    found["binding alone"] = binding(reward, evidence)
    found["default and binding"] = found["default"] + found["binding alone"]
    return found


def by_labels(values: Tensor, right: Tensor) -> list[float | None]:
    """As `ranked`, by weights fitted on right and wrong pairs of other prompts. `values` [B, features]."""
    pairs, owner = [], []
    for place, (mine, good) in enumerate(zip(values.split(SAMPLES), right.split(SAMPLES), strict=True)):
        gaps = (mine[good][:, None] - mine[~good][None]).flatten(0, 1)
        pairs.append(gaps)
        owner += [place] * len(gaps)
    groups = np.asarray(owner)
    hits = fitted(torch.cat(pairs).numpy(), groups)
    return [
        float(hits[groups == place].mean()) if (groups == place).any() else None
        for place in range(len(right) // SAMPLES)
    ]


def table(values: dict[str, Tensor], right: Tensor, rows: list[Row]) -> str:
    """A row each, by split, with the difference to the default."""
    rates = {name: ranked(found, right) for name, found in values.items()}
    rates["fitted on labels, all of these"] = by_labels(torch.stack(list(values.values()), -1), right)
    lines = ["| | " + " | ".join(f"{split} | less the default" for split in SPLITS) + " |", "|---" * 7 + "|"]
    for name, found in rates.items():
        cells = []
        for split in SPLITS:
            chosen = [
                (a, b)
                for a, b, row in zip(found, rates["default"], rows, strict=True)
                if a is not None and b is not None and row.fields["split"] == split
            ]
            mine, base = zip(*chosen, strict=True)
            cells += [shown(bootstrap(mine)), "" if name == "default" else shown(paired_bootstrap(mine, base), "+")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["causal", "encdec"], help="embedded models")
    parser.add_argument("--prompts", type=int, default=300, help="stories of each split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        study(kind, options.prompts)


if __name__ == "__main__":
    main()
