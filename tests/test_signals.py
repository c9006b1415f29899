"""Signals: each formula on one case worked by hand, its range and indifference to padding as properties, and what it
says where nothing can be said (no tokens, no salient mass, one salient token, an impossible token)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adhere.reward import controls, signals
from adhere.reward.signals import NO_WORD, Evidence, renormalise
from adhere.types import Prompts, Reading, Role, Rollout

READING = [
    signals.coverage,
    signals.soft_coverage,
    signals.focus,
    signals.repetition,
    signals.coherence,
    signals.grounding,
    signals.grounding_sum,
    signals.lookback,
    signals.certainty,
    signals.entropy,
    signals.contrast,
    signals.reliance,
    signals.comprehensiveness,
    signals.question_reliance,
    signals.leave_one_out,
    signals.selfcite,
    signals.agreement,
]


def evidence_of(prompt, response, attention=None, *, salience=None, content=None, texts=None, answers=None, index=None):
    """Evidence from plain lists. `prompt` [N][P] and `response` [B][R] ids, -1 = padding; by default one response to
    each prompt, every prompt token salient, every response token content, the copy attention the attention."""
    ids, out = torch.tensor(prompt), torch.tensor(response)
    mask, kept = ids >= 0, out >= 0
    count = len(out)
    index = torch.arange(count) if index is None else torch.tensor(index)
    texts = tuple(texts) if texts is not None else ("",) * count
    known = tuple(map(tuple, answers)) if answers is not None else ((),) * len(ids)
    prompts = Prompts(tuple(map(str, prompt)), ids.clamp(min=0), mask.to(torch.uint8) * Role.USER, known)
    rollout = Rollout(prompts, index, out.clamp(min=0), kept, torch.ones(count, dtype=torch.bool), texts)
    a = torch.zeros(*out.shape, ids.shape[1]) if attention is None else torch.tensor(attention)
    zeros = torch.zeros(out.shape)
    weight = mask[index].float() if salience is None else torch.tensor(salience)
    counted = kept if content is None else torch.tensor(content)
    heads = torch.zeros(len(rollout), 2, 3)
    words, said = (ids + 1).masked_fill(~mask, NO_WORD)[index], (out + 1).masked_fill(~kept, NO_WORD)
    asking = torch.zeros(count, ids.shape[1])
    read = Reading(rollout, zeros, zeros, zeros, a, a, asking)
    nowhere = torch.zeros(count, ids.shape[1], dtype=torch.bool)
    sentences = torch.full((count, ids.shape[1]), -1)
    return Evidence(
        *(read, weight, counted, words, said, said, ~nowhere, nowhere, ~nowhere, sentences),
        contrast_logprobs=zeros,
        question_logprobs=zeros,
        unasked_logprobs=zeros,
        ablated_logprobs=zeros,
        left_out_logprobs=zeros[:, None],
        cited_logprobs=zeros,
        head_mass=heads,
    )


def by_hand(**changes):
    """One prompt: padding, then tokens 5, 6, 7, of which 5 and 6 are salient. One response: 6 7 6, its 7 no content.

    M_t = 0.4, 0.4, 0.9.
    """
    evidence = evidence_of(
        [[-1, 5, 6, 7]],
        [[6, 7, 6]],
        [[[0.0, 0.2, 0.2, 0.1], [0.0, 0.3, 0.1, 0.1], [0.0, 0.0, 0.9, 0.0]]],
        salience=[[0.0, 1.0, 1.0, 0.0]],
        content=[[True, False, True]],
    )
    return replace(evidence, reading=replace(evidence.reading, **changes))


def test_coverage_is_the_mean_salient_mass():
    assert signals.coverage(by_hand()).item() == pytest.approx((0.4 + 0.4 + 0.9) / 3)


def test_coverage_of_rows_brought_to_sum_one():
    # Row sums over tokens 5, 6, 7: 0.5, 0.5, 0.9.
    evidence = replace(by_hand(), keep=torch.tensor([[False, True, True, True]]))
    assert signals.coverage(evidence).item() == pytest.approx((0.4 / 0.5 + 0.4 / 0.5 + 0.9 / 0.9) / 3)


def test_soft_coverage_counts_a_token_once_however_much_it_gets():
    # Token 5 gets 0.2 + 0.3 = 0.5, token 6 gets 0.2 + 0.1 + 0.9 = 1.2 → 1; two salient tokens.
    assert signals.soft_coverage(by_hand()).item() == pytest.approx((0.5 + 1.0) / 2)


def test_focus_is_one_minus_relative_entropy():
    # q = (½, ½): H / log 2 = 1. q = (¾, ¼): 0.8113. q = (0, 1): 0.
    assert signals.focus(by_hand()).item() == pytest.approx(1 - (1 + 0.8113 + 0) / 3, abs=1e-4)


def test_focus_is_divided_by_the_log_of_the_salient_tokens_not_of_the_prompt():
    evidence = replace(by_hand(), salience=torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    # Row by row over 5, 6, 7: (0.4, 0.4, 0.2): H = 1.0549; (0.6, 0.2, 0.2): 0.9503; (0, 1, 0): 0; log 3 = 1.0986.
    assert signals.focus(evidence).item() == pytest.approx(1 - (1.0549 + 0.9503) / 1.0986 / 3, abs=1e-4)


def test_the_focus_clamp_stops_paying_below_its_entropy():
    assert signals.focus(by_hand(), clamp=0.5).item() == pytest.approx(1 - (1 + 0.8113 + 0.5) / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("response", "n", "share"),
    [
        ([1, 2, 1, 2, 1], 2, 2 / 4),  # 12 21 12 21: two of four are new
        ([1, 2, 1, 2, 1], 3, 1 / 3),  # 121 212 121
        ([1, 1, 1, 1, -1], 2, 2 / 3),  # 11 11 11, and nothing with padding
        ([1, 2, 3, 4, 5], 2, 0.0),
        ([1, -1, -1, -1, -1], 2, 0.0),  # shorter than n
        ([1, 1, 2, 1, 1], 1, 3 / 5),
        ([1, 1, 1, 1, 1], 6, 0.0),
    ],
)
def test_repetition_is_the_share_of_n_grams_said_before(response, n, share):
    company = [9, 9, 9, 9, 9]  # another response's repeats are its own
    evidence = evidence_of([[5], [5]], [response, company])
    assert signals.repetition(evidence, n).tolist()[0] == pytest.approx(share)


def test_grounding_is_the_copy_attention_on_the_token_generated():
    # Token 6 at t = 0 gets 0.2, at t = 2 0.9; the 7 at t = 1 is no content.
    assert signals.grounding(by_hand()).item() == pytest.approx((0.2 + 0.9) / 2)
    assert signals.grounding_sum(by_hand()).item() == pytest.approx(0.2 + 0.9)


def test_grounding_adds_all_places_of_a_word_but_those_that_do_not_count():
    attention = [[[0.1, 0.2, 0.4]]]
    evidence = evidence_of([[5, 5, 5]], [[5]], attention)
    assert signals.grounding(evidence).item() == pytest.approx(0.7)
    evidence = replace(evidence, prompt_words=torch.tensor([[NO_WORD, 6, 6]]))
    assert signals.grounding(evidence).item() == pytest.approx(0.6)
    assert signals.grounding(replace(evidence, response_words=torch.tensor([[NO_WORD]]))).item() == 0


def test_grounding_reads_the_copy_heads():
    assert signals.grounding(by_hand(attention=torch.zeros(1, 3, 4))).item() == pytest.approx(0.55)
    assert signals.grounding(by_hand(copy_attention=torch.zeros(1, 3, 4))).item() == 0


def test_lookback_is_the_mass_on_the_prompt_as_captured():
    evidence = replace(by_hand(), keep=torch.tensor([[False, True, True, True]]))
    assert signals.lookback(evidence).item() == pytest.approx((0.5 + 0.5 + 0.9) / 3)


def test_coherence_certainty_and_entropy_are_means_over_the_response():
    values = torch.tensor([[-1.0, -2.0, -6.0]])
    assert signals.coherence(by_hand(logprobs=values)).item() == pytest.approx(-3)
    assert signals.certainty(by_hand(certainty=-values)).item() == pytest.approx(3)
    assert signals.entropy(by_hand(entropy=-values)).item() == pytest.approx(-3)


def test_an_impossible_token_costs_a_hundred_nats_and_stays_finite():
    evidence = by_hand(logprobs=torch.tensor([[-1.0, float("-inf"), -1.0]]))
    assert signals.coherence(evidence).item() == pytest.approx(-102 / 3)
    never = replace(evidence, contrast_logprobs=torch.full((1, 3), float("-inf")))
    assert signals.contrast(never).item() == pytest.approx((99 + 0 + 99) / 3)


def test_reliance_is_the_log_prob_gained_over_the_question_alone():
    evidence = by_hand(logprobs=torch.tensor([[-1.0, -2.0, -3.0]]))
    alone = replace(evidence, question_logprobs=torch.tensor([[-4.0, -2.0, -6.0]]), contrast_logprobs=None)
    assert signals.reliance(alone).item() == pytest.approx((3 + 0 + 3) / 3)


def test_comprehensiveness_is_the_log_prob_lost_without_the_attended_context():
    evidence = by_hand(logprobs=torch.tensor([[-1.0, -2.0, -3.0]]))
    evidence = replace(evidence, ablated_logprobs=torch.tensor([[-2.0, -1.0, -9.0]]))
    assert signals.comprehensiveness(evidence).item() == pytest.approx((1 - 1 + 6) / 3)


def test_a_selection_reads_as_if_the_others_had_never_been():
    attention = [[[0.1, 0.9], [0.3, 0.2]], [[0.5, 0.5], [0.0, 0.0]], [[0.2, 0.7], [0.6, 0.1]]]
    whole = evidence_of([[5, 6], [6, 7]], [[6, 5], [5, -1], [7, 7]], attention, index=[0, 0, 1])
    some = whole.select(torch.tensor([0, 2]))
    assert some.reading.rollout.prompt_index.tolist() == [0, 1]
    for signal in (signals.coverage, signals.grounding, signals.repetition, controls.overlap, controls.majority):
        torch.testing.assert_close(signal(some), signal(whole)[[0, 2]], msg=signal.__name__)


def test_contrast_is_the_log_prob_gained_over_another_prompt():
    evidence = replace(by_hand(logprobs=torch.tensor([[-1.0, -2.0, -3.0]])), contrast_logprobs=torch.full((1, 3), -4.0))
    assert signals.contrast(evidence).item() == pytest.approx(2)


def test_renormalise_masks_and_brings_rows_to_one_and_leaves_empty_rows_empty():
    attention = torch.tensor([[[0.5, 0.1, 0.3], [0.9, 0.0, 0.0]]])
    kept = renormalise(attention, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(kept, torch.tensor([[[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]]]))


EDGES = {
    "empty response": evidence_of([[5, 6]], [[-1, -1]]),
    "prompt all padding": evidence_of([[-1, -1]], [[5, 6]]),
    "no attention on anything salient": evidence_of([[5, 6]], [[7, 7]], [[[0.0, 0.0], [0.0, 0.0]]]),
    "nothing salient": evidence_of([[5, 6]], [[7, 8]], [[[0.5, 0.5], [0.5, 0.5]]], salience=[[0.0, 0.0]]),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("signal", [signals.coverage, signals.soft_coverage, signals.focus, signals.grounding])
def test_where_there_is_nothing_to_say_attention_signals_say_zero(case, signal):
    assert signal(EDGES[case]).tolist() == [0.0]


@pytest.mark.parametrize("signal", READING)
def test_an_empty_response_scores_zero(signal):
    assert signal(EDGES["empty response"]).tolist() == [0.0]


def test_over_one_salient_token_there_is_nothing_to_focus():
    evidence = evidence_of([[5, 6]], [[7]], [[[0.9, 0.1]]], salience=[[1.0, 0.0]])
    assert signals.focus(evidence).tolist() == [0.0]
    assert signals.coverage(evidence).item() == pytest.approx(0.9)


@st.composite
def reads(draw):
    """Evidence of two random reads, with padding in the prompt and the response."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    p, r = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    prompt = torch.randint(-1, 4, (2, p), generator=generator)
    response = torch.randint(0, 5, (2, r), generator=generator)
    response[0, draw(st.integers(0, r)) :] = -1
    mask, kept = prompt >= 0, response >= 0
    raw = torch.rand(2, r, p, generator=generator) ** 4 * mask[:, None] * kept[..., None]
    attention = raw / raw.sum(-1, keepdim=True).clamp(min=1)
    salience = torch.rand(2, p, generator=generator).round(decimals=1) * mask
    content = (torch.rand(2, r, generator=generator) < 0.7) & kept
    evidence = evidence_of(
        prompt.tolist(), response.tolist(), attention.tolist(), salience=salience.tolist(), content=content.tolist()
    )
    floats = [torch.rand(2, r, generator=generator) * 5 * kept for _ in range(11)]
    reading = replace(evidence.reading, logprobs=-floats[0], entropy=floats[1], certainty=floats[2])
    question = (torch.rand(2, p, generator=generator) < 0.3) & mask
    sentences = torch.randint(0, 3, (2, p), generator=generator).masked_fill(question | ~mask, -1)
    return replace(
        evidence,
        reading=replace(reading, question_attention=attention[:, 0] * mask),
        context=mask & ~question,
        question=question,
        written=mask,
        sentences=sentences,
        unasked_logprobs=-floats[6],
        contrast_logprobs=-floats[3],
        question_logprobs=-floats[4],
        ablated_logprobs=-floats[5],
        left_out_logprobs=-torch.stack(floats[7:10], dim=1),
        cited_logprobs=-floats[10],
    )


