"""The HTTP server: score, rank, rerank and OpenRLHF's reward model, with limits on all that a client can send.

The model works in one thread (`batcher`). A reward here is a function of the request alone: the same answer whoever
else asks, and after a restart.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer

from adhere.errors import UserError
from adhere.ranking import score_groups
from adhere.reward.named import Reads
from adhere.reward.reward import Reward
from adhere.serve import wire
from adhere.serve.batcher import Batcher, Full
from adhere.serve.config import ServeConfig
from adhere.serve.description import described
from adhere.serve.guard import Guard, Meters
from adhere.serve.routes import health_routes, metrics_routes, openrlhf_routes, rerank_routes, scoring_routes
from adhere.serve.scorer import Scorer

# Types of a prompt and of a document, as pydantic names them.
_BRANCH = re.compile(r"constrained-str|list\[Message\]|function-after\[.*\]")
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


def create_app(
    reward: Reward,
    model: str,
    name: str,
    config: ServeConfig,
    token: str | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application that serves `reward`, by the name `name`, of `model`; `token` and `hosts` are what a request must
    bring (see `Guard`).

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

    app = FastAPI(
        title="adhere",
        summary="Rewards from a model's own attention to the prompt.",
        lifespan=living,
        separate_input_output_schemas=False,
        docs_url=None,  # FastAPI's pages load their script from another host
        redoc_url=None,
    )
    scorer = Scorer(reward, batcher, config, model, name)
    needs = [Depends(HTTPBearer(auto_error=False))] if token else []  # described here, asked for by the guard
    problems: dict[int | str, dict[str, Any]] = {
        code: {"model": wire.Problem, "description": text} for code, text in PROBLEMS.items() if token or code != 401
    }
    for routes in (scoring_routes, rerank_routes, openrlhf_routes):
        app.include_router(routes(scorer), dependencies=needs, responses=problems)
    app.include_router(health_routes(scorer))
    app.include_router(metrics_routes(meters), dependencies=needs, responses={401: problems[401]} if token else {})
    _explain_errors(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(described(app.openapi()))

    paths = [*app.openapi()["paths"], "/docs", "/openapi.json"]
    app.add_middleware(Guard, meters=meters, max_body=config.max_body, paths=paths, token=token, hosts=hosts)
    return app


def _explain_errors(app: FastAPI) -> None:
    """Every error as a `Problem`: what is wrong, and where in the request."""

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


def _place(location: Sequence[int | str]) -> str:
    """`items[2].prompt`, without the parts that name a branch of a union."""
    parts = [at for at in location[1:] if not _BRANCH.fullmatch(str(at))]
    return "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in parts).lstrip(".") or "body"
