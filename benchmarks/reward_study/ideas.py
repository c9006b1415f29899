"""Judge ideas for the reward by ranking alone: right over wrong among a prompt's own samples, beside the default.

    python benchmarks/reward_study/ideas.py [--prompts 300] [--kinds causal encdec]

Three groups. *Which attention* says what is taken out of the context: other head weights, attention followed through
the layers, the evidence of each response for itself. *Which tokens* count in the two means of log-probs: the surprising
ones, the uncertain ones, content alone, a sum, a sum over the group's mean length. *Binding*: does the attended
sentence also hold what the question names. Everything else is the default reward. Validation stories; a figure is over
prompts, the difference to the default paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from rank import SAMPLES, SPLITS, stories
from torch import Tensor

from attune.measure.stats import Figure, bootstrap, paired_bootstrap
from attune.model.policy import Policy
from attune.model.sampling import Sampling
from attune.reward.group import gate
from attune.reward.named import NAMED
from attune.reward.reward import Reward
from attune.reward.rivals import normalise_answer
from attune.reward.salience import attended, context_tokens, only, question_only
from attune.reward.signals import Evidence, renormalise
from attune.types import Replay, masked_mean
from attune.world import model_path

Weigh = Callable[[Evidence, Tensor], Tensor]
"""[B, R] nats a token → [B]."""


def mean(evidence: Evidence, values: Tensor) -> Tensor:
    return masked_mean(values, evidence.replay.response_mask)


def weighted(evidence: Evidence, values: Tensor, weight: Tensor) -> Tensor:
    weight = weight.clamp(min=1e-6) * evidence.replay.response_mask
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)


def over_expected(evidence: Evidence, values: Tensor) -> Tensor:
    """A sum over the tokens, divided by the mean length of the group."""
    lengths, group = evidence.replay.response_mask.sum(-1).float(), evidence.replay.rollout.prompt_index
    count = group.bincount()
    return total(evidence, values) / (group.bincount(lengths) / count).clamp(min=1.0)[group].to(values.dtype)


def total(evidence: Evidence, values: Tensor) -> Tensor:
    return (values * evidence.replay.response_mask).sum(-1)


TOKENS: dict[str, Weigh] = {
    "tokens weighed by entropy": lambda e, v: weighted(e, v, e.replay.entropy),
    "tokens weighed by surprisal": lambda e, v: weighted(e, v, -e.replay.logprobs),
    "content tokens alone": lambda e, v: masked_mean(v, e.content),
    "sum over tokens": total,
    "sum over the group's mean length": over_expected,
}


def value(reward: Reward, evidence: Evidence, ablated: Tensor, weigh: Weigh = mean) -> Tensor:
    """The default reward [B] from log-probs with and without the attended context, the means taken by `weigh`."""
    scores = reward.judge(replace(evidence, ablated_logprobs=ablated))
    weights, logprobs = reward.config.weights, evidence.replay.logprobs.clamp(min=-100.0)
    parts = {name: found for name, found in scores.signals.items() if name not in ("coherence", "comprehensiveness")}
    parts["coherence"] = weigh(evidence, logprobs)
    parts["comprehensiveness"] = weigh(evidence, logprobs - ablated.clamp(min=-100.0))
    rollout = evidence.replay.rollout
    return gate(sum(weights[name] * part for name, part in parts.items()), rollout.prompt_index, rollout.ended)


def without(reward: Reward, replay: Replay, attention: Tensor, *, each: bool = False) -> Tensor:
    """[B, R] log-probs without the context that `attention` [B, R, P] falls on most; `each`: on its own most."""
    rollout = replay.rollout
    if each:
        rollout = replace(
            rollout,
            prompts=rollout.prompts.select(rollout.prompt_index),
            prompt_index=torch.arange(len(rollout)),
        )
        replay = replace(replay, rollout=rollout)
    dropped = attended(replay, attention, reward.classes, reward.config.ablate)
    prompts = rollout.prompts
    rest = only(prompts, prompts.mask & ~dropped, left=not reward.policy.is_encoder_decoder)
    return reward.policy.replay(replace(rollout, prompts=rest), attention=False).logprobs


def head_maps(policy: Policy, replay: Replay) -> Tensor:
    """[L, H, B, R, P]: the attention of each head by itself."""
    config = policy.network.config
    shape = (config.num_decoder_layers if policy.is_encoder_decoder else config.num_hidden_layers,
             config.num_heads if policy.is_encoder_decoder else config.num_attention_heads)  # fmt: skip
    maps = []
    for place in range(shape[0] * shape[1]):
        one = torch.zeros(shape)
        one.view(-1)[place] = 1.0
        found = policy.replay(replay.rollout, attention=False, copy_weights=one).copy_attention
        assert found is not None
        maps.append(found)
    return torch.stack(maps).unflatten(0, shape)


def head_weights(reward: Reward, evidence: Evidence, maps: Tensor) -> dict[str, Tensor]:
    """Other ways to weigh heads, [L, H] each."""
    policy, replay = reward.policy, evidence.replay
    rollout = replay.rollout
    ids = rollout.prompts.ids[rollout.prompt_index]
    context = context_tokens(rollout.prompts, reward.classes)[rollout.prompt_index]
    top = maps.argmax(-1)
    shape = top.shape[:2]
    said = ids.expand(*shape, *ids.shape).gather(-1, top) == rollout.response_ids
    inside = context.expand(*shape, *context.shape).gather(-1, top)
    retrieval = (said & inside & evidence.content).sum((-1, -2)).float()
    # The same head without the context: one that turns to the question when there is nothing else to read.
    asked, _ = question_only(rollout.prompts, reward.classes, left=not policy.is_encoder_decoder)
    alone = head_maps(policy, replace(replay, rollout=replace(rollout, prompts=asked))).sum(-1)
    beside = (maps * (rollout.prompts.mask[rollout.prompt_index] & ~context)[:, None]).sum(-1)
    turned = ((alone - beside) * replay.response_mask).sum((-1, -2)).clamp(min=0.0)
    return {
        "all heads": torch.ones(shape),
        "retrieval heads": retrieval,
        "heads that turn to the context": turned,
    }


@torch.no_grad()
def flow(policy: Policy, replay: Replay) -> Tensor:
    """[B, R, P]: attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928), half of each layer passed on unmixed.

    Encoder–decoder: the encoder's rollout, read through the mean cross attention of the decoder's layers.
    """
    rollout, network = replay.rollout, policy.network
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
    replay, tokenizer = evidence.replay, reward.policy.tokenizer
    prompts = replay.rollout.prompts
    context = context_tokens(prompts, reward.classes)
    stop = tokenizer.convert_tokens_to_ids(".")
    told = torch.zeros_like(context)
    for row in range(len(prompts)):
        places = context[row].nonzero().flatten().tolist()
        question = set(prompts.ids[row][prompts.mask[row] & ~context[row]].tolist()) - {stop}
        # What nearly every sentence says ("is", "the") names nothing.
        sentences, current = [], []
        for place in places:
            current.append(place)
            if int(prompts.ids[row, place]) == stop:
                sentences, current = [*sentences, current], []
        sentences += [current] if current else []
        words = [set(prompts.ids[row, sentence].tolist()) for sentence in sentences]
        named = {word for word in question if 0 < sum(word in some for some in words) <= len(words) / 2}
        for sentence, some in zip(sentences, words, strict=True):
            told[row, sentence] = bool(some & named)
    index = replay.rollout.prompt_index
    looked = renormalise(evidence.copy_attention, context[index])
    return masked_mean((looked * told[index][:, None]).sum(-1), evidence.content)


def ranked(values: Tensor, right: Tensor) -> list[float | None]:
    """For each prompt, the share of (right, wrong) pairs of its samples in the right order; None where it has none."""
    found: list[float | None] = []
    for mine, good in zip(values.view(-1, SAMPLES), right.view(-1, SAMPLES), strict=True):
        gap = mine[good][:, None] - mine[~good][None]
        found.append(None if gap.numel() == 0 else float(((gap > 1e-6).float() + 0.5 * (gap.abs() <= 1e-6)).mean()))
    return found


def shown(figure: Figure, sign: str = "") -> str:
    return f"{figure.mean:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"


def study(kind: str, count: int) -> None:
    policy = Policy.load(model_path(kind), device="cpu")
    reader = Policy.load(model_path(kind), device="cpu", attention="eager")
    reward = Reward(NAMED["attention"], policy, reference=policy)
    table: dict[str, dict[str, list[float | None]]] = {}
    rows = stories("validation", count)
    reward.copy_weights = reward.measure(policy.encode([row.prompt for row in rows[:count]]))
    for first in range(0, len(rows), 50):
        part = rows[first : first + 50]
        prompts = policy.encode([row.prompt for row in part], [row.answers for row in part])
        rollout = policy.sample(prompts, SAMPLES, sampling=Sampling(max_new_tokens=8), seed=first)
        accepted = [{normalise_answer(answer) for answer in row.answers} for row in part]
        right = torch.tensor(
            [normalise_answer(text) in accepted[n // SAMPLES] for n, text in enumerate(rollout.responses)]
        )
        evidence = reward.evidence(rollout, policy)
        replay, ablated = evidence.replay, evidence.ablated_logprobs
        assert replay.copy_attention is not None and ablated is not None
        maps = head_maps(policy, replay)
        found = {"default": value(reward, evidence, ablated)}
        for name, weights in head_weights(reward, evidence, maps).items():
            mixed = torch.einsum("lh,lhbrp->brp", weights / weights.sum(), maps)
            found[name] = value(reward, evidence, without(reward, replay, mixed))
        found["attention followed through the layers"] = value(
            reward, evidence, without(reward, replay, flow(reader, replay))
        )
        found["each response's own evidence"] = value(
            reward, evidence, without(reward, replay, replay.copy_attention, each=True)
        )
        for name, weigh in TOKENS.items():
            found[name] = value(reward, evidence, ablated, weigh)
        bound = binding(reward, evidence)
        found["binding alone"] = bound
        found["default and binding"] = found["default"] + bound
        for name, values in found.items():
            for row, rate in zip(part, ranked(values, right), strict=True):
                table.setdefault(name, {}).setdefault(row.fields["split"], []).append(rate)
    print(f"\n{kind}\n\n| | " + " | ".join(f"{split} | less the default" for split in SPLITS) + " |")
    print("|---" * (2 * len(SPLITS) + 1) + "|")
    for name, by_split in table.items():
        cells = []
        for split in SPLITS:
            pairs = [(a, b) for a, b in zip(by_split[split], table["default"][split], strict=True) if a is not None]
            mine, base = ([float(value or 0.0) for value in column] for column in zip(*pairs, strict=True))
            cells += [shown(bootstrap(mine)), shown(paired_bootstrap(mine, base), "+") if name != "default" else ""]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


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
