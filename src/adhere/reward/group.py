"""What happens within a group, the responses to one prompt: z-scores, and the price of failing a gate."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Spread within a group below this is rounding between forwards, not an opinion.
STD_FLOOR = 1e-5
# How far below its group's best a gated response stays at least: one standard deviation of a normalised signal.
GATE_MARGIN = 1.0
# From this share on, the length limit is why a group is flat.
MOSTLY_CUT_OFF = 0.5


def group_normalise(
    values: Float[Tensor, "B"], group: Int[Tensor, "B"], among: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B"]:
    """z-scores within groups: (x − mean) / deviation over the responses `among`. [B], [B] int64, [B] bool → [B].

    The deviation divides by the group's size. Where it is below `STD_FLOOR`, a group of one included, all get 0.

    >>> group_normalise(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
    tensor([-1.,  1.,  0.])
    """
    if not len(values):
        return values.float()
    member = torch.ones_like(group, dtype=torch.bool) if among is None else among
    size = int(group.max()) + 1

    def mean(of: Tensor) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64, device=of.device).index_add(0, group[member], of[member])
        return (total / torch.bincount(group[member], minlength=size).clamp(min=1))[group]

    # float64, or else equal rewards would not subtract to equal differences.
    offset = values.double() - mean(values.double())
    deviation = mean(offset**2).sqrt()
    return torch.where(deviation > STD_FLOOR, offset / deviation.clamp(min=STD_FLOOR), 0.0).float()


def gate(reward: Float[Tensor, "B"], group: Int[Tensor, "B"], passed: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Rewards with every response that did not pass at its group's minimum. [B], [B] int64, [B] bool → [B].

    The minimum is that of the responses that passed, and at least `GATE_MARGIN` below their best: otherwise a gated
    response would tie with it where one passed, or all earned the same. A group in which none passed gets one value,
    made in the same way from its own rewards.

    >>> gate(torch.tensor([0.5, -2.0, 9.0]), torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
    tensor([ 0.5000, -2.0000, -2.0000])
    """
    if not len(reward):
        return reward
    member = counted(group, passed)
    ends = torch.zeros(int(group.max()) + 1, dtype=reward.dtype, device=reward.device)
    low = ends.scatter_reduce(0, group[member], reward[member], "amin", include_self=False)[group]
    high = ends.scatter_reduce(0, group[member], reward[member], "amax", include_self=False)[group]
    return torch.where(passed, reward, torch.minimum(low, high - GATE_MARGIN))


def level(reward: Float[Tensor, "B"], group: Int[Tensor, "B"], passed: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Rewards with a whole group at its lowest where none of its responses passed. [B], [B] int64, [B] bool → [B].

    >>> level(torch.tensor([0.5, -2.0, 9.0]), torch.tensor([0, 0, 1]), torch.tensor([False, False, True]))
    tensor([-2., -2.,  9.])
    """
    if not len(reward):
        return reward
    size = int(group.max()) + 1
    low = reward.new_zeros(size).scatter_reduce(0, group, reward, "amin", include_self=False)
    return torch.where((torch.bincount(group[passed], minlength=size) > 0)[group], reward, low[group])


def counted(group: Int[Tensor, "B"], passed: Bool[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """[B] bool: who passed, and everyone of a group where none did."""
    if not len(group):
        return passed
    some = torch.bincount(group[passed], minlength=int(group.max()) + 1) > 0
    return passed | ~some[group]


def flat_groups(reward: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[int, int]:
    """How many groups of two or more responses give all of them the same reward, and how many such groups there are.

    >>> flat_groups(torch.tensor([1.0, 1.0, 2.0, 3.0, 9.0]), torch.tensor([0, 0, 1, 1, 2]))
    (1, 2)
    """
    values = [reward[group == value] for value in group.unique().tolist()]
    several = [rewards for rewards in values if len(rewards) > 1]
    return sum(float(rewards.max() - rewards.min()) <= STD_FLOOR for rewards in several), len(several)


def flat_advice(flat: int, groups: int, cut_off: float) -> str:
    """What flat groups mean and what to set, where `cut_off` is the share of responses cut off at the length limit.

    >>> flat_advice(3, 4, 0.9)
    '3 of 4 groups are flat: all responses to the prompt earn the same. 90% of all responses were cut off at the \
length limit: raise --max-new-tokens, or say with --stop what ends a response'
    """
    told = f"{flat} of {groups} groups are flat: all responses to the prompt earn the same. "
    if cut_off >= MOSTLY_CUT_OFF:
        return (
            f"{told}{cut_off:.0%} of all responses were cut off at the length limit: raise --max-new-tokens, or say "
            "with --stop what ends a response"
        )
    return f"{told}Raise --temperature where they are alike, or choose a reward that tells them apart"
