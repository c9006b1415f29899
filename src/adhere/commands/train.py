"""`adhere train` and `adhere demo`: what changes a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adhere.commands.common import (
    Command,
    check_models,
    check_new_folder,
    list_rewards,
    mean,
    reward_name,
    reward_written,
    shown,
    tell_prompting,
)
from adhere.commands.parser import Parser, count, seed
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.data import Row, read_rows
from adhere.errors import UserError
from adhere.files import atomic_write, to_json
from adhere.learn.settings import TrainConfig
from adhere.learn.trackers import check_login
from adhere.locking import writing
from adhere.measure.settings import AuditConfig
from adhere.model.embedded import EMBEDDED
from adhere.origin import record
from adhere.progress import phase
from adhere.resume import new_run_dir
from adhere.reward.named import config_of

if TYPE_CHECKING:
    from adhere.learn.train import Trained
    from adhere.model.policy import Policy

COMMON = (
    "reward",
    "algorithm",
    "steps",
    "prompts_per_step",
    "num_samples",
    "limit",
    "sampling.temperature",
    "sampling.max_new_tokens",
    "learning_rate",
    "lora",
    "seed",
    "device",
)
"""Options that most runs set."""
INTERRUPTED = 130
AUDITED = 16
"""Prompts of the audit before training."""
FLAT_SHARE = 0.5
"""Share of flat groups in the first steps from which a run is told at once."""
FLAT_STEPS = 3
TRAIN_HACK_RATE = 0.15
"""What that audit lets pass: 2 of 16 prompts may be an accident."""


def _train_arguments(parser: Parser) -> None:
    parser.required.title = "required, here or in --config"
    parser.common.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options; flags go before it")
    parser.common.add_argument(
        "--resume", action="store_true", help="go on with the run in --output from its last checkpoint"
    )
    parser.advanced.add_argument(
        "--skip-audit", action="store_true", help="do not look first whether the reward can be gamed"
    )
    parser.add_options(TrainConfig, *COMMON)
    list_rewards(parser)


def _train(options: argparse.Namespace, console: Console) -> int:
    config = _config(options)
    with writing(config.output):  # --config may tell it, where no flag does
        return _run_config(config, options, console)


def _run_config(config: TrainConfig, options: argparse.Namespace, console: Console) -> int:
    need = ("answers",) if "exact" in config_of(config.reward).weights else ()
    check_models(config.model)
    rows = read_rows(config.prompts, config.columns, need=need, limit=config.limit)
    run = new_run_dir(config.output, options.resume)
    repo: str | None = None

    def on_start() -> None:
        nonlocal repo
        if config.push_to_hub and main:
            from adhere.integrations import hub

            repo = hub.create(config.push_to_hub, public=config.hub_public)
        if main:
            record(run, options.command_line)

    with _no_trace(run):
        main = _is_main(config, console)
        if not main:  # of a distributed run one process speaks, asks and writes
            console = Console(quiet=True)
        policy = _load(config, console)
        tell_prompting(console, policy, rows)
        if main and not options.resume and not options.skip_audit:
            _audit_briefly(config, policy, rows, run, console)
        trained, steps = _run(config, policy, rows, run, options.resume, on_start, console)
    if not main:
        return INTERRUPTED if trained.interrupted else 0
    return _tell(config, rows, run, trained, steps, repo, console)


def _config(options: argparse.Namespace) -> TrainConfig:
    """The options, those of the run that is resumed included. Raises `UserError` where a service is not to be had."""
    flags = flags_given(options, TrainConfig)
    file = options.config
    if options.resume and file is None and "output" in flags:
        begun = new_run_dir(flags["output"], resume=True) / "config.yaml"
        file = begun if begun.exists() else None  # killed before it was written
    config = load_config(TrainConfig, file, flags)
    config = replace(config, reward=reward_written(config.reward))
    check_login(config.trackers)
    if config.push_to_hub is not None:
        from adhere.integrations import hub

        hub.check(config.push_to_hub)
    return config


def _is_main(config: TrainConfig, console: Console) -> bool:
    """Whether this process is the first of those that train together."""
    with phase(console.track, "loading torch"):
        from accelerate import PartialState

        from adhere.model.load import pick_device

    return bool(PartialState(cpu=pick_device(config.device).type == "cpu").is_main_process)


def _load(config: TrainConfig, console: Console) -> Policy:
    """The policy that is to be trained."""
    from adhere.model.policy import Policy

    policy = Policy.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        lora=config.lora,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        train=True,
        progress=console.track,
        **asdict(config.prompting),
    )
    if not policy.shares_prefixes:
        family = policy.network.config.model_type
        console.note(f"{family}: its cache cannot be expanded, so a prompt is computed for each of its samples")
    return policy


@contextmanager
def _no_trace(run: Path) -> Iterator[None]:
    """Where training fails before it has begun, leave nothing of it in `run` but what was there before."""
    try:
        yield
    except UserError:
        from adhere.report.run import AUDIT

        if not (run / "config.yaml").exists():
            (run / AUDIT).unlink(missing_ok=True)
            with suppress(OSError):
                run.rmdir()
        raise


def _run(
    config: TrainConfig,
    policy: Policy,
    rows: Sequence[Row],
    run: Path,
    resume: bool,
    on_start: Callable[[], None],
    console: Console,
) -> tuple[Trained, list[Mapping[str, float]]]:
    """Train, showing the figures of each step and warning once of flat groups; how it ended, and the metrics of all
    steps."""
    from adhere.learn.launch import leave
    from adhere.learn.train import train

    steps: list[Mapping[str, float]] = []

    def on_step(metrics: Mapping[str, float]) -> None:
        console.figures(**shown(metrics))
        steps.append(metrics)
        if len(steps) == FLAT_STEPS and mean([row["frac_reward_zero_std"] for row in steps]) >= FLAT_SHARE:
            console.warn(_flat(steps, config))

    console.note(f"training on {reward_name(config.reward)}")
    trained = train(config, policy, rows, run, resume=resume, on_start=on_start, on_step=on_step, warn=console.warn)
    leave()
    return trained, steps


def _tell(
    config: TrainConfig,
    rows: Sequence[Row],
    run: Path,
    trained: Trained,
    steps: Sequence[Mapping[str, float]],
    repo: str | None,
    console: Console,
) -> int:
    """Write report and model card, push to `repo`, and say what came of it; the exit code."""
    from adhere.report.card import write_card
    from adhere.report.page import write_report

    page = write_report(run)
    if any(row["frac_reward_zero_std"] for row in steps):
        console.note(_flat(steps, config))
    if trained.stopped:
        console.warn(f"stopped early at step {trained.steps}: {trained.stopped}")
    if trained.interrupted:
        console.note(f"interrupted at step {trained.steps}; go on with: adhere train --resume --output {run}")
        return INTERRUPTED
    if config.leaves_model:
        write_card(run, repo, chat=any(not isinstance(row.prompt, str) for row in rows))
    model, adapter = config.leaves_model and run / "model", config.leaves_adapter and run / "adapter"
    left = ", ".join(f"{place.name} in {place}" for place in (model, adapter) if place)
    console.note(f"{trained.steps} steps; {left}, report in {page}")
    found = {"steps": trained.steps, "stopped": trained.stopped, "model": model or None, "adapter": adapter or None,
             "report": page}  # fmt: skip
    if repo:
        from adhere.integrations import hub

        with phase(console.track, f"pushing to {repo}"):
            found["hub"] = hub.push(model or run / "adapter", repo, f"{trained.steps} steps of adhere train")
        console.note(f"pushed to {found['hub']}")
    console.result(found)
    return 0


def _flat(steps: Sequence[Mapping[str, float]], config: TrainConfig) -> str:
    """How many groups of these steps were flat, and what to set."""
    from adhere.reward.group import flat_advice

    groups = [int(row.get("dynamic_sampling/drawn", config.prompts_per_step)) for row in steps]
    flat = round(sum(row["frac_reward_zero_std"] * drawn for row, drawn in zip(steps, groups, strict=True)))
    return flat_advice(flat, sum(groups), mean([row["completions/clipped_ratio"] for row in steps]))


def _audit_briefly(config: TrainConfig, policy: Policy, rows: Sequence[Row], run: Path, console: Console) -> None:
    """Warn, before training, of a reward that degenerate responses beat; what was found stays in the run."""
    from adhere.measure.audit import audit, summary
    from adhere.report.run import AUDIT
    from adhere.reward.heads import load_heads
    from adhere.reward.reward import Reward

    limit = TRAIN_HACK_RATE
    settings = AuditConfig(max_new_tokens=config.sampling.max_new_tokens, max_hack_rate=limit, seed=config.seed)
    some = rows[:: max(1, len(rows) // AUDITED)][:AUDITED]
    if len(some) < 2 or config.num_samples < 2:
        return
    heads = load_heads(config.heads) if config.heads is not None else None
    reward = Reward(config_of(config.reward), policy, heads)
    name = reward_name(config.reward)
    found = summary(config.model, len(some), audit(policy, some, {name: reward}, settings), settings)
    atomic_write(run / AUDIT, to_json(found, indent=2))
    if found["gameable"]:
        console.warn(
            f"audit of {name} on {len(some)} prompts: {found['verdict']} "
            "Training may find this; `adhere audit` shows the table"
        )


def _demo_arguments(parser: Parser) -> None:
    parser.common.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="FOLDER",
        help="folder of the run (default: runs/demo)",
    )
    parser.common.add_argument(
        "--model", choices=tuple(EMBEDDED), default="toy-causal", help="which embedded model (default: toy-causal)"
    )
    parser.common.add_argument("--steps", type=count, default=60, metavar="N", help="training steps (default: 60)")
    parser.common.add_argument(
        "--eval-prompts", type=count, default=150, metavar="N", help="fresh prompts of each split (default: 150)"
    )
    parser.common.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of everything (default: 0)")


def _demo(options: argparse.Namespace, console: Console) -> int:
    check_new_folder(options.output)
    run = new_run_dir(options.output)

    from adhere.demo import run_demo
    from adhere.report.tables import results_table

    record(run, options.command_line)
    console.note(
        f"The embedded model {options.model} answers questions about stories. It was taught everybody's favourite "
        "place, and leans on that even when a story says otherwise (conflict).\n"
        "Now it trains on prompts alone: no answers, no reward model, only its attention to the prompt."
    )
    trained, evaluation = run_demo(
        options.model,
        run,
        steps=options.steps,
        eval_prompts=options.eval_prompts,
        seed=options.seed,
        on_step=lambda metrics: console.figures(**shown(metrics)),
        progress=console.track,
    )
    if trained.stopped:
        console.warn(f"stopped early at step {trained.steps}: {trained.stopped}")
    for split, results in evaluation.by_split.items():
        console.table(*results_table(f"{split}: {options.eval_prompts} fresh prompts", results))
    console.note(f"report in {run / 'report.html'}")
    console.result(evaluation.to_json())
    return 0


TRAIN = Command(
    "label-free RL: prompts in, a better model out",
    "--model MODEL --prompts FILE --output FOLDER ",
    _train_arguments,
    _train,
)
DEMO = Command("the whole story on an embedded model, offline", "", _demo_arguments, _demo)
