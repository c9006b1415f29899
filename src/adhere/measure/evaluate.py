"""One policy, or a policy against its baseline, on one set of prompts: every metric the rows allow, with intervals.

Each policy answers each prompt once greedily and `num_samples` times at a temperature, both with the same seeds. What
is compared is always the same prompt with itself. Nothing is trained and nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from adhere.data import Row, require_measurable
from adhere.errors import UserError
from adhere.measure import metrics
from adhere.measure.batch_cache import BatchCache, Columns
from adhere.measure.metrics import METRICS, Values
from adhere.measure.readers import Embedder, follow_up, wins
from adhere.measure.settings import EvalConfig
from adhere.measure.stats import Estimate, bootstrap, holm, paired_bootstrap, permutation_test
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward.heads import CopyHeads
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.row_responses import paraphrases
from adhere.text import words
from adhere.types import Prompts

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One metric of one policy, and against its baseline where there is one."""

    after: Estimate
    """The policy that was asked about."""
    before: Estimate | None = None
    """The baseline."""
    difference: Estimate | None = None
    """after − before over the prompts where both have a figure: for faithfulness, fewer than either has."""
    p: float | None = None
    """Two-sided paired permutation test of `difference`."""
    p_holm: float | None = None
    """`p`, adjusted for all metrics of the same table (Holm)."""

    def to_json(self) -> dict[str, Any]:
        figures = {"before": self.before, "after": self.after, "difference": self.difference}
        known: dict[str, Any] = {name: figure.to_json() for name, figure in figures.items() if figure is not None}
        return known if self.p is None else {**known, "p": self.p, "p_holm": self.p_holm}


Results = dict[str, Result]


@dataclass(frozen=True)
class Responses:
    """What one policy said to every prompt, and its figures."""

    greedy: tuple[str, ...]
    samples: tuple[tuple[str, ...], ...]
    """K responses of each prompt."""
    values: dict[str, Values]
    """Per metric, one figure a prompt; None where it has none."""


