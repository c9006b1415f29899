"""The public functions: `train`, `score`, `rank`, `audit`, `bench`, `evaluate`: for programs, as the commands are for a
shell.

Each takes a policy, then prompts in any form: a path or hub id, as the commands take them, or what a program holds
(texts, mappings, `Row`s, a `datasets.Dataset`). A reward is a name, a mapping or `RewardConfig`, a `module:function`, a
function of yours, or a `Reward`. Options go by keyword, under the names of the command's flags (`max_new_tokens=8`) or
of the fields of its settings (`sampling=Sampling(…)`). Bad input raises `UserError`, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor

from adhere import checking, ranking
from adhere.config import load_config, to_dict
from adhere.data import Columns, Row, read_rows, rows_of
from adhere.errors import UserError, unknown_name
from adhere.faithfulness import run as benching
from adhere.faithfulness.settings import BenchConfig, reward_of, with_controls
from adhere.faithfulness.summary import Bench
from adhere.learn import train as training
from adhere.learn.settings import TrainConfig
from adhere.locking import writing
from adhere.measure import audit as auditing
from adhere.measure import evaluate as evaluation
from adhere.measure.settings import AuditConfig, CheckConfig, EvalConfig
from adhere.model.embedded import EMBEDDED
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.options import fields_of, name_of, options
from adhere.ranking_settings import RankConfig, bring_candidates
from adhere.resume import new_run_dir
from adhere.reward.heads import CopyHeads, copy_heads, load_heads
from adhere.reward.named import NAMED, RewardConfig, config_of
from adhere.reward.reward import Reward
from adhere.reward.signals import Evidence

Prompts = str | Path | Iterable[str | Mapping[str, Any] | Row]
"""A file, a folder or a hub id; or texts, mappings with the fields of a file's rows, rows, a `datasets.Dataset`."""
AnyReward = str | Mapping[str, Any] | RewardConfig | Reward | Callable[[Evidence], Tensor]
"""A reward as a user gives it."""

GIVEN = "(given in Python)"
"""Prompts of a run that came from no file."""
_ELSEWHERE = {
    *("model", "lora", "device", "attention", "prompting", "trust_remote_code"),  # the policy has them
    *("prompts", "output", "reward"),  # arguments of `train`
    *("push_to_hub", "hub_public"),  # what the command does afterwards
}
"""Options of `adhere train` that are none of `train`."""


def train(
    policy: Policy,
    prompts: Prompts,
    *,
    output: str | Path,
    reward: AnyReward = "attention",
    resume: bool = False,
    on_step: training.OnStep = lambda metrics: None,
    **given: Any,
) -> training.Trained:
    """Train `policy` in place on prompts, without labels, and write the run to the folder `output`.

    `resume` continues the run in `output` from its last checkpoint; `on_step` gets the metrics of each step
    (docs/metrics.md). Options are the fields of `TrainConfig`, but for those that `Policy.load` has taken (model,
    adapter, device). A frozen copy of the policy as it is now reads the responses, unless the reward asks for the
    policy itself; the `reference` of a given `Reward` stays, and KL is then measured from that.

    Raises `UserError` for bad input, and `RunFailed` where the loss stops being a number or the disk is full.

    >>> import tempfile
    >>> from adhere import Policy, train
    >>> from adhere.toy import make_rows, model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> stories = make_rows("conflict", "train", 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = train(policy, stories, output=f"{folder}/run", steps=1, prompts_per_step=4, max_new_tokens=8)
    >>> done.steps, done.stopped
    (1, None)
    """
    known = {
        "model": _called(policy),
        "prompts": str(prompts) if isinstance(prompts, str | Path) else GIVEN,
        "output": str(output),
        "reward": _named(reward),
        "lora": _lora(policy),
        "device": policy.device.type,
        "attention": "eager" if policy.eager else "auto",
        "prompting": dataclasses.asdict(policy.chat),
    }
    (config,) = _settings(given, {TrainConfig: known}, apart=_ELSEWHERE)
    if isinstance(reward, Reward) and config.heads is not None:
        raise UserError("the reward brings its copy heads", where="heads", fix="leave heads out")
    rows = _rows(prompts, config.columns, config_of(config.reward), limit=config.limit)
    # What has a name is made by the run, with a frozen reader; what has none cannot be told in its settings.
    named = isinstance(reward, str | Mapping | RewardConfig)
    made = None if named else _bound(reward, policy, load_heads(config.heads) if config.heads else None)
    with writing(output):
        return _train(config, policy, rows, made, resume, on_step)


