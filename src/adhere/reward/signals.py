"""The signals: one pure function per formula, from the evidence of a reading to one number per response.

Notation: response token t of m, prompt token i, a[t, i] the prompt attention, s_i the salience,
M_t = Σ_i s_i a[t, i]. An empty response scores 0 everywhere. Nothing here knows a model, weights or groups;
the controls that read no attention at all are in `controls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from adhere.errors import UserError
from adhere.types import Reading, masked_mean

# A token the scorer holds impossible (log-prob -inf: a masked vocabulary) counts as this many nats, so that a mean
# stays a number. e^-100 is beyond what float32 softmax over any vocabulary gives by itself.
LOWEST_LOGPROB = -100.0

NO_WORD = 0
"""The word of a token that does not count: padding, template, earlier turns, special tokens."""


@dataclass(frozen=True)
class Evidence:
    """What a signal may read."""

    reading: Reading
    salience: Tensor
    """[B, P] float32 in [0, 1]: how much each prompt token counts."""
    content: Tensor
    """[B, R] bool: the response tokens that are content."""
    prompt_words: Tensor
    """[B, P] int64: the word that each prompt token is part of, `NO_WORD` outside of the current turn."""
    response_words: Tensor
    """[B, R] int64: the word that each response token is part of."""
    response_keys: Tensor
    """[B, R] int64: each response token, regardless of case and blanks."""
    context: Tensor
    """[B, P] bool: the prompt tokens that are evidence (`salience.context_tokens`)."""
    question: Tensor
    """[B, P] bool: the prompt tokens that ask (`salience.question_tokens`)."""
    written: Tensor
    """[B, P] bool: the prompt tokens that somebody wrote, earlier turns included: no template, no special token."""
    sentences: Tensor | None = None
    """[B, P] int64: the sentence of the context that each prompt token stands in, -1 outside (`sources`); None when no
    signal asked for it."""
    contrast_logprobs: Tensor | None = None
    """[B, R] log-prob of the same responses after another prompt of the batch; None when no signal asked for it."""
    question_logprobs: Tensor | None = None
    """[B, R] log-prob of the same responses after the question alone; None when no signal asked for it."""
    unasked_logprobs: Tensor | None = None
    """[B, R] log-prob of the same responses after the prompt without its question; None when no signal asked for it."""
    ablated_logprobs: Tensor | None = None
    """[B, R] log-prob of the same responses without the context they attend to most; None when not asked for."""
    left_out_logprobs: Tensor | None = None
    """[B, S, R] log-prob of the same responses without sentence s of their context, 0 where it has none such; None when
    not asked for."""
    cited_logprobs: Tensor | None = None
    """[B, R] log-prob of the same responses with `cited_sentence` as the whole context; None when not asked for."""
    head_mass: Tensor | None = None
    """[B, L, H] mean attention of each head to the salient prompt; None when no signal asked for it."""
    keep: Tensor | None = None
    """[B, P] bool: attention rows are renormalised over these prompt tokens; None leaves them as captured."""

    def select(self, rows: Tensor) -> Evidence:
        """The responses `rows` ([n] int64, ascending)."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "reading"}
        picked = {name: value[rows] for name, value in tensors.items() if value is not None}
        return replace(self, reading=self.reading.select(rows), **picked)

    @cached_property
    def repeated(self) -> Tensor:
        """[B, R, P] bool: where a response token and a prompt token are of the same word."""
        counts = self.response_words.unsqueeze(-1) != NO_WORD
        return (self.response_words.unsqueeze(-1) == self.prompt_words.unsqueeze(1)) & counts

    @cached_property
    def added(self) -> Tensor:
        """[B, R] bool: content tokens of a response whose word the question does not say."""
        return self.content & ~(self.repeated & self.question.unsqueeze(1)).any(-1)

    @cached_property
    def attention(self) -> Tensor:
        """[B, R, P] prompt attention, renormalised where `keep` says so."""
        return self._read(self.reading.attention, "attention")

    @cached_property
    def copy_attention(self) -> Tensor:
        """[B, R, P] prompt attention of the copy heads, renormalised where `keep` says so."""
        return self._read(self.reading.copy_attention, "copy_attention")

    def _read(self, attention: Tensor | None, name: str) -> Tensor:
        assert attention is not None, f"this reading did not capture `{name}`"
        return attention if self.keep is None else renormalise(attention, self.keep)