@dataclass(frozen=True)
class Evaluation:
    """Figures by metric, over all prompts and by the rows' `split` and `kind`."""

    config: EvalConfig
    rows: tuple[Row, ...]
    metrics: Results
    by_split: dict[str, Results]
    by_kind: dict[str, Results]
    after: Responses
    before: Responses | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of results.json: figures as {mean, low, high, n}, and both greedy responses to every prompt."""
        return {
            "config": asdict(self.config),
            "metrics": _json(self.metrics),
            "by_split": {name: _json(results) for name, results in self.by_split.items()},
            "by_kind": {name: _json(results) for name, results in self.by_kind.items()},
            "samples": [self._sample(place) for place in range(len(self.rows))],
        }

    def _sample(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        sample: dict[str, Any] = {"prompt": row.prompt}
        if self.before is not None:
            sample["before"] = self.before.greedy[place]
        sample |= {"after": self.after.greedy[place], "answers": list(row.answers)}
        known = {name: row.fields.get(name) for name in ("kind", "split", "prior")}
        return sample | {name: str(value) for name, value in known.items() if value is not None}


def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    config: EvalConfig | None = None,
    baseline: Policy | None = None,
    cache: BatchCache | None = None,
    heads: CopyHeads | None = None,
) -> Evaluation:
    """Measure `policy` on `rows`, and the difference to `baseline` (say, `policy.reference()` from before training).

    Every metric of `adhere.measure.metrics.METRICS` is given for which at least one row has what it needs: `answers`
    (exact match, F1), a `reference` (ROUGE-L), answers and a `prior` (faithfulness, prior rate), a `follow_up`, or
    `paraphrases`; a baseline with the same vocabulary (KL), an embedder, a judge. Figures are means over prompts with
    95 % bootstrap intervals. Batches that `cache` holds are not done again. `heads`:
    copy heads of the baseline, for a judge that reads them.

    Raises `UserError`: no rows, a judge without a baseline, a field of another type than it should have, or a prompt
    that a policy cannot read.
    """
    if not rows:
        raise UserError("no rows to evaluate on", fix="give at least one prompt")
    require_measurable(rows)
    config = config or EvalConfig()
    if config.judge and baseline is None:
        raise UserError("`judge` compares with a baseline", fix="give a baseline, or no judge")
    cache = cache or BatchCache()
    embedder = Embedder(config.embedder) if config.embedder else None
    reader = baseline or policy
    before = None
    if baseline is not None:
        said = _ask(baseline, rows, config, None, reader, "evaluating the baseline", partial(cache.get, "before"))
        before = _responses(rows, said, embedder)
    said = _ask(policy, rows, config, baseline, reader, "evaluating", partial(cache.get, "after"))
    after = _responses(rows, said, embedder)
    if config.judge and baseline is not None and before is not None:
        won = wins(Reward(config_of(config.judge), baseline, heads), rows, after.greedy, before.greedy)
        after = replace(after, values={**after.values, "win_rate": won})

    def results(places: Sequence[int]) -> Results:
        return _results(after, before, places, config.seed)

    return Evaluation(
        config,
        tuple(rows),
        results(range(len(rows))),
        {name: results(places) for name, places in _groups(rows, "split").items()},
        {name: results(places) for name, places in _groups(rows, "kind").items()},
        after,
        before,
    )


def _ask(
    policy: Policy,
    rows: Sequence[Row],
    config: EvalConfig,
    baseline: Policy | None,
    reader: Policy,
    title: str,
    cached: Callable[[int, Callable[[], Columns]], Columns],
) -> dict[str, list[Any]]:
    """All of `rows` answered, batch by batch; `baseline` and `reader` only read what `policy` said."""
    compared = baseline if baseline is not None and _same_tokens(policy, baseline) else None
    # All prompts are encoded before the first response, so that a bad one costs no time.
    starts = range(0, len(rows), config.batch_size)
    batches = [rows[start : start + config.batch_size] for start in starts]
    encoded = []
    for some in policy.progress(batches, "encoding prompts", len(rows), size=len):
        names = [row.where for row in some]
        encoded.append(policy.encode([row.prompt for row in some], [row.answers for row in some], names))
        policy.check_room(encoded[-1], config.max_new_tokens, names)
    found: dict[str, list[Any]] = {}
    parts = zip(starts, batches, encoded, strict=True)
    for start, some, prompts in policy.progress(parts, title, len(rows), size=lambda part: len(part[1])):
        make = partial(_batch, policy, some, prompts, config, compared, reader, config.seed + start)
        for name, values in cached(start, make).items():
            found.setdefault(name, []).extend(values)
    return found


def _batch(
    policy: Policy,
    rows: Sequence[Row],
    prompts: Prompts,
    config: EvalConfig,
    compared: Policy | None,
    reader: Policy,
    seed: int,
) -> dict[str, list[Any]]:
    """What the policy says to some prompts, and the figures that need a model."""
    alone = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    drawn = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    single = policy.sample(prompts, 1, sampling=alone, seed=config.seed)
    many = policy.sample(prompts, config.num_samples, sampling=drawn, seed=seed)
    found: dict[str, list[Any]] = {
        "greedy": list(single.responses),
        "samples": _by_prompt(many.responses, config.num_samples),
        "length": single.lengths.tolist(),
        "ended": single.ended.float().tolist(),
        "follow_up": follow_up(reader, rows, single.responses),
    }
    if compared is not None:
        # Both from a reading: in half precision a decoded log-prob differs from a replayed one, and would count.
        ours, theirs = (p.read(many, attention=False, spread=()).logprobs.tolist() for p in (policy, compared))
        divergence = _by_prompt(metrics.kl(ours, theirs), config.num_samples)
        found["kl"] = [sum(group) / len(group) for group in divergence]
    worded = [paraphrases(row.fields) for row in rows]
    if texts := [text for group in worded for text in group]:
        names = [f"{row.where}, its paraphrase" for row, group in zip(rows, worded, strict=True) for _ in group]
        reworded = policy.encode(texts, names=names)
        policy.check_room(reworded, config.max_new_tokens, names)
        said = iter(policy.sample(reworded, 1, sampling=alone, seed=config.seed).responses)
        groups = [[own, *(next(said) for _ in group)] for own, group in zip(single.responses, worded, strict=True)]
        found["rephrased"] = metrics.consistency(groups)
    else:
        found["rephrased"] = [None] * len(rows)
    return found


def _responses(rows: Sequence[Row], found: dict[str, list[Any]], embedder: Embedder | None) -> Responses:
    """Everything that was said, with the figures of the texts added."""
    greedy, samples = found.pop("greedy"), [tuple(group) for group in found.pop("samples")]
    values: dict[str, Values] = {**_text_figures(rows, greedy, samples), **found}
    if embedder is not None:
        values["relevance"] = embedder.relevance([_text(row) for row in rows], greedy)
    return Responses(tuple(greedy), tuple(samples), {name: values[name] for name in METRICS if name in values})


def _text_figures(rows: Sequence[Row], greedy: Sequence[str], samples: Sequence[Sequence[str]]) -> dict[str, Values]:
    prompts, answers = [_text(row) for row in rows], [row.answers for row in rows]
    priors = [row.fields.get("prior") for row in rows]
    said = [[words(sample) for sample in group] for group in samples]
    return {
        "exact_match": metrics.exact_match(greedy, answers),
        "f1": metrics.f1(greedy, answers),
        "contained": metrics.contained(greedy, answers),
        "rouge_l": metrics.rouge_l(greedy, [[row.reference] if row.reference else [] for row in rows]),
        "faithfulness": metrics.faithfulness(greedy, answers, priors),
        "prior_rate": metrics.prior_rate(greedy, answers, priors),
        "relevance_words": metrics.relevance_words(prompts, greedy),
        "overlap": metrics.overlap(prompts, greedy),
        "consistency": metrics.consistency(samples),
        "repetition": metrics.repetition([words(response) for response in greedy]),
        "distinct_1": metrics.distinct(said, 1),
        "distinct_2": metrics.distinct(said, 2),
    }


def _results(after: Responses, before: Responses | None, places: Sequence[int], seed: int) -> Results:
    """Figures over the prompts at `places`; a metric without any figure there is left out."""
    found: Results = {}
    for name, values in after.values.items():
        here = [values[place] for place in places]
        known = [value for value in here if value is not None]
        if not known:
            continue
        found[name] = Result(bootstrap(known, seed))
        if before is None or name not in before.values:
            continue
        there = [before.values[name][place] for place in places]
        old = [value for value in there if value is not None]
        if old:
            found[name] = replace(found[name], before=bootstrap(old, seed))
        pairs = [(a, b) for a, b in zip(here, there, strict=True) if a is not None and b is not None]
        if pairs:
            new, base = [a for a, _ in pairs], [b for _, b in pairs]
            difference, p = paired_bootstrap(new, base, seed), permutation_test(new, base, seed)
            found[name] = replace(found[name], difference=difference, p=p)
    tested = {name: result.p for name, result in found.items() if result.p is not None}
    for name, adjusted in zip(tested, holm(list(tested.values())), strict=True):
        found[name] = replace(found[name], p_holm=adjusted)
    return found


def _groups(rows: Sequence[Row], field: str) -> dict[str, list[int]]:
    """Places of the rows by their `field`, in order of first sight; rows without it are in no group."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if row.fields.get(field) is not None:
            groups.setdefault(str(row.fields[field]), []).append(place)
    return groups


def _by_prompt(values: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """Neighbours in groups of `size`."""
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]


def _same_tokens(policy: Policy, baseline: Policy) -> bool:
    """Whether `baseline` can read what `policy` wrote, id by id."""
    if policy.is_encoder_decoder != baseline.is_encoder_decoder:
        return False
    return policy.tokenizer is baseline.tokenizer or policy.tokenizer.get_vocab() == baseline.tokenizer.get_vocab()


def _text(row: Row) -> str:
    """What the user wrote: the prompt, or the contents of its messages."""
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(str(message["content"]) for message in row.prompt)


def _json(results: Mapping[str, Result]) -> dict[str, Any]:
    return {name: result.to_json() for name, result in results.items()}
