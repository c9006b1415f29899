"""What a response is like, measured on text alone: pure functions, one number per prompt, so that they can be paired.

Each returns a list as long as its input; None stands where a prompt gives no figure (no answers, nothing to compare)
and is left out of means by the caller. Nothing here is a reward, and nothing reads a model: log-probs are passed in.
Languages written without blanks (Chinese, Japanese, Thai, …) are compared by single characters, see `adhere.text`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from rouge_score.rouge_scorer import RougeScorer

from adhere.errors import UserError
from adhere.reward.salience import FUNCTION_WORDS
from adhere.text import answer_words, contains_answer, is_answer, words

A = TypeVar("A")
B = TypeVar("B")
Values = Sequence[float | None]
"""One figure a prompt; None where the prompt has none."""


@dataclass(frozen=True)
class Metric:
    """How a figure is to be read."""

    label: str
    better: int
    """1 = higher is better, −1 = lower is better, 0 = neither by itself."""
    about: str


METRICS: dict[str, Metric] = {
    "exact_match": Metric("Exact match", 1, "share of greedy responses that are an accepted answer"),
    "f1": Metric("Answer F1", 1, "word overlap of the greedy response with the nearest accepted answer"),
    "contained": Metric("Answer contained", 1, "share of greedy responses that hold an accepted answer word for word"),
    "rouge_l": Metric("ROUGE-L", 1, "longest common subsequence of words with the reference text, F1"),
    "faithfulness": Metric(
        "Faithfulness", 1, "where prompt and prior disagree: right answers / (right answers + prior)"
    ),
    "prior_rate": Metric("Prior answers", -1, "where prompt and prior disagree: share of responses that are the prior"),
    "relevance": Metric("Relevance", 1, "cosine between sentence embeddings of prompt and greedy response"),
    "relevance_words": Metric("Relevance (words)", 1, "cosine between the content words of prompt and response"),
    "overlap": Metric("Word overlap", 0, "share of the response's content words that occur in the prompt"),
    "consistency": Metric("Consistency", 1, "mean pairwise F1 between samples of one prompt"),
    "rephrased": Metric(
        "Consistency (rephrased)", 1, "mean pairwise F1 between the greedy responses to a prompt and to its paraphrases"
    ),
    "follow_up": Metric("Follow-up", -1, "nats a token that what is said next costs, after prompt and response"),
    "win_rate": Metric("Win rate", 1, "share of prompts where the judge prefers the response to the baseline's"),
    "repetition": Metric("Repetition", -1, "share of 2-grams that were in the response already"),
    "distinct_1": Metric("Distinct-1", 0, "different words / words, over the samples of one prompt"),
    "distinct_2": Metric("Distinct-2", 0, "different 2-grams / 2-grams, over the samples of one prompt"),
    "length": Metric("Length", 0, "tokens of the greedy response, end token included"),
    "ended": Metric("Ended by itself", 1, "share of greedy responses that were not cut off at the length limit"),
    "kl": Metric("KL from baseline", 0, "nats per response, on the policy's own samples"),
}
"""Every figure that `evaluate` gives, in the order of a table."""


def content_words(text: str) -> list[str]:
    """`words` without English function words."""
    return [word for word in words(text) if word not in FUNCTION_WORDS]


def token_f1(first: str, second: str) -> float:
    """2·|a ∩ b| / (|a| + |b|) over the multisets of normalised words, in [0, 1]; 1 for two texts without words.

    Rajpurkar et al. 2016 (SQuAD), section 6.1; characters of scripts without blanks count as words (MLQA, Lewis et al.
    2020).

    >>> token_f1("the red car", "a red bus")  # articles go: 2 · 1 / (2 + 2)
    0.5
    """
    a, b = Counter(answer_words(first)), Counter(answer_words(second))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def exact_match(responses: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float | None]:
    """1 where the normalised response equals an accepted answer, else 0; None without answers (SQuAD)."""
    return _against(is_answer, responses, answers)


def f1(responses: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float | None]:
    """max over the accepted answers of `token_f1`; None without answers (SQuAD)."""
    return _against(lambda response, known: max(token_f1(response, a) for a in known), responses, answers)


def contained(responses: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float | None]:
    """1 where an accepted answer stands in the response word for word, else 0; None without answers.

    For models that answer in sentences. A response that repeats the passage has it too: read it beside `length`.
    """
    return _against(contains_answer, responses, answers)


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """max over references of ROUGE-L's F1 (Lin 2004, eq. 2–4, β = 1); None without references.

    By `rouge_score`, without stemming, on our `words`: its own tokenizer drops what is not a–z or 0–9.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def nearest(response: str, known: Sequence[str]) -> float:
        return max(float(scorer.score(reference, response)["rougeL"].fmeasure) for reference in known)

    return _against(nearest, responses, references)