def renormalise(attention: Tensor, keep: Tensor) -> Tensor:
    """Attention with everything but `keep` [B, P] masked and each row brought back to sum 1; a row of 0 stays 0.

    Takes out sinks and template tokens, and with them the fall of a decoder-only prompt share with response length.
    Shapes [B, R, P] → [B, R, P].

    >>> renormalise(torch.tensor([[[0.5, 0.1, 0.3]]]), torch.tensor([[False, True, True]]))
    tensor([[[0.0000, 0.2500, 0.7500]]])
    """
    kept = attention * keep.unsqueeze(1)
    return kept / _positive(kept.sum(-1, keepdim=True))


def coverage(evidence: Evidence) -> Tensor:
    """Mean salient attention mass: (1/m) Σ_t M_t. [B] in [0, 1]. CAGSR (arXiv 2502.10482).

    A mean: the shorter response that drops its least attentive token scores higher, which is how it is gamed.
    """
    return masked_mean(_salient_mass(evidence), evidence.reading.response_mask)


def soft_coverage(evidence: Evidence) -> Tensor:
    """Share of the salient prompt that was looked at: Σ_i s_i min(1, Σ_t a[t, i]) / Σ_i s_i. [B] in [0, 1].

    The coverage vector of See et al. 2017 (arXiv 1704.04368), as a reward: beyond 1, a token adds nothing.
    """
    looked = evidence.attention.sum(1).clamp(max=1.0)  # rows of padding are 0
    return (evidence.salience * looked).sum(-1) / _positive(evidence.salience.sum(-1))


def focus(evidence: Evidence, clamp: float = 0.0) -> Tensor:
    """Sharpness of attention over salient tokens: 1 − (1/m) Σ_t max(H(q_t)/log|S|, clamp). [B] in [0, 1 − clamp].

    q_t = s·a_t / M_t, S = {i: s_i > 0}. CAGSR rewards sharp attention (arXiv 2502.10482); its follow-up penalises low
    entropy (2506.11108): the sign is the weight's, and `clamp`, a share of log|S|, says how sharp is sharp enough.
    A row without salient mass counts as spread out evenly; over a single token there is nothing to focus: 0.
    """
    mass = _salient_mass(evidence)
    q = evidence.attention * evidence.salience.unsqueeze(1) / _positive(mass).unsqueeze(-1)
    size = (evidence.salience > 0).sum(-1)
    # `xlogy` is 0 at q = 0, as the entropy wants; |S| ≤ 1 is settled below, its divisor here only avoids 0/0.
    relative = -torch.xlogy(q, q).sum(-1) / size.clamp(min=2).float().log().unsqueeze(-1)
    relative = torch.where(mass > 0, relative.clamp(clamp, 1.0), 1.0)
    return masked_mean(1.0 - relative, evidence.reading.response_mask) * (size > 1)


def repetition(evidence: Evidence, n: int = 2) -> Tensor:
    """Share of repeated n-grams: 1 − distinct / all, over the m − n + 1 n-grams; 0 if m < n. [B] in [0, 1).

    Tokens that differ in case or in the blank before them count as the same. The penalty of CAGSR (arXiv 2502.10482); a
    positive number, its weight is negative.
    """
    ids, mask = evidence.response_keys, evidence.reading.response_mask
    if ids.shape[1] < n:
        return torch.zeros(len(ids), device=ids.device)
    grams, whole = ids.unfold(1, n, 1), mask.unfold(1, n, 1).all(-1)
    row = torch.arange(len(ids), device=ids.device).view(-1, 1, 1).expand(*grams.shape[:2], 1)
    distinct: Tensor = torch.unique(torch.cat([row, grams], -1)[whole], dim=0)[:, 0].bincount(minlength=len(ids))
    total = whole.sum(-1)
    return (total - distinct).float() / total.clamp(min=1)


