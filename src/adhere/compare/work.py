"""One run of a comparison, in a process of its own: make the arm's reward, train, evaluate, write result.json."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adhere.compare.plan import HUMAN, HYBRID, NONE, SYNTHETIC, Job
from adhere.compare.settings import Files, Toy
from adhere.config import to_dict
from adhere.console import quieten_libraries
from adhere.data import Row, read_rows, write_jsonl
from adhere.errors import RunFailed, UserError
from adhere.files import atomic_write, to_json
from adhere.learn.train import train
from adhere.measure.audit import audit
from adhere.measure.evaluate import evaluate
from adhere.measure.settings import AuditConfig
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.preferences.calibrate import calibrate
from adhere.preferences.fit import fit
from adhere.preferences.pairs import make_pairs
from adhere.preferences.settings import PairConfig
from adhere.resume import fingerprint, finished
from adhere.reward.named import config_of
from adhere.reward.reward import Reward
from adhere.row_pairs import sound_pairs
from adhere.text import is_answer
from adhere.toy import Split, make_rows

SPLITS: tuple[Split, ...] = ("agree", "conflict", "novel")
HELD_OUT = 200
"""Pairs at the end of the labelled ones that no arm learns from: every reward is measured on these."""
SYNTHETIC_PROMPTS = 500
SHOWN = 20
"""Responses that the page gets."""
BATCH = 64


def load(job: Job) -> Policy:
    """The start."""
    options = job.training
    return Policy.load(
        job.model,
        dtype=options.dtype,
        device=options.device,
        lora=options.lora,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
        train=True,
        **asdict(options.prompting),
    )


def share_data(model: str, data: Toy | Files, folder: Path, policy: Policy) -> None:
    """Write prompts.jsonl, evaluation.jsonl and pairs.jsonl of one model to `folder`; data that is there stays.

    Raises `UserError` where it is other data."""
    marker, settings = folder / "data.json", _settings_of(data)
    if finished(marker, settings, where=folder, fix="choose another --output"):
        return
    if isinstance(data, Toy):
        made: dict[str, list[dict[str, Any]]] = {
            "prompts": [
                {"prompt": row["prompt"]}
                for split in ("agree", "conflict")
                for row in make_rows(split, "train", data.prompts // 2, seed=1)
            ],
            "evaluation": [row for split in SPLITS for row in make_rows(split, "test", data.evaluation, seed=31)],
            "pairs": answered_pairs(policy, data.pairs),
        }
    else:
        files = {"prompts": data.prompts, "evaluation": data.evaluation, "pairs": data.pairs}
        rows = {name: read_rows(file, data.columns) for name, file in files.items() if file is not None}
        if "pairs" in rows:
            rows["pairs"] = sound_pairs(rows["pairs"])
        # As they were given: a prompt written out as text no longer knows which of its parts are evidence.
        made = {name: [dict(row.fields) for row in some] for name, some in rows.items()}
    for name, some in made.items():
        write_jsonl(folder / f"{name}.jsonl", some)
    atomic_write(marker, to_json({"settings": settings}))  # last: data that was cut short is made again


def answered_pairs(policy: Policy, count: int) -> list[dict[str, Any]]:
    """`count` pairs of a right and a wrong sample of the policy, one a prompt, told apart by the answers."""
    pairs: list[dict[str, Any]] = []
    for seed in range(100):
        rows = [row for split in ("agree", "conflict") for row in make_rows(split, "train", BATCH, seed=1000 + seed)]
        prompts = policy.encode([row["prompt"] for row in rows])
        rollout = policy.sample(prompts, 8, sampling=Sampling(max_new_tokens=8), seed=seed)
        for number, row in enumerate(rows):
            samples = rollout.responses[8 * number : 8 * number + 8]
            right = [text for text in samples if is_answer(text, row["answers"][:1])]
            wrong = [text for text in samples if text not in right]
            if right and wrong:
                pairs.append({"prompt": row["prompt"], "chosen": right[0], "rejected": wrong[0]})
        if len(pairs) >= count:
            random.Random(0).shuffle(pairs)
            return pairs[:count]
    raise RunFailed(f"{len(pairs)} of {count} pairs found: the model is nearly always right, or never")


def perform(job: Job) -> None:
    """Run `job` from start to result.json."""
    torch.set_num_threads(1)
    quieten_libraries()
    policy = load(job)
    rows = read_rows(job.data / "evaluation.jsonl", job.training.columns)
    clock: dict[str, float] = {}
    found: dict[str, Any] = {"settings": job.settings, "seed": job.seed, "labels": job.arm.labels}
    if job.arm.reward != NONE:
        began = time.perf_counter()
        spec = reward_of(job, policy)
        clock["reward"] = time.perf_counter() - began
        # The policy itself reads, which is the start still: a copy of it would stay in memory beside that of training.
        reward = Reward(config_of(spec), policy)
        found["pairs"] = held_out(reward, job)
        if job.audited:
            auditing = AuditConfig(max_new_tokens=job.evaluation.max_new_tokens, seed=job.seed)
            some = rows[:: max(1, len(rows) // job.audited)][: job.audited]
            found["audit"] = audit(policy, some, {"": reward}, auditing)[""].to_json()
        history: list[Mapping[str, float]] = []
        began = time.perf_counter()
        trained = train(
            replace(job.training, reward=spec),
            policy,
            read_rows(job.data / "prompts.jsonl", job.training.columns),
            job.output,
            on_step=lambda row: history.append(dict(row)),
        )
        clock["training"] = time.perf_counter() - began
        prompts, samples = job.training.prompts_per_step, job.training.num_samples
        drawn = [row.get("dynamic_sampling/drawn", prompts) * samples for row in history]
        lengths = [row["completions/mean_length"] for row in history]
        found["stopped"] = trained.stopped
        found["tokens"] = round(sum(length * count for length, count in zip(lengths, drawn, strict=True)))
        names = ("step", "reward", "kl", "completions/mean_length")
        found["curve"] = [{name: row[name] for name in names if name in row} for row in history]
    began = time.perf_counter()
    responses = evaluate(policy, rows, job.evaluation).after
    clock["evaluation"] = time.perf_counter() - began
    found |= {"values": responses.values, "responses": responses.greedy[:SHOWN], "seconds": clock}
    atomic_write(job.result, to_json(found))


def reward_of(job: Job, policy: Policy) -> str | Mapping[str, Any]:
    """The arm's reward; one that is learned is learned here and written beside the run."""
    kind, folder = job.arm.reward, Path(job.reward_model.output)
    if kind == SYNTHETIC:
        prompts = read_rows(job.data / "prompts.jsonl", job.training.columns)[:SYNTHETIC_PROMPTS]
        made = make_pairs(policy, prompts, PairConfig(max_new_tokens=job.evaluation.max_new_tokens, seed=job.seed))
        pairs = [Row(row["prompt"], chosen=row["chosen"], rejected=row["rejected"]) for row in made]
    elif kind in (HUMAN, HYBRID):
        pairs = labelled(job)
    else:
        return kind
    if kind == HYBRID:
        folder.mkdir(parents=True, exist_ok=True)
        calibrate(policy, pairs, seed=job.seed).save(folder / "calibration.yaml")
        return f"calibrated:{folder / 'calibration.yaml'}"
    if not (folder / "preference.json").exists():
        fit(job.reward_model, pairs)
    return f"preference:{folder}"


