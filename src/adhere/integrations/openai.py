"""Candidates from any server that speaks OpenAI's protocol: /v1/chat/completions, /v1/completions for plain prompts.

Servers differ in the small print. Why a text ended is told in many words (vLLM, TGI, SGLang, llama.cpp, LM Studio,
LiteLLM and the gateways to Anthropic, Gemini, Cohere, Mistral and Bedrock were read); some refuse several texts at
once, give a text in parts, or keep the thinking apart.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

from adhere.errors import RunFailed, UserError
from adhere.integrations.http import ATTEMPTS, JsonClient, Refused, TransientError
from adhere.model.encode import Prompt
from adhere.model.settings import Sampling

KEY = "OPENAI_API_KEY"
"""Environment variable of the key; servers without keys need none."""
PARALLEL = 4
"""Requests under way at once."""

ENDED = frozenset({
    "stop", "stop_sequence", "stop_string", "stop_string_found", "stop_token", "stop_str", "stopped", "eos",
    "eos_token", "eos_found", "end", "end_turn", "complete", "completed", "finish", "finished", "done", "word",
    "tool_call", "tool_calls", "tool_use", "function_call",
})  # fmt: skip
"""Finish reasons of a text that the model ended, or a stop text."""
CUT_OFF = frozenset({
    "length", "max_length", "max_token", "max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens",
    "max_predicted_tokens_reached", "model_length", "model_context_window_exceeded", "context_length",
    "context_length_exceeded", "context_length_reached", "token_limit", "length_capped", "limit", "time_limit",
    "truncated", "incomplete", "repetition",
})  # fmt: skip
"""Finish reasons of a text that ran into a limit (`repetition`: vLLM cuts loops)."""
UNUSABLE = frozenset({
    "content_filter", "content_filtered", "safety", "image_safety", "recitation", "language", "blocklist", "blocked",
    "prohibited_content", "spii", "sensitive", "refusal", "guardrail_intervened", "error", "error_toxic", "error_limit",
    "server_error", "network_error", "failed", "abort", "aborted", "cancel", "cancelled", "canceled", "user_cancel",
    "user_stopped", "model_unloaded", "timeout", "insufficient_system_resource", "malformed_function_call",
    "unexpected_tool_call",
})  # fmt: skip
"""Finish reasons of what is no response of the model: filtered, broken off, failed."""
_ABOUT_OPTIONS = (400, 422, 500, 501)
"""Statuses with which servers refuse an option."""

Completion = tuple[str, bool]
"""A text, and whether it ended by itself rather than at the length limit."""


class Server:
    """An OpenAI-compatible server at `url` (with or without /v1) and the model asked there.

    Without `model`, the one that the server has. `warn` is told, once each, of what was not understood. Raises
    `UserError`: as `JsonClient`, or several models to choose from.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        pause: float = 1.0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._client = JsonClient(url.rstrip("/").removesuffix("/v1"), KEY, pause=pause)
        self.model = model or self._only_model()
        self._warn, self._told, self._lock = warn, set[str](), Lock()
        self._refused = set[str]()  # options, and "several" for `n` above 1

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
        fruitless: list[list[str]] = []  # why each reply in a row held nothing to use
        seeds = 0  # taken so far
        while len(found) < count:
            # Fewer choices than were asked for: the rest are asked for, each request with a seed of its own.
            body = {
                **asked,
                "model": self.model,
                "n": count - len(found),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": (seed + seeds * 1_000_003) % 2**31,
            }
            usable, why = self._ask(path, body, partial(_choices, chat=chat))
            found += [self._completion(text, reason) for text, reason in usable][: count - len(found)]
            fruitless = [] if usable else [*fruitless, why]
            seeds += max(1, len(usable))
            if len(fruitless) == ATTEMPTS:
                raise RunFailed(
                    f"no usable response to {_beginning(prompt)!r} in {ATTEMPTS} replies ({_counted(fruitless)})",
                    where=f"{self._client.url}/{path}",
                    fix="raise --max-new-tokens where thinking takes them all, or leave the prompt out",
                )
        return found

    def _ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Reply]) -> Reply:
        """What comes of a request, asked again with less where the server refuses an option."""
        while True:
            sent = {name: value for name, value in body.items() if name not in self._refused}
            if "several" in self._refused and "n" in sent:
                sent["n"] = 1
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = body["max_tokens"]
            try:
                return self._client.post(path, sent, read)
            except Refused as refusal:
                option = self._refused_option(refusal, sent)
                if option is None:
                    raise
                self._refused.add(option)
                if option == "seed":
                    self._tell("seed", "takes no seed: the same candidates will not come again")

    def _refused_option(self, refusal: Refused, sent: Mapping[str, Any]) -> str | None:
        """The option to leave out (of `n`, "several" at first) where that may be what the server refuses."""
        if refusal.status not in _ABOUT_OPTIONS:
            return None
        if "max_tokens" in sent and "max_completion_tokens" in refusal.what:
            return "max_tokens"
        if "seed" in sent and re.search(r"\bseed\b", refusal.what):
            return "seed"
        # Servers name `n` in many ways, or not at all: whether it was that shows when they are asked for less.
        if sent.get("n", 1) > 1:
            return "several"
        return "n" if "n" in sent and "several" in self._refused else None

    def _tell(self, what: str, told: str) -> None:
        with self._lock:
            new = what not in self._told
            self._told.add(what)
        if new:
            self._warn(f"{self._client.url} {told}")

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

    def _completion(self, text: str, reason: str) -> Completion:
        """A text and whether it ended; a reason that no list knows counts as an end, and is told once."""
        name = _plain(reason)
        if name not in ENDED and name not in CUT_OFF:
            self._tell(name, f"says finish_reason {reason!r}, which is not known here: taken for a response that ended")
        return text, name not in CUT_OFF


