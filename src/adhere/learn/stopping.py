"""When to stop early: because a run has gone wrong, and why, in plain words; or because somebody asks for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

from adhere.options import Count, check


@dataclass(frozen=True)
class Stopping:
    """Limits beyond which training stops early. Each looks at the mean over the last `window` steps."""

    max_kl: float = 10.0
    """Stop when KL from the start, in nats a response, exceeds this."""
    min_length_ratio: float = 0.3
    """Stop when mean response length falls below this share of the first steps' (0 = never)."""
    max_length_ratio: float = 4.0
    """Stop when mean response length rises above this multiple of the first steps'."""
    max_flat_groups: float = 0.98
    """Stop when more than this share of groups give every sample the same reward (1 = never)."""
    max_one_text: float = 0.35
    """Stop when one text makes up more than this share of the responses to different prompts, and twice its share in
    the first steps; looks at half a window (1 = never)."""
    min_entropy_ratio: float = 0.02
    """Stop when mean entropy falls below this share of the first steps' (0 = never)."""
    window: Count = 10
    """Steps that a limit is judged over."""

    def __post_init__(self) -> None:
        check(self)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C was pressed or SIGTERM came, which schedulers send: the step in hand
    is finished first. A second one ends the process at once."""
    pressed: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        restore()

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not the main thread, where signals cannot be caught
        yield pressed
        return
    try:
        yield pressed
    finally:
        restore()


def reason_to_stop(history: Sequence[dict[str, float]], limits: Stopping) -> str | None:
    """Why training should stop now, or None. `history` holds the metrics of every step so far (docs/metrics.md)."""
    half = -(-limits.window // 2)
    if len(history) >= 2 * half:
        sides = history[:half], history[-half:]
        began, spread = (fmean(row["completions/one_text"] for row in rows) for rows in sides)
        if spread > max(limits.max_one_text, 2 * began):
            return (
                f"one text makes up {spread:.0%} of the responses to different prompts, from {began:.0%} in the first "
                "steps: the reward pays for it whatever is asked, as for an example's answer; look for it in "
                "samples.jsonl, and choose another reward, take the example out, or raise kl_coef"
            )
    if len(history) < 2 * limits.window:
        return None
    first, last = history[: limits.window], history[-limits.window :]
    # Without a reference there is no KL to look at.
    kl = fmean(row.get("kl", 0.0) for row in last)
    if kl > limits.max_kl:
        return (
            f"KL from the start is {kl:.2f} nats a response (limit {limits.max_kl}): the policy has left the model it "
            "began as; raise kl_coef, lower learning_rate or train fewer steps"
        )
    before, now = (fmean(row["completions/mean_length"] for row in rows) for rows in (first, last))
    if now < limits.min_length_ratio * before:
        return (
            f"mean response length fell from {before:.1f} to {now:.1f} tokens: the reward pays for saying less; "
            "gate it on `ended`, pair it with a sum, or raise kl_coef"
        )
    if now > limits.max_length_ratio * before:
        return f"mean response length rose from {before:.1f} to {now:.1f} tokens: the reward pays for saying more"
    sure, surer = (fmean(row["entropy"] for row in rows) for rows in (first, last))
    if surer < limits.min_entropy_ratio * sure:
        return (
            f"mean entropy fell from {sure:.3f} to {surer:.3f} nats a token, agreement among samples is "
            f"{fmean(row['completions/agreement'] for row in last):.0%}: the policy says one thing to each prompt; "
            "raise kl_coef or the temperature, or train fewer steps"
        )
    flat = fmean(row["frac_reward_zero_std"] for row in last)
    if flat > limits.max_flat_groups:
        return (
            f"{flat:.0%} of the groups give all samples the same reward, so there is nothing left to learn from: "
            "the samples have become alike or the reward cannot tell them apart"
        )
    return None
