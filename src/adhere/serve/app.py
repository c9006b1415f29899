"""The HTTP server: score, rank, rerank and OpenRLHF's reward model, with limits on all that a client can send.

The model works in one thread (`batcher`). A reward here is a function of the request alone: the same answer whoever
else asks, and after a restart.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from adhere.errors import UserError
from adhere.integrations.openrlhf import groups_of
from adhere.ranking import Group, read_groups, score_groups
from adhere.reward.named import Reads
from adhere.reward.reward import Reward
from adhere.serve import wire
from adhere.serve.batcher import Batcher, Figures, Full
from adhere.serve.config import ServeConfig
from adhere.serve.guard import Guard, Meters

T = TypeVar("T")
_BEARER = HTTPBearer(auto_error=False)
MAX_FAULTS = 10  # told of one request; the first is mended first
PROBLEMS = {
    400: "The body is not text in UTF-8, or nested too deep",
    401: "No bearer token, or a wrong one",
    413: "The body is too large",
    422: "The request cannot be read or scored",
    429: "The queue is full",
    500: "Scoring failed",
    504: "The request took too long",
}


def create_app(reward: Reward, model: str, name: str, config: ServeConfig, token: str | None = None) -> FastAPI:
    """The application that serves `reward`, by the name `name`, of `model`.

    Raises `UserError` for a reward that reads other prompts of its batch (`contrast`): its scores would depend on who
    else asks.
    """
    if Reads.CONTRAST in reward.config.reads:
        raise UserError(
            "reads another prompt of the batch, which here is another client's", where=name, fix="choose another reward"
        )
    meters = Meters()
    batcher = Batcher(
        lambda groups: score_groups(reward, groups), config.batch_size, config.queue_size, meters.responses.inc
    )
    meters.waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def living(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    def admitted(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), str(token).encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="adhere",
        summary="Rewards from a model's own attention to the prompt.",
        lifespan=living,
        separate_input_output_schemas=False,
    )
    guarded: dict[str, Any] = {"dependencies": [Depends(admitted)] if token else []}
    told: dict[int | str, dict[str, Any]] = {
        code: {"model": wire.Problem, "description": text} for code, text in PROBLEMS.items() if token or code != 401
    }

    async def scores(request: Request, groups: Sequence[Group]) -> list[list[Figures]]:
        """Checked, queued, scored; given up where the client has gone or the time is over."""
        if reward.config.compares and (alone := next((g.where for g in groups if len(g.responses) == 1), None)):
            raise UserError(
                "one response, and this reward compares several to a prompt",
                where=alone,
                fix="send two or more to each prompt, or serve a reward with `normalise: none`",
            )
        rollout = await asyncio.to_thread(read_groups, reward.policy, groups)
        sizes = rollout.prompts.mask.sum(-1)[rollout.prompt_index] + rollout.lengths
        if int(sizes.max()) > config.max_tokens:
            place = int(rollout.prompt_index[sizes.argmax()])
            raise UserError(
                f"{int(sizes.max())} tokens, and {config.max_tokens} are allowed",
                where=groups[place].where,
                fix="shorten it",
            )
        if len(rollout) > config.queue_size:
            raise UserError(f"{len(rollout)} responses, and the queue holds {config.queue_size}", fix="send fewer")
        return await _while_connected(request, batcher.submit(groups), config.timeout)

    @app.post("/v1/score", response_model=wire.ScoreResponse, responses=told, **guarded)
    async def score(body: wire.ScoreRequest, request: Request) -> dict[str, Any]:
        """Reward and signals of responses; those to the same prompt are compared with each other."""
        places: dict[Any, list[int]] = {}
        for place, item in enumerate(body.items):
            places.setdefault((_plain(item.prompt, hashed=True), tuple(item.answers)), []).append(place)
        groups = [
            Group(
                _plain(body.items[members[0]].prompt),
                [body.items[i].response for i in members],
                [body.items[i].ended for i in members],
                body.items[members[0]].answers,
                f"items[{members[0]}]",
            )
            for members in places.values()
        ]
        results: list[Figures] = [{}] * len(body.items)
        for members, found in zip(places.values(), await scores(request, groups), strict=True):
            for place, figures in zip(members, found, strict=True):
                results[place] = figures
        return {"model": model, "reward": name, "results": results}

    async def ranked(request: Request, group: Group) -> list[dict[str, Any]]:
        """The group's responses, best first."""
        (found,) = await scores(request, [group])
        candidates = [
            {"index": place, "response": response, **figures}
            for place, (response, figures) in enumerate(zip(group.responses, found, strict=True))
        ]
        return sorted(candidates, key=lambda candidate: candidate["reward"], reverse=True)

    @app.post("/v1/rank", response_model=wire.RankResponse, responses=told, **guarded)
    async def rank(body: wire.RankRequest, request: Request) -> dict[str, Any]:
        """Candidates for one prompt, best first."""
        group = Group(_plain(body.prompt), body.candidates, [True] * len(body.candidates), body.answers, "prompt")
        return {"model": model, "reward": name, "candidates": await ranked(request, group)}

    @app.post("/v1/rerank", response_model=wire.RerankResponse, responses=told, **guarded)
    async def rerank(body: wire.RerankRequest, request: Request) -> dict[str, Any]:
        """`/v1/rank` in the form of rerank APIs."""
        group = Group(body.query, body.documents, [True] * len(body.documents), (), "query")
        results = [
            {
                "index": one["index"],
                "relevance_score": one["reward"],
                "document": {"text": one["response"]} if body.return_documents else None,
            }
            for one in await ranked(request, group)
        ]
        return {"model": model, "results": results[: body.top_n]}

    @app.post("/openrlhf", response_model=wire.OpenRLHFResponse, responses=told, **guarded)
    async def openrlhf(body: wire.OpenRLHFRequest, request: Request) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `--reward.remote_url http://HOST:PORT/openrlhf`."""
        groups = groups_of(reward.policy.tokenizer, body.query, body.prompts, body.labels)
        flat = [figures for found in await scores(request, groups) for figures in found]
        rewards = [figures["reward"] for figures in flat]
        logs = {signal: [figures["signals"][signal] for figures in flat] for signal in flat[0]["signals"]}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    @app.get("/health", response_model=wire.Health)
    async def health() -> dict[str, Any]:
        """Whether the server lives. Asks for no token."""
        return {"status": "ok", "model": model, "reward": name, "waiting": batcher.waiting}

    @app.get("/metrics", response_class=Response, responses={401: told[401]} if token else {}, **guarded)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(UserError)
    async def explain(_request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422 if error.exit_code == 2 else 500)

    @app.exception_handler(RequestValidationError)
    async def unreadable(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [f"{_place(one['loc'])}: {one['msg']}" for one in error.errors()[:MAX_FAULTS]]
        return JSONResponse({"detail": "; ".join(faults).encode(errors="backslashreplace").decode()}, 422)

    @app.exception_handler(Full)
    async def later(_request: Request, error: Full) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.retry_after)})

    paths = [str(getattr(route, "path", "")) for route in app.routes]
    app.add_middleware(Guard, meters=meters, max_body=config.max_body, paths=paths)
    return app


def _plain(prompt: Any, hashed: bool = False) -> Any:
    """A prompt of the wire as the tokenizer takes it; `hashed`: as a key of a dictionary."""
    if isinstance(prompt, str):
        return prompt
    if hashed:
        return tuple((turn.role, turn.content) for turn in prompt)
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _place(location: Sequence[int | str]) -> str:
    """`items[2].prompt`, without the parts that name a branch of `Prompt`."""
    parts = [at for at in location[1:] if at not in ("constrained-str", "list[Message]")]
    return "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in parts).lstrip(".") or "body"


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
