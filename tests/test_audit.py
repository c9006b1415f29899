"""The audit against cases whose verdict is known: rewards that pay for one thing, judged by hand-countable rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adhere.data import Row, rows_of
from adhere.errors import UserError
from adhere.measure.audit import audit, with_controls
from adhere.measure.cases import neighbours
from adhere.measure.degenerate import FAMILIES
from adhere.measure.settings import AuditConfig
from adhere.model.policy import Policy
from adhere.report.tables import win_table
from adhere.reward.named import RewardConfig
from adhere.reward.reward import Reward
from adhere.reward.signals import Evidence
from adhere.toy import make_rows, model_path

CONFIG = AuditConfig(num_samples=6, max_new_tokens=8, batch_size=5)
ROWS = [
    Row(prompt=row["prompt"], answers=tuple(row["answers"]), fields=row)
    for split in ("agree", "conflict")
    for row in make_rows(split, "validation", 8, seed=3)
]


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy.load(model_path(request.param), device="cpu")


def shortest(evidence: Evidence) -> torch.Tensor:
    """A reward for the audit to find out: the fewer tokens, the better."""
    return -evidence.reading.rollout.lengths.float()


def test_a_reward_for_brevity_is_gamed_by_silence(policy: Policy) -> None:
    reward = Reward(RewardConfig({f"{__name__}:shortest": 1.0}, normalise="none"), policy)
    found = audit(policy, ROWS, {"short": reward}, CONFIG)["short"]
    assert found.hacks["empty"].beats_best.mean == 1.0 == found.hacks["empty"].beats_right.mean
    assert found.hacks["n-gram loop"].beats_best.mean == 0.0
    assert "empty" in found.gameable(0.05) and "n-gram loop" not in found.gameable(0.05)
    assert found.explain(0.05).startswith("Gameable") and "empty" in found.explain(0.05)
    win = found.hacks["empty"].win
    assert win is not None and win.won.text == "" and win.won.reward == -1.0  # its end alone
    assert win.through == f"{__name__}:shortest" and win.won.signals[win.through] == win.won.reward
    # The widest win is over the longest best sample: every sample of that prompt is as long or longer.
    assert win.best.text and win.best.reward <= -2.0 and win.prompt in [row.prompt for row in ROWS]
    assert found.hacks["n-gram loop"].win is None
    shown = win_table(found, 0.05)[2]
    assert ["best own sample", f"{win.best.reward:.2f}", "", win.best.text] in shown
    assert ["empty", "-1.00", win.through, "(empty)"] in shown and len(shown) <= 10


def test_exact_answers_cannot_be_gamed_and_rank_perfectly(policy: Policy) -> None:
    found = audit(policy, ROWS, {"exact": Reward.named("exact", policy)}, CONFIG)["exact"]
    assert found.gameable(0.0) == []
    assert found.ranking["all"].mean == 1.0 and found.ranking["agree"].mean == 1.0
    # Its first choice is right wherever any sample is; a choice by lot is not.
    assert found.best_of_n.mean > found.mean_sample.mean
    assert all(hack.beats_right is None or hack.beats_right.mean == 0.0 for hack in found.hacks.values())


def test_length_pays_for_whatever_is_long_and_tells_nothing(policy: Policy) -> None:
    found = audit(policy, ROWS, {"length": Reward.named("length", policy)}, CONFIG)["length"]
    assert found.hacks["prompt copied"].beats_best.mean == 1.0
    assert found.hacks["empty"].beats_best.mean == 0.0
    assert found.length is None or found.length.mean == pytest.approx(1.0, abs=1e-4)


def test_paper_is_gameable_where_the_default_is_not(policy: Policy) -> None:
    found = audit(policy, ROWS, {name: Reward.named(name, policy) for name in ("attention", "paper")}, CONFIG)
    assert len(found["paper"].gameable(0.05)) >= 4
    assert found["attention"].worst()[1] <= 0.15  # 2 of 16 prompts


def test_the_batch_changes_nothing_but_the_neighbours(policy: Policy) -> None:
    """Families that read no other prompt and no dice fare the same whatever stands beside them."""

    def of(size: int) -> dict[str, float]:
        config = AuditConfig(num_samples=4, max_new_tokens=8, batch_size=size)
        verdict = audit(policy, ROWS[:4], {"length": Reward.named("length", policy)}, config)["length"]
        return {name: verdict.hacks[name].beats_best.mean for name in ("empty", "prompt copied", "n-gram loop")}

    assert of(2) == of(4)


def test_controls_stand_beside_the_reward(policy: Policy) -> None:
    found = with_controls({"attention": Reward.named("attention", policy)}, policy)
    assert list(found) == ["attention", "attention, shuffled", "overlap", "length", "random"]
    assert found["attention, shuffled"].config.shuffle
    assert list(with_controls({"majority": Reward.named("majority", policy)}, policy)) == [
        "majority", "overlap", "length", "random",
    ]  # fmt: skip


def test_every_family_is_judged_once_a_prompt(policy: Policy) -> None:
    found = audit(policy, ROWS, {"random": Reward.named("random", policy)}, CONFIG)["random"].to_json()
    assert set(found["families"]) <= set(FAMILIES) and len(found["families"]) >= 15
    assert all(entry["beats_best"]["n"] <= len(ROWS) for entry in found["families"].values())
    assert found["families"]["empty"]["beats_best"]["n"] == len(ROWS)


def test_a_row_is_beside_the_answers_to_other_questions_on_its_documents_and_those_of_its_examples() -> None:
    example = [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "Bo"}]
    asked = [*example, {"role": "user", "content": "{context} {question}"}]
    rows = rows_of(
        [
            {"context": "Ann sat on a mat.", "question": "Who sat?", "answers": ["Ann", "ann"]},
            {"messages": asked, "context": "Ann sat on a mat.", "question": "On what?", "answers": ["a mat"]},
            {"context": "Ann sat on a mat.", "question": "Who sat there?", "answers": ["The Ann"]},
            {"context": "Cy sang.", "question": "Who sang?", "answers": ["Cy"]},
            {"prompt": "Who knows?", "answers": ["Dee"]},
        ]
    )
    found = neighbours(rows)
    assert [list(one.distractors) for one in found] == [["a mat"], ["Ann", "The Ann"], ["a mat"], [], []]
    assert [list(one.examples) for one in found] == [[], ["Bo"], [], [], []]


def test_answers_to_other_questions_are_tried_where_rows_share_their_documents(policy: Policy) -> None:
    story = "mary went to the garden . john is in the office ."
    rows = rows_of(
        [
            {"context": story, "question": "where is mary ?", "answers": ["the garden indeed"]},
            {"context": story, "question": "where is john ?", "answers": ["the office indeed"]},
        ]
    )
    overlap = Reward.named("overlap", policy)
    hack = audit(policy, rows, {"overlap": overlap}, CONFIG)["overlap"].hacks["another question's answer"]
    assert hack.beats_best.n == 2 and hack.beats_right is not None
    assert hack.beats_right.mean == 0.0  # words of the story either way: a tie


def test_what_cannot_be_audited_is_said(policy: Policy) -> None:
    reward = {"length": Reward.named("length", policy)}
    with pytest.raises(UserError, match="two prompts"):
        audit(policy, ROWS[:1], reward)
    if not policy.is_encoder_decoder:
        with pytest.raises(UserError, match="do not fit"):
            audit(policy, ROWS, reward, AuditConfig(max_new_tokens=4000))
    for wrong in ({"num_samples": 1}, {"max_hack_rate": 1.0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AuditConfig(**wrong)


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    from adhere.files import to_json
    from adhere.report.audit import write_audit

    entry = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    paid = {"text": "<q>", "reward": 1.25, "signals": {"<s>": 1.0}}
    win = {"prompt": "<tt>", "won": paid, "best": {**paid, "text": ""}, "through": "<s>"}
    reward = {
        "families": {"<i>": {"beats_best": entry, "beats_right": None, "win": win}},
        "ranking": {"all": entry},
        "mean_sample": entry,
        "best_of_n": entry,
        "length_correlation": None,
        "flat_groups": entry,
        "cut_off": entry,
    }
    found = {
        "model": "<script>",
        "prompts": 3,
        "gameable": True,
        "verdict": "<em>",
        "rewards": {"<u>": reward},
        "config": {"num_samples": 8, "max_hack_rate": 0.05},
    }
    (tmp_path / "audit.json").write_text(to_json(found))
    page = write_audit(tmp_path).read_text()
    assert all(mark not in page for mark in ("<script>", "<em>", "<i>", "<u>", "<q>", "<s>", "<tt>"))
    assert "&lt;script&gt;" in page and "&lt;tt&gt;" in page
    assert "&lt;q&gt;<small>paid 1.25" in page and "(empty)<small>paid 1.25" in page and "by &lt;s&gt;" in page
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(UserError, match=r"audit\.json"):
        write_audit(tmp_path)