def _train(
    config: TrainConfig,
    policy: Policy,
    rows: Sequence[Row],
    reward: Reward | None,
    resume: bool,
    on_step: training.OnStep,
) -> training.Trained:
    """Train into the folder that `config` names; where that fails before it has begun, no folder is left."""
    run = new_run_dir(config.output, resume)
    try:
        return training.train(config, policy, rows, run, reward=reward, resume=resume, on_step=on_step)
    except UserError:
        with suppress(OSError):
            run.rmdir()  # only while it is empty: bad input leaves no folder behind
        raise


def score(
    policy: Policy, rows: Prompts, *, reward: AnyReward = "attention", batch_size: int = 64, **given: Any
) -> list[dict[str, Any]]:
    """Each row, which brings a `response`, with its `reward` and `signals`; in the order given.

    Rows with the same prompt form a group, wherever they stand. `batch_size`: rows scored at a time. Options are the
    fields of `adhere.data.Columns`: what the fields of a row are called.

    >>> from adhere import Policy, score
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> story = "mary went to the garden . john is in the office . where is mary ? answer :"
    >>> rows = [{"prompt": story, "response": place} for place in ("garden", "office")]
    >>> garden, office = score(policy, rows, reward={"weights": {"coherence": 1.0}, "normalise": "none"})
    >>> garden["response"], garden["reward"] > office["reward"]
    ('garden', True)
    """
    (columns,) = _settings(given, {Columns: {}}, also=("batch_size",))
    spec = config_of(_named(reward))
    found = _rows(rows, columns, spec, "response")
    return ranking.score_rows(_bound(reward, policy), found, batch_size=batch_size)


def check(policy: Policy, rows: Prompts, **given: Any) -> list[dict[str, Any]]:
    """Each row, which brings a context and a `response`, with its `faithfulness` in [0, 1] and the support of each
    sentence of the response, as `adhere.checking.check_rows` says.

    Options are the fields of `adhere.measure.settings.CheckConfig` and `adhere.data.Columns`. Raises `UserError` for a
    row without a context.

    >>> from adhere import Policy, check
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> story = "mary went to the garden . john is in the office ."
    >>> (row,) = check(policy, [{"context": story, "question": "where is mary ?", "response": "garden"}])
    >>> row["faithfulness"] > 0.9, row["sentences"][0]["sources"][0]["text"]
    (True, 'mary went to the garden .')
    """
    config, columns = _settings(given, {CheckConfig: {}, Columns: {}})
    return list(checking.check_rows(policy, _rows(rows, columns, None, "response"), config))


def rank(policy: Policy, prompts: Prompts, *, reward: AnyReward = "attention", **given: Any) -> list[ranking.Ranked]:
    """Candidates to each prompt, best first: `num_samples` that the policy draws, or those that the rows bring.

    Options are the fields of `adhere.ranking_settings.RankConfig` and `adhere.data.Columns`. A record's `best()` is the
    row with its best response, and its `pair(margin, blank)` a pair for DPO.

    >>> from adhere import Policy, rank
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> story = "mary went to the garden . john is in the office . where is mary ? answer :"
    >>> (ranked,) = rank(policy, [story], reward="certainty", num_samples=4, max_new_tokens=8)
    >>> rewards = [candidate["reward"] for candidate in ranked.candidates]
    >>> len(rewards), rewards == sorted(rewards, reverse=True)
    (4, True)
    """
    config, columns = _settings(given, {RankConfig: {}, Columns: {}}, apart=("keep", "margin"))
    rows = _rows(prompts, columns, config_of(_named(reward)))
    without = [row.where or f"row {number}" for number, row in enumerate(rows, 1) if not row.candidates]
    brought = bring_candidates(len(rows) - len(without), len(rows), without[0] if without else "")
    if not brought:
        config.check_draw()
    ranking.check(policy, rows, config)
    chosen = set(given) | set(_plain(given.get("sampling", {})))
    own = [name for name, _, _ in fields_of(Sampling) if name in chosen]
    draw = ranking.given_candidates(policy) if brought else ranking.sampled_candidates(policy, config, own)
    made = _bound(reward, policy)
    batches = policy.progress(ranking.rank(made, rows, config, draw), "ranking", len(rows), size=len)
    return [ranked for batch in batches for ranked in batch]


