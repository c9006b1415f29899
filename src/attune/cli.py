"""The command line: one table, command → what it takes and does. Parses, calls, hands the result to the console.

Exit codes: 0 done, 1 failed while running, 2 bad input or usage, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attune import __version__
from attune.console import Console
from attune.errors import UserError, unknown_name

if TYPE_CHECKING:
    from attune.measure.evaluate import Result

INTERRUPTED = 130
Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """What a command is, what it takes and what it does (its exit code comes back)."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace, Console], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `attune` with `arguments` (default: the process's own); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in given if not word.startswith("-")), None)
    if name is None or given[0] != name:
        return _top(given)
    if name not in COMMANDS:
        Console().error(str(unknown_name("command", name, COMMANDS)))
        return 2
    command = COMMANDS[name]
    parser = Parser(prog=f"attune {name}", description=command.help, formatter_class=_Formatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes")
    command.arguments(parser)
    try:
        options = parser.parse_args(given[1:])
    except SystemExit as ended:  # --help, or usage that argparse has explained
        return int(ended.code or 0)
    console = Console(options.json, options.quiet)
    try:
        with console.strays_aside():
            _quieten_libraries()
            return command.run(options, console)
    except UserError as error:
        console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED


def _train_arguments(parser: Parser) -> None:
    from attune.config import add_arguments
    from attune.learn.settings import TrainConfig

    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options; flags go before it")
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
    with console.progress(config.steps, f"training on {reward_name(config.reward)}") as progress:

        def on_step(metrics: Mapping[str, float]) -> None:
            progress.update(int(metrics["step"]), **_shown(metrics))

        try:
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


def _score_arguments(parser: Parser) -> None:
    _model_arguments(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="rows with a prompt and a `response`")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="each row plus reward and signals")
    parser.add_argument("--reward", default="attention", help="a reward's name, or module:function")
    parser.add_argument("--template", help="text with {field} names that makes a prompt of a row")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="rows scored at a time (default: 64)")


def _score(options: argparse.Namespace, console: Console) -> int:
    from attune.data import read_rows, write_jsonl
    from attune.rank import score_rows
    from attune.reward.named import Reward, config_of

    spec = config_of(options.reward)
    need = ("response", "answers") if "exact" in spec.weights else ("response",)
    rows = read_rows(options.input, template=options.template, need=need)
    reward = Reward(spec, _load(options))
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
    _results_table(console, f"{len(rows)} prompts", evaluation.metrics)
    console.note(f"report in {page}")
    console.result(evaluation.to_json())
    return 0


def _demo_arguments(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="folder of the run")
    parser.add_argument("--model", choices=("causal", "encdec"), default="causal", help="which embedded model")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="training steps (default: 60)")
    parser.add_argument("--eval-prompts", type=int, default=150, metavar="N", help="fresh prompts of each split")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything (default: 0)")


def _demo(options: argparse.Namespace, console: Console) -> int:
    from attune.demo import run_demo
    from attune.files import new_run_dir

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
        _results_table(console, f"{split}: {options.eval_prompts} fresh prompts", results)
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


def reward_name(spec: str | Mapping[str, Any]) -> str:
    """A reward in a word: its name, or the signals it weighs."""
    return spec if isinstance(spec, str) else " + ".join(spec.get("weights", {}))


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures that the progress line has room for."""
    names = {"reward": "reward", "kl": "kl", "completions/mean_length": "length", "tokens_per_second": "tokens_per_s"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _results_table(console: Console, title: str, results: Mapping[str, Result]) -> None:
    compared = any(result.before is not None for result in results.values())
    columns = ["metric", "before", "after", "difference", "p"] if compared else ["metric", "value"]
    rows = []
    for name, result in results.items():
        after = _interval(result.after)
        if compared:
            rows.append([name, _interval(result.before), after, _interval(result.difference, "+"), _p(result.p)])
        else:
            rows.append([name, after])
    console.table(title, columns, rows)


def _interval(figure: Any, sign: str = "") -> str:
    return "" if figure is None else f"{figure.mean:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quieten_libraries() -> None:
    """Progress bars and advice of the libraries would drown our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _top(given: Sequence[str]) -> int:
    """`attune --help`, `attune --version`, or no command at all."""
    lines = "\n".join(f"  {name:<8} {command.help}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="attune",
        description="Post-train language models from their own attention to the prompt.",
        epilog=f"commands:\n{lines}\n\n`attune COMMAND --help` says more.",
        usage="attune COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attune {__version__}")
    try:
        parser.parse_args(given)
    except SystemExit as ended:  # what was asked for has been printed
        return int(ended.code or 0)
    parser.print_help()
    return 2


class _Formatter(argparse.HelpFormatter):
    """Room for the flags: the longest would push its help to the next line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


COMMANDS: dict[str, Command] = {
    "demo": Command("the whole story on an embedded model, offline", _demo_arguments, _demo),
    "train": Command("label-free RL: prompts in, a better model out", _train_arguments, _train),
    "score": Command("reward and signals of given responses", _score_arguments, _score),
    "eval": Command("measure a model, or compare two, with intervals", _eval_arguments, _eval),
}


if __name__ == "__main__":
    sys.exit(main())
