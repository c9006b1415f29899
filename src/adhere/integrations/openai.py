"""Candidates from any server that speaks OpenAI's protocol: /v1/chat/completions, /v1/completions for plain prompts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from adhere.errors import RunFailed, UserError
from adhere.integrations.http import JsonClient, TransientError
from adhere.model.encode import Prompt
from adhere.model.settings import Sampling

KEY = "OPENAI_API_KEY"
"""Environment variable of the key; servers without keys need none."""
PARALLEL = 4
"""Requests under way at once."""

Completion = tuple[str, bool]
"""A text, and whether it ended by itself rather than at the length limit."""


class Server:
    """An OpenAI-compatible server at `url` (with or without /v1) and the model asked there.

    Without `model`, the one that the server has. Raises `UserError`: as `JsonClient`, or several models to choose from.
    """

    def __init__(self, url: str, model: str | None = None, *, pause: float = 1.0) -> None:
        self._client = JsonClient(url.rstrip("/").removesuffix("/v1"), KEY, pause=pause)
        self.model = model or self._only_model()

    def complete(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, a few prompts at a time; in the order given.

        Raises `RunFailed` where a prompt has failed `ATTEMPTS` times in a row, `UserError` where asking again is of no
        use. `top_k` is not in the protocol.
        """
        if sampling.top_k:
            raise UserError(f"top_k is {sampling.top_k}, which a server is not asked for", fix="leave it out")
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(
                pool.map(
                    lambda item: self._complete(item[1], num_samples, sampling, (seed + item[0]) % 2**31),
                    enumerate(prompts),
                )
            )

    def _complete(self, prompt: Prompt, count: int, sampling: Sampling, seed: int) -> list[Completion]:
        chat = not isinstance(prompt, str)
        path = "v1/chat/completions" if chat else "v1/completions"
        asked = {"messages": [dict(turn) for turn in prompt]} if not isinstance(prompt, str) else {"prompt": prompt}
        found: list[Completion] = []
        while len(found) < count:
            # Some servers know no `n` and give one choice: then the rest are asked for, each with a seed of its own.
            body = {
                **asked,
                "model": self.model,
                "n": count - len(found),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": (seed + len(found) * 1_000_003) % 2**31,
            }
            found += self._client.post(path, body, partial(_choices, chat=chat))[: count - len(found)]
        return found

    def _only_model(self) -> str:
        where, fix = f"{self._client.url}/v1/models", "write --server-model NAME"
        try:
            reply = self._client.request("v1/models")
        except TransientError as passing:
            raise RunFailed(str(passing), where=where, fix="start the server, or check --server") from passing
        try:
            names = [str(model["id"]) for model in reply["data"]]
        except (LookupError, TypeError) as error:
            raise UserError("the server does not say which models it has", where=where, fix=fix) from error
        if len(names) != 1:
            raise UserError(f"has {len(names)} models ({', '.join(names[:5])} …)", where=where, fix=fix)
        return names[0]


def _choices(reply: Any, chat: bool) -> list[Completion]:
    """The texts in a reply; a choice without text or without the reason why it ended is none."""
    found: list[Completion] = []
    for choice in reply.get("choices") or [] if isinstance(reply, dict) else []:
        try:
            text = choice["message"]["content"] if chat else choice["text"]
            reason = choice["finish_reason"]
            text.encode("utf-8")
        except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
            continue
        ended = reason == "stop"
        if isinstance(reason, str) and (text or ended):
            found.append((text, ended))
    if not found:
        raise TransientError("the reply holds no choice with a text and a finish_reason")
    return found