def audit(policy: Policy, prompts: Prompts, *, reward: AnyReward = "attention", **given: Any) -> auditing.Verdict:
    """Whether a reward can be gamed, before anything is trained: degenerate responses against the policy's own samples.

    Options are the fields of `adhere.measure.settings.AuditConfig` and `adhere.data.Columns`. The limit goes to the
    verdict: `gameable(0.05)`.

    >>> from adhere import Policy, audit
    >>> from adhere.toy import make_rows, model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> verdict = audit(policy, make_rows("conflict", "train", 4), reward="length", num_samples=2, max_new_tokens=8)
    >>> verdict.explain(0.05).split(":")[0]  # longer is better, it says: so any rambling wins
    'Gameable'
    """
    config, columns = _settings(given, {AuditConfig: {}, Columns: {}}, apart=("max_hack_rate",))
    rows = _rows(prompts, columns, config_of(_named(reward)))
    return auditing.audit(policy, rows, {"": _bound(reward, policy)}, config)[""]


def bench(
    policy: Policy,
    rows: Prompts,
    *,
    rewards: Sequence[str] | Mapping[str, AnyReward] = ("attention",),
    limit: int | None = None,
    **given: Any,
) -> Bench:
    """Whether rewards prefer what the passage supports, beside the default and the controls (docs/bench.md).

    `rows` bring `context`, `question` and `answers`; the first `limit` of them are measured, and the others lend their
    answers. `rewards`: names of rewards or signals, or any rewards by names of your own; `policy` reads for all of
    them. Options are the fields of `adhere.faithfulness.settings.BenchConfig` and `adhere.data.Columns`.

    >>> from adhere import Policy, bench
    >>> from adhere.toy import model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> story = "mary went to the garden . john is in the office ."
    >>> asked = {"mary": "garden", "john": "office"}
    >>> rows = [{"context": story, "question": f"where is {who} ?", "answers": [at]} for who, at in asked.items()]
    >>> found = bench(policy, rows, splits=["distractor"], template="{context} {question} answer :")
    >>> found.pairs["distractor"]["coherence"].mean  # the office is not where mary is, nor the garden where john is
    1.0
    """
    config, columns = _settings(given, {BenchConfig: {}, Columns: {}}, also=("limit", "rewards"))
    named = rewards if isinstance(rewards, Mapping) else {name: name for name in rewards}
    heads = copy_heads(policy)
    made = {
        name: _bound(reward_of(spec) if isinstance(spec, str | Mapping) else spec, policy, heads)
        for name, spec in named.items()
    }
    every = with_controls({name: reward.config for name, reward in made.items()})
    made = {name: made.get(name) or Reward(spec, policy, heads) for name, spec in every.items()}
    return benching.bench(policy, _rows(rows, columns), made, heads, config, columns=columns, limit=limit)


def evaluate(
    policy: Policy, prompts: Prompts, *, baseline: Policy | None = None, **given: Any
) -> evaluation.Evaluation:
    """Every metric that the rows allow, with 95 % intervals, and the difference to `baseline` prompt by prompt.

    Options are the fields of `EvalConfig` and `adhere.data.Columns`; `judge` names a reward that says who wins.

    >>> from adhere import Policy, evaluate
    >>> from adhere.toy import make_rows, model_path
    >>> policy = Policy.load(model_path("causal"), device="cpu")
    >>> found = evaluate(policy, make_rows("agree", "test", 4), num_samples=2, max_new_tokens=8)
    >>> 0 <= found.metrics["exact_match"].after.mean <= 1
    True
    """
    config, columns = _settings(given, {EvalConfig: {}, Columns: {}})
    return evaluation.evaluate(policy, _rows(prompts, columns), config, baseline)


