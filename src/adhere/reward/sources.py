"""Where a response comes from: for each of its sentences, the sentences of the documents that it was read from.

The copy heads' attention, summed over the tokens of a response sentence, is shared out over the sentences of the
prompt's documents. It takes no forward beside the one that scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adhere.inspection.tokens import token_texts
from adhere.reward.salience import TokenClass, classes_of, context_tokens
from adhere.reward.signals import sentence_mass
from adhere.text import sentences
from adhere.types import Prompts, Reading, Rollout

LEAST_SHARE = 0.05
"""Sources below this share of the attention are not named, the best one excepted."""


@dataclass(frozen=True)
class Source:
    """A sentence of a document."""

    document: int
    """Place among the documents of the prompt."""
    span: tuple[int, int]
    """Its characters in the document's text, [start, end)."""
    text: str
    share: float
    """Share of the attention to all documents that it got, in [0, 1]."""


@dataclass(frozen=True)
class Cited:
    """A sentence of a response, and what it rests on."""

    span: tuple[int, int]
    """Its characters in the response, [start, end)."""
    sources: tuple[Source, ...]
    """Best first; none where no document was attended to."""

    def to_json(self) -> dict[str, Any]:
        """{"span": [a, b], "sources": [{"document", "span", "text", "share"}, …]}."""
        sources = [
            {"document": one.document, "span": list(one.span), "text": one.text, "share": round(one.share, 4)}
            for one in self.sources
        ]
        return {"span": list(self.span), "sources": sources}


def document_sentences(prompts: Prompts, number: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """The sentences of the documents of prompt `number`, as (document, start, end), and the sentence that each of its
    tokens stands in: [P] int64, -1 for a token outside of all."""
    documents = prompts.documents[number] if prompts.documents else ()
    found = [(n, start, end) for n, one in enumerate(documents) for start, end in sentences(one.text)]
    places = torch.full((prompts.ids.shape[1],), -1)
    if not found or prompts.sources is None:
        return found, places
    source = prompts.sources[number].cpu()
    # A token belongs to the sentence that its last character stands in: the first may be the blank before it.
    last = source[:, 2] - 1
    for index, (document, start, end) in enumerate(found):
        places[(source[:, 0] == document) & (last >= start) & (last < end)] = index
    return found, places


def context_sentences(prompts: Prompts, classes: Tensor) -> Tensor:
    """The sentence of its context that each prompt token stands in: [N, P] int64, -1 outside. Those of documents; where
    a prompt has none, what full stops and line ends part."""
    context = context_tokens(prompts, classes)
    stops = context & (classes_of(prompts.ids, classes) == TokenClass.STOP)
    places = stops.long().cumsum(-1) - stops.long()  # a stop belongs to what it ends
    for number, documents in enumerate(prompts.documents):
        if documents:
            places[number] = document_sentences(prompts, number)[1].to(places)
    return places.masked_fill(~context, -1)


def token_spans(rollout: Rollout, row: int, tokenizer: Any) -> list[tuple[int, int]]:
    """The characters of response `row` that each of its tokens stands for, [start, end); an empty span for special
    tokens and for what was cut from the text.

    What the tokens decode to may differ from the text in blanks, case or normalisation: characters that are no blanks
    are told apart by their order.
    """
    ids = rollout.response_ids[row][rollout.response_mask[row]].tolist()
    special = set(tokenizer.all_special_ids)
    text = rollout.responses[row]
    solid = [place for place, character in enumerate(text) if not character.isspace()]
    spans, seen = [], 0
    for token, piece in zip(ids, token_texts(tokenizer, ids), strict=True):
        size = 0 if token in special else sum(not character.isspace() for character in piece)
        here = solid[seen : seen + size]
        seen += size
        spans.append((here[0], here[-1] + 1) if here else (0, 0))
    return spans


def cite(reading: Reading, tokenizer: Any) -> list[list[Cited]]:
    """What each response of a reading rests on, sentence by sentence; nothing where the prompt has no documents.

    The reading holds `copy_attention`. Length B.
    """
    assert reading.copy_attention is not None, "sources are read from `copy_attention`"
    rollout = reading.rollout
    attention = reading.copy_attention.cpu()
    known: dict[int, tuple[list[tuple[int, int, int]], Tensor]] = {}
    found = []
    for row, number in enumerate(rollout.prompt_index.tolist()):
        if number not in known:
            known[number] = document_sentences(rollout.prompts, number)
        spans, places = known[number]
        mass = sentence_mass(attention[row], places, len(spans))
        within = token_spans(rollout, row, tokenizer)
        documents = rollout.prompts.documents[number] if spans else ()
        cited = []
        for start, end in sentences(rollout.responses[row]) if spans else ():
            tokens = [t for t, (first, last) in enumerate(within) if last > start and first < end]
            cited.append(Cited((start, end), _sources(mass[tokens].sum(0), spans, [one.text for one in documents])))
        found.append(cited)
    return found


def _sources(mass: Tensor, spans: Sequence[tuple[int, int, int]], texts: Sequence[str]) -> tuple[Source, ...]:
    """The sentences that hold the most of `mass` [S], best first; of equals, the first of the text."""
    total = float(mass.sum())
    if not spans or total <= 0:
        return ()
    shares = (mass / total).tolist()
    order = sorted(range(len(spans)), key=lambda place: -shares[place])
    named = [place for n, place in enumerate(order) if n == 0 or shares[place] >= LEAST_SHARE]
    return tuple(
        Source(spans[p][0], spans[p][1:], texts[spans[p][0]][spans[p][1] : spans[p][2]], shares[p]) for p in named
    )
