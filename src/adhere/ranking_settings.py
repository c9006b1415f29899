"""How responses are ranked. Imports no torch, so that the command line can explain and check the options at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from adhere.errors import UserError
from adhere.model.settings import Sampling
from adhere.options import AtLeast, Count, Seed, check


@dataclass(frozen=True)
class RankConfig:
    """How candidates are drawn, and what is written of them."""

    num_samples: Count = 8
    """Candidates drawn for each prompt (rows that bring `candidates` keep their own)."""
    keep: Literal["best", "all", "pairs"] = "best"
    """best: each row with its best response; all: every candidate, best first; pairs: best against worst, for DPO."""
    margin: Annotated[float, AtLeast(0)] = 0.0
    """Pairs only: the difference in reward that a pair needs at least; a tie is never a pair."""
    batch_size: Count = 8
    """Prompts ranked at a time; memory grows with batch_size × num_samples."""
    seed: Seed = 0
    """Seed of the draws."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        faults = []
        if self.margin and self.keep != "pairs":
            faults.append(UserError(f"margin is for pairs, and keep is {self.keep}", fix="leave it out, or keep pairs"))
        check(self, *faults)

    def check_draw(self) -> None:
        """Raise `UserError` where candidates that are to be drawn cannot differ, or are too few for a pair."""
        if self.keep == "pairs" and self.num_samples < 2:
            raise UserError("a pair needs two candidates", fix="set num_samples to 2 or above")
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"at temperature 0 all {self.num_samples} candidates are the same",
                fix="set temperature above 0, or num_samples to 1",
            )


def bring_candidates(brought: int, total: int, without: str) -> bool:
    """Whether rows bring their candidates, `brought` of `total` rows: all, or none. Raises `UserError` for some;
    `without` is a row that has none."""
    if 0 < brought < total:
        what = f"no `candidates`, which {brought} of {total} rows bring"
        raise UserError(what, where=without, fix="give candidates in every row or in none")
    return brought > 0
