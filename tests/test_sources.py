"""The sentences of documents that each sentence of a response rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adhere import Policy, rank, score
from adhere.cli import main
from adhere.data import rows_of
from adhere.reward.heads import copy_heads
from adhere.reward.signals import sentence_mass
from adhere.reward.sources import LEAST_SHARE, cite, document_sentences, token_spans
from adhere.toy import model_path

STORY = "mary went to the garden . john is in the office ."
ROW = {"context": STORY, "question": "where is mary ?"}


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy.load(model_path(request.param), device="cpu")


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_word_of_a_document_is_in_its_sentence(policy: Policy) -> None:
    (row,) = rows_of(
        [ROW | {"documents": ["sandra is in the kitchen .", {"title": "a", "text": STORY}], "context": None}]
    )
    prompts = policy.encode([row.prompt])
    spans, places = document_sentences(prompts, 0)
    assert [
        (document, row.fields["documents"][0][a:b] if document == 0 else STORY[a:b]) for document, a, b in spans
    ] == [
        (0, "sandra is in the kitchen ."),
        (1, "mary went to the garden ."),
        (1, "john is in the office ."),
    ]
    for index, wanted in enumerate([["sandra", "kitchen"], ["mary", "garden"], ["john", "office"]]):
        text = policy.tokenizer.decode(prompts.ids[0][places == index])
        assert all(word in text for word in wanted)
    outside = policy.tokenizer.decode(prompts.ids[0][places == -1])
    assert "where" in outside
    assert "garden" not in outside


def test_shares_are_those_of_the_attention_summed_by_hand(policy: Policy) -> None:
    (row,) = rows_of([ROW])
    rollout = policy.respond(policy.encode([row.prompt]), ["garden . office"], torch.zeros(1, dtype=torch.long))
    reading = policy.read(rollout, copy_weights=copy_heads(policy).weights)
    (cited,) = cite(reading, policy.tokenizer)
    assert [rollout.responses[0][a:b] for a, b in (one.span for one in cited)] == ["garden .", "office"]
    assert reading.copy_attention is not None
    spans, places = document_sentences(rollout.prompts, 0)
    # "garden" and "." are the first two tokens of the response, "office" is the third.
    for one, tokens in zip(cited, [[0, 1], [2]], strict=True):
        looked = reading.copy_attention[0, tokens].sum(0)
        by_hand = [float(sum(looked[i] for i in range(len(places)) if places[i] == s)) for s in range(len(spans))]
        shares = {spans.index((source.document, *source.span)): source.share for source in one.sources}
        for place, share in shares.items():
            assert share == pytest.approx(by_hand[place] / sum(by_hand), abs=1e-5)
        assert [source.share for source in one.sources] == sorted(shares.values(), reverse=True)
        left = [mass / sum(by_hand) for place, mass in enumerate(by_hand) if place not in shares]
        assert all(share < LEAST_SHARE for share in left)
        assert all(source.text == STORY[slice(*source.span)] for source in one.sources)


def test_the_mass_of_sentences_is_a_sum_over_their_tokens() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(sentence_mass(attention, torch.tensor([0, -1, 1, 0]), 2), torch.tensor([[0.5, 0.3]]))


def test_tokens_stand_for_the_characters_they_spell(policy: Policy) -> None:
    text = "  garden ,  office"
    rollout = policy.respond(policy.encode([STORY]), [text], torch.zeros(1, dtype=torch.long))
    spans = token_spans(rollout, 0, policy.tokenizer)
    assert [text[a:b] for a, b in spans if b > a] == ["garden", ",", "office"]


def test_score_and_rank_tell_what_each_sentence_rests_on(policy: Policy) -> None:
    (scored,) = score(policy, [ROW | {"response": "garden"}])
    (sentence,) = scored["evidence"]
    assert sentence["span"] == [0, 6]
    best = sentence["sources"][0]
    assert set(best) == {"document", "span", "text", "share"}
    assert best["text"] == STORY[slice(*best["span"])]
    (ranked,) = rank(policy, [ROW], num_samples=2, max_new_tokens=4)
    assert all("evidence" in candidate for candidate in ranked.all()["candidates"])


def test_a_prompt_without_documents_has_no_evidence_and_a_reward_that_reads_no_heads_tells_none(policy: Policy) -> None:
    (bare,) = score(policy, [{"prompt": f"{STORY} where is mary ?", "response": "garden"}])
    assert bare["evidence"] == []
    (short,) = score(policy, [ROW | {"response": "garden"}], reward="length")
    assert "evidence" not in short


def test_the_files_of_score_and_rank_hold_evidence(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ROW | {"response": "garden"}])
    assert main(["score", "--model", "toy-causal", "--input", str(rows), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["evidence"][0]["span"] == [0, 6]
    command = ["rank", "--model", "toy-causal", "--prompts", str(rows), "--output", str(tmp_path / "all.jsonl")]
    assert main([*command, "--keep", "all", "--num-samples", "2", "--max-new-tokens", "4"]) == 0
    assert all("evidence" in one for one in json.loads((tmp_path / "all.jsonl").read_text())["candidates"])