def coherence(evidence: Evidence) -> Tensor:
    """Fluency for the scorer: mean log-prob of the response tokens, nats. [B] in [−100, 0].

    The abstract's "coherence" (arXiv 2502.10482), read under the frozen reference unless the policy itself scores.
    """
    return masked_mean(_floored(evidence.reading.logprobs), evidence.reading.response_mask)


def grounding(evidence: Evidence) -> Tensor:
    """Copy-head attention on the very word generated: (1/m_c) Σ_{t content} Σ_i 1[x_i = y_t] a^copy[t, i].

    x_i = y_t where both tokens are of the same word, outside of the template and of earlier turns.

    a^copy = Σ_{l,h} w^copy[l, h] a^(l,h), see `heads`. [B] in [0, 1]; 0 where no response token is content. Ours.
    """
    return masked_mean(copied_mass(evidence), evidence.content)


def grounding_sum(evidence: Evidence) -> Tensor:
    """The same, not divided by m_c: [B] in [0, m_c].

    A mean invites dropping the risky token, a sum invites padding; a reward that holds both sides weighs both.
    """
    return (copied_mass(evidence) * evidence.content).sum(-1)


def lookback(evidence: Evidence) -> Tensor:
    """Share of attention on the prompt rather than on the response: (1/m) Σ_t Σ_i a[t, i]. [B] in [0, 1].

    Lookback Lens (Chuang et al. 2024, arXiv 2407.07071), combined over heads. Reads the attention as captured, since
    renormalised rows sum to 1; on an encoder–decoder it is 1 always.
    """
    assert evidence.reading.attention is not None, "this reading did not capture `attention`"
    return masked_mean(evidence.reading.attention.sum(-1), evidence.reading.response_mask)


def certainty(evidence: Evidence) -> Tensor:
    """Distance from not knowing: mean KL(uniform ‖ p_t), nats. [B] ≥ 0. Intuitor (arXiv 2505.19590)."""
    assert evidence.reading.certainty is not None
    return masked_mean(evidence.reading.certainty, evidence.reading.response_mask)


def entropy(evidence: Evidence) -> Tensor:
    """Negative entropy, more is surer: −(1/m) Σ_t H(p_t), nats. [B] ≤ 0. RENT (2505.22660), EMPO (2504.05812)."""
    assert evidence.reading.entropy is not None
    return -masked_mean(evidence.reading.entropy, evidence.reading.response_mask)


def contrast(evidence: Evidence) -> Tensor:
    """What this prompt does for the response: (1/m) Σ_t log p(y_t|x) − log p(y_t|x′), nats. [B].

    x′ is another prompt of the batch. Contrastive likelihood: a fluent answer to any question gains nothing.
    """
    assert evidence.contrast_logprobs is not None, "no log-probs under another prompt were measured"
    gain = _floored(evidence.reading.logprobs) - _floored(evidence.contrast_logprobs)
    return masked_mean(gain, evidence.reading.response_mask)


def reliance(evidence: Evidence) -> Tensor:
    """What the context does for the response: (1/m) Σ_t log p(y_t|x) − log p(y_t|question alone), nats. [B].

    The pointwise mutual information of response and context, which context-aware decoding raises (Shi et al. 2023,
    arXiv 2305.14739): what the model would say anyway gains nothing. 0 where the prompt is nothing but a question.
    """
    assert evidence.question_logprobs is not None, "no log-probs after the question alone were measured"
    gain = _floored(evidence.reading.logprobs) - _floored(evidence.question_logprobs)
    return masked_mean(gain, evidence.reading.response_mask)