def _settings(
    given: Mapping[str, Any],
    classes: Mapping[type[Any], Mapping[str, Any]],
    apart: Collection[str] = (),
    also: Collection[str] = (),
) -> list[Any]:
    """A record of each class, from what is known of it and from options given by keyword, each the name of a field or
    of a flag. `apart`: fields that are no options here; `also`: other options, to be offered.

    Raises `UserError`: unknown options, with the nearest ones, or values that make no sense."""
    places = [_places(cls, apart) for cls in classes]
    offered = {*also, *(name for known in places for name in known)}
    faults = [unknown_name("option", name, offered) for name in given if name not in offered]
    if faults:
        raise faults[0] if len(faults) == 1 else UserError("\n".join(map(str, faults)))
    return [
        load_config(cls, None, {**known, **{names[n]: _plain(value) for n, value in given.items() if n in names}})
        for (cls, known), names in zip(classes.items(), places, strict=True)
    ]


def _places(cls: type[Any], apart: Collection[str]) -> dict[str, str]:
    """What an option of `cls` may be called → its place in the configuration."""
    names = {option.flag.removeprefix("--").replace("-", "_"): option.path for option in options(cls)}
    names |= {name: name for name, _, _ in fields_of(cls)}
    return {name: path for name, path in names.items() if path.partition(".")[0] not in apart}


def _plain(value: Any) -> Any:
    """Settings that come as a dataclass, in the form of a configuration file."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    # Only a variant has a name, which says which of several it is.
    return ({"name": name_of(type(value))} if hasattr(value, "name") else {}) | to_dict(value)


def _rows(
    prompts: Prompts, columns: Columns, reward: RewardConfig | None = None, *need: str, limit: int | None = None
) -> list[Row]:
    """The first `limit` rows, with all that `reward` reads of them and what else they need."""
    if reward is not None and "exact" in reward.weights:
        need = (*need, "answers")
    if isinstance(prompts, str | Path):
        return read_rows(prompts, columns, need=need, limit=limit)
    return rows_of(prompts if isinstance(prompts, Mapping) else islice(prompts, limit), columns, need=need)


def _named(reward: AnyReward) -> str | Mapping[str, Any]:
    """A reward as a configuration file has it."""
    if isinstance(reward, str | Mapping):
        return reward
    if not isinstance(reward, Reward | RewardConfig):
        return f"{reward.__module__}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"
    config = reward.config if isinstance(reward, Reward) else reward
    return next((name for name, known in NAMED.items() if known == config), dataclasses.asdict(config))


def _bound(reward: AnyReward, policy: Policy, heads: CopyHeads | None = None) -> Reward:
    """The reward, read by the policy itself unless it brings another reader."""
    if isinstance(reward, Reward):
        if reward.policy is not policy:
            raise UserError("the reward is bound to another policy", where="reward", fix="make it with this policy")
        return reward
    spec = _named(reward)
    own = {} if isinstance(reward, str | Mapping | RewardConfig) else {str(spec): reward}
    return Reward(config_of(spec), policy, heads, functions=own)


def _called(policy: Policy) -> str:
    """The name of an embedded model, or the folder or hub id that the policy was loaded from."""
    embedded = (name for name, folder in EMBEDDED.items() if policy.folder == Path(folder))
    return next(embedded, str(policy.network.name_or_path))


def _lora(policy: Policy) -> Mapping[str, Any] | None:
    """The options of the policy's adapter, or None where all weights are trained."""
    if not isinstance(policy.model, PeftModel):
        return None
    adapter = policy.model.peft_config[policy.model.active_adapter]
    assert isinstance(adapter, LoraConfig), "no other adapter is loaded"
    return {
        "rank": adapter.r,
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "target_modules": sorted(adapter.target_modules or ()),  # as PEFT has found them
        "use_rslora": adapter.use_rslora,
    }
