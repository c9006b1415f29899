"""What all routes that score share: a request checked, queued and answered, or given up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import HTTPException, Request

from adhere.errors import UserError
from adhere.ranking import Group, read_groups
from adhere.reward.reward import Reward
from adhere.serve.batcher import Batcher, Figures
from adhere.serve.config import ServeConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Scorer:
    """A reward and its queue, and what clients call them."""

    reward: Reward
    batcher: Batcher
    config: ServeConfig
    model: str
    """Name of the model that reads."""
    name: str
    """Name of the reward."""

    async def score(self, request: Request, groups: Sequence[Group]) -> list[list[Figures]]:
        """The figures of each response of each group.

        Raises `UserError`: a group or response that cannot be scored; `HTTPException`: the client has gone, time is
        over.
        """
        alone = next((group.where for group in groups if len(group.responses) == 1), None)
        if self.reward.config.compares and alone is not None:
            raise UserError(
                "one response, and this reward compares several to a prompt",
                where=alone,
                fix="send two or more to each prompt, or serve a reward with `normalise: none`",
            )
        await asyncio.to_thread(self._check_sizes, groups)
        return await _while_connected(request, self.batcher.submit(groups), self.config.timeout)

    async def rank(self, request: Request, group: Group) -> list[dict[str, Any]]:
        """The group's responses, best first; of equals, the first given."""
        (scored,) = await self.score(request, [group])
        candidates = [
            {"index": index, "response": response, **figures}
            for index, (response, figures) in enumerate(zip(group.responses, scored, strict=True))
        ]
        return sorted(candidates, key=lambda candidate: candidate["reward"], reverse=True)

    def _check_sizes(self, groups: Sequence[Group]) -> None:
        """Raise `UserError` unless every prompt with its response fits, and all of them fit the queue."""
        rollout = read_groups(self.reward.policy, groups)
        sizes = rollout.prompts.mask.sum(-1)[rollout.prompt_index] + rollout.lengths
        largest = int(sizes.max())
        if largest > self.config.max_tokens:
            where = groups[int(rollout.prompt_index[sizes.argmax()])].where
            raise UserError(
                f"{largest} tokens, and {self.config.max_tokens} are allowed", where=where, fix="shorten it"
            )
        if len(rollout) > self.config.queue_size:
            what = f"{len(rollout)} responses, and the queue holds {self.config.queue_size}"
            raise UserError(what, fix="send fewer")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """What `work` gives; cancelled when the client has hung up (499, which nobody reads) or time is over (504)."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise HTTPException(499, "the client has gone")
        raise HTTPException(504, f"not scored within {timeout:g} s; send less, or try again later")
    finally:
        for task in (working, leaving):
            task.cancel()
