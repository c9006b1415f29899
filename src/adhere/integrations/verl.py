"""verl: rewards from `adhere serve`, by a reward manager or by a custom reward function. Read in verl 0.9.1.

The manager needs nothing of the data, and knows which responses were cut off:

    reward.reward_manager.source=importlib
    reward.reward_manager.name=AttentionRewardManager
    reward.reward_manager.module.path=pkg://adhere.integrations.verl
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000

A custom reward function is given text alone: the prompt has to be in each row's `extra_info`, and a response that was
cut off looks like one that ended by itself:

    reward.custom_reward_function.path=pkg://adhere.integrations.verl
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from adhere.errors import UserError
from adhere.integrations.http import JsonClient, TransientError
from adhere.model.chat import end_tokens

if TYPE_CHECKING:

    class RewardManagerBase:
        """What verl's base class gives."""

        loop: Any
        tokenizer: Any

        def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None: ...
else:
    try:
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    except ImportError:  # `compute_score` needs no verl
        RewardManagerBase = object

TOKEN = "ADHERE_TOKEN"
"""Environment variable of the server's bearer token."""

_client = lru_cache(partial(JsonClient, key=TOKEN))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str,
    **_router: Any,
) -> dict[str, float]:
    """verl's custom reward function: {"score": reward, and each signal by its name} of one response.

    `extra_info["prompt"]`: the prompt, as text or as messages. `url`: where `adhere serve` listens. Raises `UserError`
    for a row without a prompt or one that cannot be scored, `RunFailed` for a server that does not answer.
    """
    prompt = (extra_info or {}).get("prompt")
    if prompt is None or not len(prompt):
        raise UserError(
            "a custom reward function is not given the prompt",
            where=f"verl, data_source {data_source}",
            fix="put it into each row's extra_info['prompt'], or use AttentionRewardManager, which needs no such field",
        )
    return _score(url, prompt, solution_str, True, ground_truth)


class AttentionRewardManager(RewardManagerBase):
    """verl's reward manager over `adhere serve`, by the address in the reward function's `reward_kwargs`."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_router: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        given = config.reward.get("custom_reward_function") or {}
        self.url = str((given.get("reward_kwargs") or {}).get("url") or "")
        if not self.url:
            raise UserError(
                "no address of a server",
                where="verl",
                fix="write +reward.custom_reward_function.reward_kwargs.url=http://HOST:PORT",
            )
        self.ends = end_tokens(tokenizer)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Reward and signals of the last sequence of `data`, as verl's other managers."""
        item = data[-1:][0]
        ids = item.batch["responses"]
        ids = ids[item.batch["attention_mask"][-len(ids) :].bool()].tolist()
        known = item.non_tensor_batch
        truth = (known.get("reward_model") or {}).get("ground_truth")
        score = partial(
            _score,
            self.url,
            list(known["raw_prompt"]),
            self.tokenizer.decode(ids, skip_special_tokens=True),
            bool(ids) and ids[-1] in self.ends,
            truth,
        )
        found = await self.loop.run_in_executor(None, score)
        return {"reward_score": found["score"], "reward_extra_info": found}


def _score(
    url: str, prompt: str | Sequence[Mapping[str, Any]], response: str, ended: bool, truth: Any
) -> dict[str, float]:
    if not isinstance(prompt, str):
        prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    answers = [truth] if isinstance(truth, str) and truth.strip() else []
    item = {"prompt": prompt, "response": response, "ended": ended, "answers": answers}
    return _client(url).post("v1/score", {"items": [item]}, _figures)


def _figures(reply: Any) -> dict[str, float]:
    try:
        (found,) = reply["results"]
        return {"score": float(found["reward"]), **{name: float(value) for name, value in found["signals"].items()}}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise TransientError("the reply holds no result; is this `adhere serve`?") from error
