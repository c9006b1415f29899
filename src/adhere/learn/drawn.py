"""What a step draws: scored responses to its prompts, and which of them it learns from.

Dynamic sampling (DAPO, 2503.14476, sec. 3.2): prompts whose responses all earn the same are dropped, and further ones
drawn in their place. A step reports means over all that it drew: were they over the rest, a policy that gets better
would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adhere.learn.advantages import differing
from adhere.types import Prompts, Rollout, Scores


@dataclass(frozen=True)
class Drawn:
    """A scored rollout, or those of its groups that are learned from."""

    rollout: Rollout
    scores: Scores
    reference: Tensor | None
    """[B, R] float32: log-probs under the frozen reference; None where none is held."""
    rows: Tensor | None = None
    """[B] int64: where the responses stand in all that was drawn; None = these are all."""

    def learned(self) -> Drawn:
        """The groups whose rewards differ; where none do the first, so that there is something to compute a loss of."""
        keep = differing(self.scores.reward, self.rollout.prompt_index)
        if keep.all():
            return self
        keep[0] |= ~keep.any()
        rows = keep[self.rollout.prompt_index].nonzero().flatten()
        part = self.rollout.compact(rows)
        scores = Scores(self.scores.reward[rows], {name: v[rows] for name, v in self.scores.signals.items()})
        reference = None if self.reference is None else self.reference[rows, part.columns]
        return Drawn(part.rollout, scores, reference, rows)

    def among(self, drawn: Rollout, values: Tensor | None) -> Tensor | None:
        """Values of these responses, [B, R], among all that were drawn: 0 for the others."""
        if values is None or self.rows is None:
            return values
        whole = values.new_zeros(drawn.response_ids.shape)
        whole[self.rows, : values.shape[1]] = values
        return whole


def draw_groups(
    accelerator: Accelerator,
    draw: Callable[[Tensor, int], Drawn],
    prompts: Prompts,
    places: Tensor,
    spare: Tensor,
    tries: int,
) -> Drawn:
    """What this process draws: responses to its share of the prompts `places` and, up to `tries` times, to its share
    of as many of the prompts `spare` as there are groups with equal rewards, over all processes.

    `draw(places, round)` gives scored responses. Every process draws equally many, so all of them together may end
    with a few groups more than `places`."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = [places[rank::processes]]
    rounds = [draw(mine[0], 0)]
    for tried in range(1, tries + 1):
        several = torch.stack([differing(part.scores.reward, part.rollout.prompt_index).sum() for part in rounds]).sum()
        missing = len(places) - int(accelerator.reduce(several, "sum"))
        share = min(-(-missing // processes), len(spare) // processes)
        if share <= 0:
            break
        mine.append(spare[: share * processes][rank::processes])
        spare = spare[share * processes :]
        rounds.append(draw(mine[-1], tried))
    return rounds[0] if len(rounds) == 1 else _joined(prompts.select(torch.cat(mine)), rounds)


def counted(accelerator: Accelerator, drawn: Drawn, learned: Drawn) -> dict[str, float]:
    """How many prompts all processes drew, and how many of them were dropped."""
    sizes = torch.tensor([len(drawn.rollout.prompts), len(learned.rollout.prompts)], device=accelerator.device)
    every, kept = accelerator.reduce(sizes, "sum").tolist()
    return {"dynamic_sampling/drawn": every, "dynamic_sampling/dropped": every - kept}


def _joined(prompts: Prompts, rounds: Sequence[Drawn]) -> Drawn:
    """Several rounds as one, without their readings. `prompts`: those of all rounds, in order."""
    rollouts, scores = [part.rollout for part in rounds], [part.scores for part in rounds]
    width = max(rollout.response_ids.shape[1] for rollout in rollouts)
    first = [sum(len(rollout.prompts) for rollout in rollouts[:i]) for i in range(len(rollouts))]

    def wide(tensors: Sequence[Tensor | None]) -> Tensor | None:
        """[b, r] each → [B, R], 0 on the new padding; None where there are none."""
        known = [nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors if t is not None]
        return torch.cat(known) if known else None

    ids, mask = wide([r.response_ids for r in rollouts]), wide([r.response_mask for r in rollouts])
    assert ids is not None and mask is not None
    rollout = Rollout(
        prompts,
        torch.cat([part.prompt_index + start for part, start in zip(rollouts, first, strict=True)]),
        ids,
        mask,
        torch.cat([part.ended for part in rollouts]),
        tuple(text for part in rollouts for text in part.responses),
        wide([part.logprobs for part in rollouts]),
        rollouts[0].temperature,
    )
    signals = {name: torch.cat([part.signals[name] for part in scores]) for name in scores[0].signals}
    reward = torch.cat([part.reward for part in scores])
    return Drawn(rollout, Scores(reward, signals), wide([part.reference for part in rounds]))