def padded(evidence: Evidence, before: int, after: int, junk: int) -> Evidence:
    """The same evidence with padding around the prompt and behind the response, filled with junk ids."""

    def wide(x, left, right, fill=0):
        return torch.nn.functional.pad(x, (left, right), value=fill)

    reading, rollout, prompts = evidence.reading, evidence.reading.rollout, evidence.reading.rollout.prompts
    prompts = replace(
        prompts,
        ids=wide(prompts.ids, before, after, junk),
        roles=wide(prompts.roles, before, after, Role.PADDING),
    )
    rollout = replace(
        rollout,
        prompts=prompts,
        response_ids=wide(rollout.response_ids, 0, after, junk),
        response_mask=wide(rollout.response_mask, 0, after, False),
    )
    maps = torch.nn.functional.pad(reading.attention, (before, after, 0, after))
    floats = [wide(x, 0, after) for x in (reading.logprobs, reading.entropy, reading.certainty)]
    return Evidence(
        Reading(rollout, *floats, maps, maps, wide(reading.question_attention, before, after)),
        wide(evidence.salience, before, after),
        wide(evidence.content, 0, after, False),
        wide(evidence.prompt_words, before, after, NO_WORD),
        wide(evidence.response_words, 0, after, NO_WORD),
        wide(evidence.response_keys, 0, after, junk),
        wide(evidence.context, before, after, False),
        wide(evidence.question, before, after, False),
        wide(evidence.written, before, after, False),
        wide(evidence.sentences, before, after, -1),
        wide(evidence.contrast_logprobs, 0, after),
        wide(evidence.question_logprobs, 0, after),
        wide(evidence.unasked_logprobs, 0, after),
        wide(evidence.ablated_logprobs, 0, after),
        wide(evidence.left_out_logprobs, 0, after),
        wide(evidence.cited_logprobs, 0, after),
        evidence.head_mass,
        None if evidence.keep is None else wide(evidence.keep, before, after, False),
    )