def labelled(job: Job) -> list[Row]:
    """The labelled pairs that this run may learn from: `labels` of them, drawn by its seed, none held out."""
    rows = read_rows(job.data / "pairs.jsonl", job.training.columns, need=("chosen", "rejected"))[:-HELD_OUT]
    if len(rows) < job.arm.labels:
        raise UserError(
            f"{job.arm.labels} labels wanted, {len(rows)} pairs there (the last {HELD_OUT} are held out)",
            where=f"arm {job.name}",
            fix="give more pairs, or lower `labels`",
        )
    return random.Random(f"{job.seed}").sample(rows, job.arm.labels)


def held_out(reward: Reward, job: Job) -> list[float]:
    """For each held-out pair, 1 where the reward puts the chosen response first, ½ for a tie; empty without pairs."""
    path = job.data / "pairs.jsonl"
    if not path.exists() or "exact" in reward.config.weights:
        return []
    won: list[float] = []
    rows = read_rows(path, job.training.columns, need=("chosen", "rejected"))[-HELD_OUT:]
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [text for row in batch for text in (str(row.chosen), str(row.rejected))]
        scores = reward.score([row.prompt for row in batch for _ in range(2)], texts).reward.tolist()
        won += [0.5 if a == b else float(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return won


def read_results(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What finished runs left, in the order of `jobs`."""
    return [json.loads(job.result.read_text(encoding="utf-8")) for job in jobs]


def _settings_of(data: Toy | Files) -> dict[str, Any]:
    """What the data is made of: the options, and what the files hold."""
    files = (data.prompts, data.evaluation, data.pairs) if isinstance(data, Files) else ()
    content = {file: fingerprint(Path(file).read_bytes()) for file in files if file and Path(file).is_file()}
    return {**to_dict(data), "content": content}
