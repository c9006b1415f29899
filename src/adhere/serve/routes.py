"""The routes, by group: scoring and ranking, OpenRLHF's reward model, health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from adhere.integrations.openrlhf import groups_of
from adhere.prompt import Prompt, prompt_key
from adhere.ranking import Group
from adhere.row_prompt import prompt_of
from adhere.serve import wire
from adhere.serve.batcher import Figures
from adhere.serve.guard import Meters
from adhere.serve.scorer import Scorer


def scoring_routes(scorer: Scorer) -> APIRouter:
    """`/v1/score`, `/v1/rank`."""
    router = APIRouter(prefix="/v1")

    # What a reward does not read stays out.
    @router.post("/score", response_model=wire.ScoreResponse, response_model_exclude_unset=True)
    async def score(body: wire.ScoreRequest, request: Request) -> dict[str, Any]:
        """Reward and signals of responses; those to the same prompt are compared with each other."""
        grouped: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for index, item in enumerate(body.items):
            grouped.setdefault((prompt_key(_plain(item.prompt)), tuple(item.answers)), []).append(index)
        groups = [
            Group(
                _plain(body.items[members[0]].prompt),
                [body.items[i].response for i in members],
                [body.items[i].ended for i in members],
                body.items[members[0]].answers,
                f"items[{members[0]}]",
            )
            for members in grouped.values()
        ]
        results: list[Figures] = [{}] * len(body.items)
        for members, scored in zip(grouped.values(), await scorer.score(request, groups), strict=True):
            for index, figures in zip(members, scored, strict=True):
                results[index] = figures
        return {"model": scorer.model, "reward": scorer.name, "results": results}

    @router.post("/rank", response_model=wire.RankResponse, response_model_exclude_unset=True)
    async def rank(body: wire.RankRequest, request: Request) -> dict[str, Any]:
        """Candidates for one prompt, best first."""
        group = Group(_plain(body.prompt), body.candidates, [True] * len(body.candidates), body.answers, "prompt")
        return {"model": scorer.model, "reward": scorer.name, "candidates": await scorer.rank(request, group)}

    return router


def rerank_routes(scorer: Scorer) -> APIRouter:
    """`/rerank`, `/v1/rerank`, `/v2/rerank`: the addresses that clients of rerank APIs go to."""
    router = APIRouter()

    # Of an object that was sent, the fields that were left out stay out in what is sent back.
    @router.post("/rerank", response_model=wire.RerankResponse, response_model_exclude_unset=True)
    @router.post("/v1/rerank", response_model=wire.RerankResponse, response_model_exclude_unset=True)
    @router.post("/v2/rerank", response_model=wire.RerankResponse, response_model_exclude_unset=True)
    async def rerank(body: wire.RerankRequest, request: Request) -> dict[str, Any]:
        """`/v1/rank` in the form of rerank APIs."""
        documents = [wire.Document(text=one) if isinstance(one, str) else one for one in body.documents]
        group = Group(body.query, [one.content for one in documents], [True] * len(documents), (), "query")
        results = [
            {
                "index": one["index"],
                "relevance_score": one["reward"],
                "document": documents[one["index"]] if body.return_documents else None,
            }
            for one in await scorer.rank(request, group)
        ]
        return {"model": scorer.model, "results": results[: body.top_n]}

    return router


def openrlhf_routes(scorer: Scorer) -> APIRouter:
    """`/openrlhf`."""
    router = APIRouter()

    @router.post("/openrlhf", response_model=wire.OpenRLHFResponse)
    async def openrlhf(body: wire.OpenRLHFRequest, request: Request) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `--reward.remote_url http://HOST:PORT/openrlhf`."""
        groups = groups_of(scorer.reward.policy.tokenizer, body.query, body.prompts, body.labels)
        flat = [figures for scored in await scorer.score(request, groups) for figures in scored]
        rewards = [figures["reward"] for figures in flat]
        logs = {signal: [figures["signals"][signal] for figures in flat] for signal in flat[0]["signals"]}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return router


def health_routes(scorer: Scorer) -> APIRouter:
    """`/health`."""
    router = APIRouter()

    @router.get("/health", response_model=wire.Health)
    async def health() -> dict[str, Any]:
        """Whether the server lives. Asks for no token."""
        return {"status": "ok", "model": scorer.model, "reward": scorer.name, "waiting": scorer.batcher.waiting}

    return router


def metrics_routes(meters: Meters) -> APIRouter:
    """`/metrics`."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _plain(prompt: wire.Prompt) -> Prompt:
    """A prompt of the wire as the policy takes it."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return [{"role": turn.role, "content": turn.content} for turn in prompt]
    return prompt_of(prompt.model_dump(exclude_none=True))[0]