@given(reads(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_padding_changes_no_signal(evidence, before, after, junk):
    wide = padded(evidence, before, after, junk)
    for signal in READING:
        torch.testing.assert_close(signal(wide), signal(evidence), msg=signal.__name__)


@given(reads(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_signals_stay_in_their_range(evidence, kept):
    evidence = replace(evidence, keep=evidence.reading.prompt_mask if kept else None)
    for signal in (signals.coverage, signals.soft_coverage, signals.focus, signals.grounding, signals.lookback):
        value = signal(evidence)
        assert value.dtype == torch.float32
        assert ((value >= 0) & (value <= 1 + 1e-6)).all(), (signal.__name__, value)
    assert (signals.repetition(evidence) < 1).all() and (signals.repetition(evidence) >= 0).all()


@given(reads())
@settings(max_examples=30, deadline=None)
def test_the_order_of_prompt_positions_changes_nothing(evidence):
    order = torch.randperm(evidence.salience.shape[1], generator=torch.Generator().manual_seed(1))
    prompts = evidence.reading.rollout.prompts
    moved = replace(prompts, ids=prompts.ids[:, order], roles=prompts.roles[:, order])
    maps = evidence.reading.attention[..., order]
    reading = replace(
        evidence.reading,
        rollout=replace(evidence.reading.rollout, prompts=moved),
        attention=maps,
        copy_attention=maps,
        question_attention=evidence.reading.question_attention[:, order],
    )
    by_place = ("salience", "prompt_words", "context", "question", "written", "sentences")
    other = replace(evidence, reading=reading, **{name: getattr(evidence, name)[:, order] for name in by_place})
    for signal in READING:
        torch.testing.assert_close(signal(other), signal(evidence), msg=signal.__name__)


def asked(**changes):
    """Two sentences (5 6, 7 8) and a question (9 7): a response of 6, 7, 4 to them."""
    evidence = evidence_of([[5, 6, 7, 8, 9, 7]], [[6, 7, 4]])
    looked = torch.tensor(
        [[[0.5, 0.1, 0.2, 0.0, 0.1, 0.1], [0.0, 0.0, 0.9, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.2, 0, 0]]]
    )
    asking = torch.tensor([[0.1, 0.1, 0.3, 0.1, 0.4, 0.0]])
    context = torch.tensor([[True] * 4 + [False] * 2])
    reading = replace(
        evidence.reading,
        logprobs=torch.tensor([[-1.0, -2.0, -3.0]]),
        copy_attention=looked,
        question_attention=asking,
    )
    sentences = torch.tensor([[0, 0, 1, 1, -1, -1]])
    given = {"context": context, "question": ~context, "sentences": sentences} | changes
    return replace(evidence, reading=reading, unasked_logprobs=torch.tensor([[-3.0, -9.0, -4.0]]), **given)


def test_leave_one_out_is_the_drop_of_the_sentence_that_matters_most():
    """Two tokens at −1 and −2; without sentence 0 −1 and −2.5, without sentence 1 −4 and −2: drops ¼ and 3/2. A third
    sentence, of another prompt, is not there, whatever stands in its place."""
    evidence = evidence_of([[5, 6, 7, 8]], [[6, 7]], [[[0.0, 0.6, 0.1, 0.0], [0.0, 0.2, 0.0, 0.4]]])
    evidence = replace(
        evidence,
        reading=replace(evidence.reading, logprobs=torch.tensor([[-1.0, -2.0]])),
        sentences=torch.tensor([[0, 0, 1, -1]]),
        left_out_logprobs=torch.tensor([[[-1.0, -2.5], [-4.0, -2.0], [-90.0, -90.0]]]),
        cited_logprobs=torch.tensor([[-0.5, -1.0]]),
    )
    assert signals.sentence_drops(evidence).tolist() == [[0.25, 1.5, -math.inf]]
    assert signals.leave_one_out(evidence).tolist() == [1.5]
    # The copy heads look at sentence 0 most (0.8 against 0.1): −0.75 on average by itself, −1.75 without it.
    assert signals.cited_sentence(evidence).tolist() == [0]
    assert signals.selfcite(evidence).tolist() == [1.0]


def test_question_reliance_counts_what_the_question_does_not_say():
    # 7 is a word of the question: (−1 + 3) and (−3 + 4) remain.
    torch.testing.assert_close(signals.question_reliance(asked()), torch.tensor([1.5]))


def test_agreement_is_the_overlap_of_two_shares_over_sentences():
    # Tokens 6 and 4: 0.5 + 0.1 + 0.2 on the first sentence, 0.2 + 0.2 on the second, 0.2 on the question.
    # The question: 0.2 and 0.4.
    expected = torch.tensor([0.8 / 1.4 * 0.2 / 0.6 + 0.4 / 1.4 * 0.4 / 0.6])
    torch.testing.assert_close(signals.agreement(asked()), expected)


def test_support_is_what_the_context_says_and_the_question_does_not():
    # 6 is told by the context, 7 by the question too, 4 by nothing.
    torch.testing.assert_close(controls.support(asked()), torch.tensor([1 / 3]))


def test_a_question_said_again_earns_none_of_them():
    echo = replace(asked(), question=torch.ones(1, 6, dtype=torch.bool))
    for signal in (signals.question_reliance, signals.agreement, controls.support):
        kept = replace(echo, content=torch.tensor([[True, True, False]]))
        torch.testing.assert_close(signal(kept), torch.zeros(1))


@given(reads())
@settings(max_examples=40, deadline=None)
def test_agreement_and_support_are_shares(evidence):
    for signal in (signals.agreement, controls.support):
        assert bool(((signal(evidence) >= 0) & (signal(evidence) <= 1 + 1e-6)).all())