Reply = tuple[list[tuple[str, str]], list[str]]
"""Of the choices in a reply: text and finish reason of those that are responses, and why the others are none."""


def _choices(reply: Any, chat: bool) -> Reply:
    """The choices in a reply. Raises `TransientError` where there is none that can be read."""
    usable: list[tuple[str, str]] = []
    why: list[str] = []
    given = reply.get("choices") if isinstance(reply, dict) else None
    for choice in given if isinstance(given, list) else []:
        if not isinstance(choice, dict) or "finish_reason" not in choice:
            continue
        reason = choice["finish_reason"]
        reason = reason.get("type") if isinstance(reason, dict) else reason  # SGLang's own form
        reason = "null" if reason is None else str(reason)
        message = choice.get("message") if chat else {"content": choice.get("text")}
        if not isinstance(message, dict) or (not chat and message["content"] is None):
            continue
        text, name = _said(message.get("content")), _plain(reason)
        if name in UNUSABLE:
            why.append(f"finish_reason {reason}")
        elif text and not _encodable(text):
            continue
        elif text:
            usable.append((text, reason))
        elif other := next((key for key in _INSTEAD if message.get(key)), None):
            why.append(f"{_INSTEAD[other]}, finish_reason {reason}")
        elif name in ENDED:
            usable.append(("", reason))
    if not usable and not why:
        told = reply.get("error") if isinstance(reply, dict) else None
        raise TransientError(
            "the reply holds no choice with a text and a finish_reason" + (f" ({str(told)[:200]})" if told else "")
        )
    return usable, why


_INSTEAD = {
    "reasoning_content": "thinking without an answer",
    "reasoning": "thinking without an answer",
    "tool_calls": "a tool call",
    "function_call": "a tool call",
    "refusal": "a refusal",
}
"""What a message may hold in place of a text."""


def _said(content: object) -> str:
    """The text of a message's `content`: itself, or its text parts in one; thinking and refusals are none of it."""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def _plain(reason: str) -> str:
    """A finish reason as our lists write it: `FinishReason.MAX_TOKENS`, `maxTokens` and `max-tokens` are one."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", reason.strip().rpartition(".")[2]).lower()
    return re.sub(r"[\s-]+", "_", words).removeprefix("finish_reason_")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _counted(reasons: Sequence[Sequence[str]]) -> str:
    counts = Counter(reason for some in reasons for reason in some)
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common(3))


def _beginning(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    return " ".join(text.split())[:60]
