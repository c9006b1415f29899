"""What goes over the wire: requests as they are checked, responses as they are promised (OpenAPI is made of this)."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_ITEMS = 1024
"""Rows of one request: more belong into several requests, or into `adhere score`."""
MAX_NESTING = 64
"""Of a document's own fields: a serializer that sends them back has an end, and must not meet it."""


def _nesting(value: object) -> int:
    """Levels of lists and objects, a few more than `MAX_NESTING` at most."""
    level, depth = [value], -1
    while level and depth <= MAX_NESTING:
        holders = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in holders for item in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def _text(value: str) -> str:
    """JSON can hold half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}") from error
    return value


Text = Annotated[str, AfterValidator(_text)]
# Spelt out: what \S takes differs between dialects of regular expressions, and OpenAPI's readers use several.
Words = Annotated[str, Field(pattern=r"[^\x00-\x20]", description="Text with something in it but white space.")]


class _Closed(BaseModel):
    """A field that is not known is a mistake, not a wish."""

    model_config = ConfigDict(extra="forbid")


class Message(_Closed):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Words


class Passage(_Closed):
    """A document of a prompt."""

    title: Words | None = None
    text: Words


class ContextPrompt(_Closed):
    """A question about a context: the model is asked as about a row of a file, and what a response rests on is told."""

    context: Words
    question: Words
    system: Words | None = None


class DocumentsPrompt(_Closed):
    """A question about several documents."""

    documents: list[Words | Passage] = Field(min_length=1, max_length=MAX_ITEMS)
    question: Words
    system: Words | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)]
Prompt = Words | Messages | ContextPrompt | DocumentsPrompt
Answers = Annotated[
    list[Words], Field(max_length=MAX_ITEMS, description="Accepted answers, for rewards that read them.")
]


class Item(_Closed):
    """A response to a prompt."""

    prompt: Prompt
    response: Text
    ended: bool = Field(True, description="False: cut off at a length limit.")
    answers: Answers = []


class ScoreRequest(_Closed):
    """Responses to score. Items with the same prompt and answers form a group."""

    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)


class Source(BaseModel):
    """A sentence of a document, and its share of the attention to all documents."""

    document: int
    span: tuple[int, int]
    text: str
    share: float


class Cited(BaseModel):
    """A sentence of a response, and what it rests on, best first. Spans are characters, [start, end)."""

    span: tuple[int, int]
    sources: list[Source]


class Scored(BaseModel):
    """Reward and signals of a response; and what it rests on, where the reward reads the copy heads."""

    reward: float
    signals: dict[str, float]
    evidence: list[Cited] = []


class ScoreResponse(BaseModel):
    """A result for each item, in its place."""

    model: str
    reward: str
    results: list[Scored]


class RankRequest(_Closed):
    """Candidates to rank."""

    prompt: Prompt
    candidates: list[Text] = Field(min_length=1, max_length=MAX_ITEMS)
    answers: Answers = []


class Candidate(Scored):
    """A candidate and its place in the request."""

    index: int
    response: str


class RankResponse(BaseModel):
    """The candidates, best first; of equals, the first given."""

    model: str
    reward: str
    candidates: list[Candidate]


class Document(BaseModel):
    """A document as rerank APIs know it: its text, perhaps a title before it, and fields that are the client's own."""

    model_config = ConfigDict(extra="allow")

    title: Text | None = None
    text: Text

    @model_validator(mode="after")
    def _can_be_sent_back(self) -> Document:
        if _nesting(self.model_extra) > MAX_NESTING:
            raise ValueError(f"nested deeper than {MAX_NESTING}")
        _text(json.dumps(self.model_extra, ensure_ascii=False, allow_nan=False))
        return self

    @property
    def content(self) -> str:
        """What is scored: the text, after the title where there is one."""
        return f"{self.title}\n{self.text}" if self.title else self.text


class RerankRequest(BaseModel):
    """The request of rerank APIs (Cohere, Jina, vLLM): the query is the prompt, the documents are the responses."""

    query: Words
    documents: list[Text | Document] = Field(min_length=1, max_length=MAX_ITEMS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = Field(False, description="Send each document back, text as an object too.")
    model: str | None = None


class Reranked(BaseModel):
    """A document's place in the request and what it is worth."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """The best `top_n` documents, best first."""

    model: str
    results: list[Reranked]


class OpenRLHFRequest(BaseModel):
    """What OpenRLHF posts: each query is a prompt and its response, decoded with special tokens."""

    query: list[Words] = Field(min_length=1, max_length=MAX_ITEMS)
    prompts: list[Words] = Field(min_length=1, max_length=MAX_ITEMS)
    labels: list[Text | None] = Field([], max_length=MAX_ITEMS)


class OpenRLHFResponse(BaseModel):
    """What OpenRLHF reads; scores are what its dynamic filter goes by."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class Health(BaseModel):
    """The server lives, and what it serves."""

    status: Literal["ok"]
    model: str
    reward: str
    waiting: int = Field(description="Responses in the queue.")


class Problem(BaseModel):
    """What is wrong, and what to do."""

    detail: str