def comprehensiveness(evidence: Evidence) -> Tensor:
    """What the attended evidence does for the response: (1/m) Σ_t log p(y_t|x) − log p(y_t|x without it), nats. [B].

    The evidence is the part of the context that the responses to a prompt attend to most (`salience.attended`). A
    response that the model would give without having looked there, from habit or from another sentence, gains nothing.
    The measure of ERASER (DeYoung et al. 2020, arXiv 1911.03429), with attention as the rationale. 0 without a context.
    """
    assert evidence.ablated_logprobs is not None, "no log-probs without the attended context were measured"
    gain = _floored(evidence.reading.logprobs) - _floored(evidence.ablated_logprobs)
    return masked_mean(gain, evidence.reading.response_mask)


def leave_one_out(evidence: Evidence) -> Tensor:
    """What the sentence that matters most does for the response: max_s (1/m) Σ_t log p(y_t|x) − log p(y_t|x without s),
    nats. [B].

    ContextCite's leave-one-out score (Cohen-Wang et al. 2024, arXiv 2409.00729) of the best source, a mean over tokens.
    An answer from habit, or one spread over the passage, needs no sentence. 0 without a context.
    """
    drops = sentence_drops(evidence)
    return drops.amax(-1).masked_fill(drops.amax(-1).isinf(), 0.0) if drops.shape[1] else drops.sum(-1)


def sentence_drops(evidence: Evidence) -> Tensor:
    """Mean drop of the log-prob of the response tokens without each sentence of the context, nats: [B, S]. -inf for
    sentences that a context does not have."""
    assert evidence.left_out_logprobs is not None and evidence.sentences is not None, "no sentence was left out"
    reading = evidence.reading
    drops = _floored(reading.logprobs).unsqueeze(1) - _floored(evidence.left_out_logprobs)
    mean = masked_mean(drops, reading.response_mask.unsqueeze(1))
    there = sentence_mass(torch.ones_like(evidence.sentences, dtype=mean.dtype), evidence.sentences, mean.shape[1]) > 0
    return mean.masked_fill(~there, -torch.inf)


def selfcite(evidence: Evidence) -> Tensor:
    """What the cited sentence does by itself, and the rest does not: (1/m) Σ_t log p(y_t|question, cited sentence) −
    log p(y_t|x without it), nats. [B].

    The reward of SelfCite (Chuang et al. 2025, arXiv 2502.09604): probability drop plus probability hold. The citation
    is the sentence that the copy heads looked at most, since responses here cite none themselves. 0 without a context.
    """
    assert evidence.left_out_logprobs is not None and evidence.cited_logprobs is not None
    cited = cited_sentence(evidence)
    rows = torch.arange(len(cited), device=cited.device)
    if not evidence.left_out_logprobs.shape[1]:
        return evidence.reading.logprobs.new_zeros(len(cited))
    without = evidence.left_out_logprobs[rows, cited.clamp(min=0)]
    gain = _floored(evidence.cited_logprobs) - _floored(without)
    return masked_mean(gain, evidence.reading.response_mask) * (cited >= 0)


def cited_sentence(evidence: Evidence) -> Tensor:
    """The sentence of the context that the copy heads looked at most from a response: [B] int64, -1 without any."""
    reading, sentences = evidence.reading, evidence.sentences
    assert reading.copy_attention is not None and sentences is not None
    count = int(sentences.max()) + 1 if sentences.numel() else 0
    if not count:
        return torch.full_like(reading.rollout.prompt_index, -1)
    mass = sentence_mass(reading.copy_attention.sum(1), sentences, count)
    return mass.argmax(-1).masked_fill(mass.sum(-1) == 0, -1)


