"""The commands: what each takes and does. Each parses nothing itself, calls, and hands the result to the console.

A command returns its exit code: 0 done, 3 an audit that found the reward gameable, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attune.console import Console
from attune.errors import UserError

if TYPE_CHECKING:
    from attune.data import Row
    from attune.learn.settings import TrainConfig
    from attune.model.policy import Policy
    from attune.reward.named import RewardConfig

INTERRUPTED = 130
GAMEABLE = 3
AUDITED = 16
"""Prompts of the audit before training."""
TRAIN_HACK_RATE = 0.15
"""What that audit lets pass: 2 of 16 prompts may be an accident."""
Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """What a command is, what it takes and what it does (its exit code comes back)."""

    help: str
    needs: str
    """The options that it cannot do without, as the usage line shows them."""
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace, Console], int]


def _train_arguments(parser: Parser) -> None:
    from attune.config import add_arguments
    from attune.learn.settings import TrainConfig

    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options; flags go before it")
    parser.add_argument("--skip-audit", action="store_true", help="do not look first whether the reward can be gamed")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output from its last checkpoint")
    add_arguments(parser, TrainConfig)


def _train(options: argparse.Namespace, console: Console) -> int:
    from attune.config import flags_given, load_config
    from attune.data import read_rows
    from attune.files import new_run_dir
    from attune.learn.settings import TrainConfig
    from attune.learn.train import train
    from attune.model.policy import Policy
    from attune.report.page import write_report
    from attune.reward.named import config_of

    flags = flags_given(options, TrainConfig)
    file = options.config
    if options.resume and file is None and "output" in flags:
        file = new_run_dir(flags["output"], resume=True) / "config.yaml"
    config = load_config(TrainConfig, file, flags)
    reward = config_of(config.reward)
    rows = read_rows(config.prompts, template=config.template, need=("answers",) if "exact" in reward.weights else ())
    policy = Policy.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        lora=config.lora,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
    if not policy.shares_prefixes:
        family = policy.network.config.model_type
        console.note(f"{family}: its cache cannot be expanded, so a prompt is computed for each of its samples")
    run = new_run_dir(config.output, options.resume)
    try:
        if not options.resume and not options.skip_audit:
            _audit_briefly(config, policy, rows, console)
        with console.progress(config.steps, f"training on {reward_name(config.reward)}") as progress:

            def on_step(metrics: Mapping[str, float]) -> None:
                progress.update(int(metrics["step"]), **_shown(metrics))

            trained = train(config, policy, rows, run, resume=options.resume, on_step=on_step)
    except UserError:
        with suppress(OSError):
            run.rmdir()  # only a folder that nothing was written to
        raise
    page = write_report(run)
    if trained.stopped:
        console.warn(f"stopped early at step {trained.steps}: {trained.stopped}")
    if trained.interrupted:
        console.note(f"interrupted at step {trained.steps}; go on with: attune train --resume --output {run}")
        return INTERRUPTED
    console.note(f"{trained.steps} steps; model in {run / 'model'}, report in {page}")
    console.result({"steps": trained.steps, "stopped": trained.stopped, "model": run / "model", "report": page})
    return 0


def _audit_briefly(config: TrainConfig, policy: Policy, rows: Sequence[Row], console: Console) -> None:
    """Warn, before training, of a reward that degenerate responses beat."""
    from attune.measure.audit import AuditConfig, audit
    from attune.reward.named import config_of
    from attune.reward.reward import Reward

    settings = AuditConfig(max_new_tokens=config.sampling.max_new_tokens, seed=config.seed)
    some = rows[:: max(1, len(rows) // AUDITED)][:AUDITED]
    if len(some) < 2 or config.num_samples < 2:
        return
    reward = Reward(config_of(config.reward), policy, reference=policy)
    verdict = audit(policy, some, {"": reward}, settings)[""]
    if verdict.gameable(TRAIN_HACK_RATE):
        console.warn(
            f"audit of {reward_name(config.reward)} on {len(some)} prompts: {verdict.explain(TRAIN_HACK_RATE)} "
            "Training may find this; `attune audit` shows the table"
        )


def _score_arguments(parser: Parser) -> None:
    _model_arguments(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="rows with a prompt and a `response`")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="each row plus reward and signals")
    parser.add_argument("--reward", default="attention", help="a reward's name, module:function, or a YAML file")
    parser.add_argument("--template", help="text with {field} names that makes a prompt of a row")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="rows scored at a time (default: 64)")


def _score(options: argparse.Namespace, console: Console) -> int:
    from attune.data import read_rows, write_jsonl
    from attune.rank import score_rows
    from attune.reward.reward import Reward

    spec = _reward_config(options.reward)
    need = ("response", "answers") if "exact" in spec.weights else ("response",)
    rows = read_rows(options.input, template=options.template, need=need)
    policy = _load(options)
    reward = Reward(spec, policy, reference=policy)
    with console.progress(len(rows), "scoring") as progress:
        scored = score_rows(reward, rows, batch_size=options.batch_size, progress=progress.update)
    write_jsonl(options.output, scored)
    alone = len({str(row.prompt) for row in rows}) == len(rows)
    if alone and spec.normalise == "group" and len(rows) > 0:
        console.warn(
            f"{options.reward} compares responses to the same prompt, and every prompt here has one: each reward is 0; "
            "read the signals, or give several responses to each prompt"
        )
    names = ["reward", *scored[0]["signals"]]
    means = {name: _mean([{"reward": row["reward"], **row["signals"]}[name] for row in scored]) for name in names}
    console.table(f"{len(scored)} responses scored", ["signal", "mean"], [[name, mean] for name, mean in means.items()])
    console.result({"rows": len(scored), "output": options.output, "means": means})
    return 0


def _eval_arguments(parser: Parser) -> None:
    from attune.config import add_arguments
    from attune.measure.evaluate import EvalConfig

    _model_arguments(parser)
    parser.add_argument("--baseline", metavar="MODEL", help="another model to compare with, prompt by prompt")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="rows; `answers`, `reference`, `prior` measure more"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="gets results.json and report.html"
    )
    parser.add_argument("--template", help="text with {field} names that makes a prompt of a row")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    add_arguments(parser, EvalConfig)


def _eval(options: argparse.Namespace, console: Console) -> int:
    from attune.config import flags_given, load_config
    from attune.data import read_rows
    from attune.files import atomic_write, to_json
    from attune.measure.evaluate import EvalConfig, evaluate
    from attune.report.page import write_report
    from attune.report.tables import results_table

    config = load_config(EvalConfig, None, flags_given(options, EvalConfig))
    rows = read_rows(options.prompts, template=options.template, limit=options.limit)
    if (options.output / "results.json").exists():
        raise UserError("already holds results", where=str(options.output), fix="choose another --output")
    policy = _load(options)
    baseline = _load(options, options.baseline) if options.baseline else None
    with console.progress(len(rows) * (2 if baseline else 1), "evaluating") as progress:
        evaluation = evaluate(policy, rows, config, baseline, lambda done, _total: progress.update(done))
    atomic_write(options.output / "results.json", to_json(evaluation.to_json(), indent=2))
    page = write_report(options.output)
    console.table(*results_table(f"{len(rows)} prompts", evaluation.metrics))
    console.note(f"report in {page}")
    console.result(evaluation.to_json())
    return 0


def _audit_arguments(parser: Parser) -> None:
    from attune.config import add_arguments
    from attune.measure.audit import AuditConfig

    _model_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="rows; `answers` tell right from wrong")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="gets audit.json and audit.html")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["attention"],
        metavar="NAME",
        help="the reward to audit (default: attention); more stand beside it: names, module:function, or YAML files",
    )
    parser.add_argument("--template", help="text with {field} names that makes a prompt of a row")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="the first N prompts only (default: 100)")
    add_arguments(parser, AuditConfig)


def _audit(options: argparse.Namespace, console: Console) -> int:
    from attune.config import flags_given, load_config, to_dict
    from attune.data import read_rows
    from attune.files import atomic_write, to_json
    from attune.measure.audit import AuditConfig, audit, with_controls
    from attune.report.audit import write_audit
    from attune.report.tables import audit_tables
    from attune.reward.reward import Reward

    config = load_config(AuditConfig, None, flags_given(options, AuditConfig))
    specs = {name: _reward_config(name) for name in options.reward}
    needs = any("exact" in spec.weights for spec in specs.values())
    rows = read_rows(
        options.prompts, template=options.template, limit=options.limit, need=("answers",) if needs else ()
    )
    if (options.output / "audit.json").exists():
        raise UserError("already holds an audit", where=str(options.output), fix="choose another --output")
    policy = _load(options)
    # Nothing is trained here, so the policy is its own reference, and no copy of it is held.
    own = {name: Reward(spec, policy, reference=policy) for name, spec in specs.items()}
    rewards = with_controls(own, policy)
    with console.progress(len(rows), "auditing") as progress:
        verdicts = audit(policy, rows, rewards, config, progress.update)
    first = verdicts[options.reward[0]]
    found = {
        "model": options.model,
        "prompts": len(rows),
        "gameable": bool(first.gameable(config.max_hack_rate)),
        "verdict": first.explain(config.max_hack_rate),
        "config": to_dict(config),
        "rewards": {name: verdict.to_json() for name, verdict in verdicts.items()},
    }
    atomic_write(options.output / "audit.json", to_json(found, indent=2))
    page = write_audit(options.output)
    for table in audit_tables(verdicts):
        console.table(*table)
    (console.warn if found["gameable"] else console.note)(f"{options.reward[0]}: {found['verdict']}")
    console.note(f"report in {page}")
    console.result(found)
    return GAMEABLE if found["gameable"] else 0


def _demo_arguments(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="folder of the run")
    parser.add_argument("--model", choices=("causal", "encdec"), default="causal", help="which embedded model")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="training steps (default: 60)")
    parser.add_argument("--eval-prompts", type=int, default=150, metavar="N", help="fresh prompts of each split")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything (default: 0)")


def _demo(options: argparse.Namespace, console: Console) -> int:
    from attune.demo import run_demo
    from attune.files import new_run_dir
    from attune.report.tables import results_table

    run = new_run_dir(options.output)
    console.note(
        f"The embedded {options.model} model answers questions about stories. It was taught everybody's favourite "
        "place, and leans on that even when a story says otherwise (conflict).\n"
        "Now it trains on prompts alone: no answers, no reward model, only its attention to the prompt."
    )
    with console.progress(options.steps, "training on attention") as progress:
        trained, evaluation = run_demo(
            options.model,
            run,
            steps=options.steps,
            eval_prompts=options.eval_prompts,
            seed=options.seed,
            on_step=lambda m: progress.update(int(m["step"]), **_shown(m)),
        )
    if trained.stopped:
        console.warn(f"stopped early at step {trained.steps}: {trained.stopped}")
    for split, results in evaluation.by_split.items():
        console.table(*results_table(f"{split}: {options.eval_prompts} fresh prompts", results))
    console.note(f"report in {run / 'report.html'}")
    console.result(evaluation.to_json())
    return 0


def _model_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="model folder or hub id, causal or encoder–decoder")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default: auto)")
    parser.add_argument(
        "--attention", default="auto", choices=("auto", "eager"), help="eager serves families that auto refuses"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _load(options: argparse.Namespace, model: str | None = None) -> Any:
    from attune.model.policy import Policy

    return Policy.load(
        model or options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
    )


def _reward_config(given: str) -> RewardConfig:
    """A reward's name, a `module:function`, or a YAML file that holds a reward (alone, or under `reward:`)."""
    from attune.config import read_mapping
    from attune.reward.named import config_of

    return config_of(read_mapping(given, "reward") if given.endswith((".yaml", ".yml")) else given)


def reward_name(spec: str | Mapping[str, Any]) -> str:
    """A reward in a word: its name, or the signals it weighs."""
    return spec if isinstance(spec, str) else " + ".join(spec.get("weights", {}))


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures that the progress line has room for."""
    names = {"reward": "reward", "kl": "kl", "completions/mean_length": "length", "tokens_per_second": "tokens_per_s"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


COMMANDS: dict[str, Command] = {
    "demo": Command("the whole story on an embedded model, offline", "", _demo_arguments, _demo),
    "train": Command(
        "label-free RL: prompts in, a better model out",
        "--model MODEL --prompts FILE --output FOLDER ",
        _train_arguments,
        _train,
    ),
    "audit": Command(
        "can this reward be gamed? judged before training",
        "--model MODEL --prompts FILE --output FOLDER ",
        _audit_arguments,
        _audit,
    ),
    "score": Command(
        "reward and signals of given responses", "--model MODEL --input FILE --output FILE ", _score_arguments, _score
    ),
    "eval": Command(
        "measure a model, or compare two, with intervals",
        "--model MODEL --prompts FILE --output FOLDER ",
        _eval_arguments,
        _eval,
    ),
}