class _Words:
    """`words`, in the form that `rouge_score` takes."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def faithfulness(
    responses: Sequence[str], answers: Sequence[Sequence[str]], priors: Sequence[str | None]
) -> list[float | None]:
    """Under conflict: 1 where the response is a right answer, 0 where it is the prior's, None where it is neither.

    A prompt is in conflict when it has a `prior` (what the model would say without reading) that no accepted answer
    equals. The mean is right / (right + prior), a share among responses that chose a side: read it beside `exact_match`
    and `prior_rate`, for a policy that answers something else altogether leaves it untouched.
    """

    def side(response: str, known: Sequence[str], prior: str) -> float | None:
        return 1.0 if is_answer(response, known) else 0.0 if is_answer(response, [prior]) else None

    return _under_conflict(side, responses, answers, priors)


def prior_rate(
    responses: Sequence[str], answers: Sequence[Sequence[str]], priors: Sequence[str | None]
) -> list[float | None]:
    """Under conflict (see `faithfulness`): 1 where the response is the prior, else 0, over all such prompts."""
    return _under_conflict(lambda response, _known, prior: is_answer(response, [prior]), responses, answers, priors)


def relevance_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Σ_w p_w r_w / (‖p‖ ‖r‖) over counts of content words, in [0, 1]; 0 where either has none.

    Lexical: a paraphrase scores low and a copied prompt 1, so it says that a response is on the subject, not that it
    is right.
    """
    return [_cosine(Counter(content_words(p)), Counter(content_words(r))) for p, r in _paired(prompts, responses)]


def overlap(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the response's content words that occur in the prompt, in [0, 1]; 0 where it has none."""
    figures = []
    for prompt, response in _paired(prompts, responses):
        given, known = content_words(response), set(content_words(prompt))
        figures.append(sum(word in known for word in given) / len(given) if given else 0.0)
    return figures


def consistency(samples: Sequence[Sequence[str]]) -> list[float | None]:
    """2 / (K(K−1)) Σ_{i<j} `token_f1`(y_i, y_j) over the K samples of each prompt; None for K < 2.

    Saying nothing, or always the same, is perfectly consistent: read it beside exact match and length.
    """
    return [_agreement(group) if len(group) > 1 else None for group in samples]


def repetition(tokens: Sequence[Sequence[Hashable]], n: int = 2) -> list[float]:
    """1 − (different n-grams) / (n-grams) of each response; 0 for fewer than n tokens."""
    return [1 - _variety([response], n) if len(response) >= n else 0.0 for response in tokens]


def distinct(samples: Sequence[Sequence[Sequence[Hashable]]], n: int) -> list[float | None]:
    """(Different n-grams) / (n-grams), pooled over the samples of each prompt; None where they have no n-gram.

    Li et al. 2016, section 5.1, per prompt. It falls with length and with K, whatever is said: compare like with like.
    """
    return [_variety(group, n) if any(len(s) >= n for s in group) else None for group in samples]


def length(tokens: Sequence[Sequence[Hashable]]) -> list[float]:
    """Tokens of each response."""
    return [float(len(response)) for response in tokens]


def kl(logprobs: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> list[float]:
    """Σ_t (log π(y_t) − log π_ref(y_t)) of each response, nats: on samples of π an unbiased estimate of KL(π ‖ π_ref).

    One response may fall below 0; the mean over samples does not, but for noise. Rows may be padded with 0 in both.
    """
    pairs = _paired(logprobs, reference)
    return [math.fsum(ours - theirs for ours, theirs in _paired(a, b)) for a, b in pairs]


def _agreement(group: Sequence[str]) -> float:
    # Samples of a sharp policy are few texts many times: compare each pair of texts once.
    counts = list(Counter(group).items())
    same = sum(count * (count - 1) / 2 for _, count in counts)
    other = sum(m * n * token_f1(a, b) for (a, m), (b, n) in combinations(counts, 2))
    return (same + other) / (len(group) * (len(group) - 1) / 2)


def _against(
    judge: Callable[[str, Sequence[str]], float], responses: Sequence[str], known: Sequence[Sequence[str]]
) -> list[float | None]:
    return [float(judge(response, accepted)) if accepted else None for response, accepted in _paired(responses, known)]


def _under_conflict(
    judge: Callable[[str, Sequence[str], str], float | None],
    responses: Sequence[str],
    answers: Sequence[Sequence[str]],
    priors: Sequence[str | None],
) -> list[float | None]:
    figures: list[float | None] = []
    for (response, known), prior in _paired(_paired(responses, answers), priors):
        found = None if not known or prior is None or is_answer(prior, known) else judge(response, known, prior)
        figures.append(None if found is None else float(found))
    return figures


def _cosine(first: Counter[str], second: Counter[str]) -> float:
    norms = math.sqrt(sum(c * c for c in first.values()) * sum(c * c for c in second.values()))
    return min(1.0, sum(count * second[word] for word, count in first.items()) / norms) if norms else 0.0


def _variety(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams)


def _paired(first: Sequence[A], second: Sequence[B]) -> list[tuple[A, B]]:
    if len(first) != len(second):
        raise UserError(f"{len(first)} entries against {len(second)}", fix="give one of each for every prompt")
    return list(zip(first, second, strict=True))