def question_reliance(evidence: Evidence) -> Tensor:
    """What the question does for the response: mean log p(y_t|x) − log p(y_t|x without the question), nats. [B].

    The mean runs over the content tokens that the question does not say: a question said again owes everything to the
    question, and answers nothing. An answer to another question about the same passage gains nothing either. 0 where
    no token is left. The counterpart of `reliance`, ours.
    """
    assert evidence.unasked_logprobs is not None, "no log-probs without the question were measured"
    gain = _floored(evidence.reading.logprobs) - _floored(evidence.unasked_logprobs)
    return masked_mean(gain, evidence.added)


def agreement(evidence: Evidence) -> Tensor:
    """Whether question and response look at the same sentences of the context: Σ_s q(s) a(s). [B] in [0, 1].

    q(s) is the share of the question's attention to the context that is on sentence s; a(s) that of the response's
    attention to all that was written, so that what is read elsewhere, in an earlier turn, agrees with nothing. Both are
    the copy heads', the response's from its content tokens that the question does not say; 0 where none is left. Ours.
    """
    reading, sentences = evidence.reading, evidence.sentences
    assert reading.question_attention is not None and reading.copy_attention is not None and sentences is not None
    said = (reading.copy_attention * evidence.added.unsqueeze(-1)).sum(1) * evidence.written
    count = int(sentences.max()) + 1 if sentences.numel() else 0
    asked = sentence_mass(reading.question_attention, sentences, count)
    shared = (sentence_mass(said, sentences, count) * asked).sum(-1)
    return shared / _positive(said.sum(-1) * asked.sum(-1))


def sentence_mass(attention: Tensor, sentences: Tensor, count: int) -> Tensor:
    """Attention summed over the tokens of each sentence: [..., P] → [..., count].

    `sentences` [P] or [..., P] int64: the sentence of each token, from 0 to count − 1; -1 = none.

    >>> sentence_mass(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([-1, 0, 1, 0]), 2)
    tensor([10.,  4.])
    """
    mass = attention.new_zeros(*attention.shape[:-1], count + 1)
    return mass.scatter_add(-1, (sentences + 1).expand_as(attention), attention)[..., 1:]


def heads(evidence: Evidence, weights: Mapping[str, float] | None = None) -> Tensor:
    """Weighted attention of single heads to the salient prompt: Σ_{l,h} w[l, h] (1/m) Σ_t Σ_i s_i a^(l,h)[t, i]. [B].

    The features of Lookback Lens (Chuang et al. 2024, arXiv 2407.07071), over the salient prompt so that they also say
    something on an encoder–decoder, whose cross-attention is on the prompt always. `weights`: "layer.head" → w.
    Raises `UserError` for a head that the model does not have.
    """
    assert evidence.head_mass is not None, "no attention by head was measured"
    total = torch.zeros(len(evidence.head_mass), device=evidence.head_mass.device)
    for name, weight in (weights or {}).items():
        layer, head = (int(part) for part in name.split("."))
        if layer >= evidence.head_mass.shape[1] or head >= evidence.head_mass.shape[2]:
            raise UserError(f"no head {name} in this model", where="reward", fix="calibrate on this very model")
        total = total + weight * evidence.head_mass[:, layer, head]
    return total


def _salient_mass(evidence: Evidence) -> Tensor:
    """M_t = Σ_i s_i a[t, i]: [B, R]."""
    return torch.einsum("brp,bp->br", evidence.attention, evidence.salience)


def copied_mass(evidence: Evidence) -> Tensor:
    """Copy-head attention of each token on its own word in the prompt, Σ_i 1[x_i = y_t] a^copy[t, i]: [B, R]."""
    return (evidence.copy_attention * evidence.repeated).sum(-1)


def _floored(logprobs: Tensor) -> Tensor:
    return logprobs.clamp(min=LOWEST_LOGPROB)


def _positive(values: Tensor) -> Tensor:
    """`values` safe to divide by: 0 becomes 1, because what it divides is 0 as well."""
    return torch.where(values > 0, values, 1.0)
