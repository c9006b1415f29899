"""The page of a run: what it says, that no text of a run becomes markup, bounds, broken files, and its curves."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adhere.errors import UserError
from adhere.inspection.inspection import Inspection
from adhere.inspection.panel import Passage
from adhere.origin import record
from adhere.report.curves import MAX_POINTS, curve, interval, number, smooth, thin, ticks
from adhere.report.markup import clip, escape
from adhere.report.page import write_report

NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</pre></details><iframe src=//evil>",
    "a\u2028b\u2029c\u202ed\x00e\x1bf\x85g\ufeff",
    "lone \ud800 surrogate, naïve 東京 🙂 مرحبا",
    "&lt;b&gt; &amp; ]]> <!-- -->",
]
ALLOWED = """nav a html head meta title style body main header section h1 h2 h3 ul li b p strong div span small figure
svg line text polyline circle table thead tbody tr th td article details summary pre footer"""


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on whatever we never write."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED.split(), tag
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name != "src", (name, value)
            assert name != "href" or re.match("#[a-z]+$|data:(text/csv|application/json);", value or ""), value
            assert "url(" not in (value or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def figure(mean: float, half: float = 0.01, n: int = 200) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def compared(before: float, after: float, p: float = 0.001, half: float = 0.01) -> dict[str, Any]:
    return {
        "before": figure(before), "after": figure(after), "difference": figure(after - before, half), "p": p,
    }  # fmt: skip


def make_run(folder: Path, **files: Any) -> Path:
    """A run directory of JSON Lines (lists), JSON (dicts) or plain files, by name without suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            text = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        elif isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        else:
            (folder / f"{name}.yaml").write_text(content, encoding="utf-8", errors="surrogatepass")
    return folder


def read(folder: Path) -> tuple[str, Page]:
    source = write_report(folder).read_text(encoding="utf-8")
    return source, Page(source)


STEPS = [{"step": i, "reward": i / 10, "signals/grounding": 0.2, "kl": 0.1, "length": 7.0} for i in range(1, 31)]


def test_the_page_says_that_training_helped(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "seed0",
        config="model: tiny\nalgorithm:\n  name: grpo\nreward: attention\n",
        metrics=STEPS,
        results={"metrics": {"exact_match": compared(0.25, 0.4), "relevance": compared(0.5, 0.51, p=0.4)}},
    )
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "Run seed0" in page.text and "grpo" in page.text and "attention" in page.text
    assert "Training helped." in page.text
    assert "Exact match rose from 0.250 to 0.400: +0.150 on the same 200 prompts" in page.text
    assert "(95 % interval +0.140 to +0.160, p = 0.001)" in page.text
    assert page.tags.count("svg") == 4 + 2  # reward, signal, KL, length; two interval bars
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html", "results.json"]


@pytest.mark.parametrize(
    ("exact", "says"),
    [
        (compared(0.4, 0.25), "Training did harm."),
        (compared(0.25, 0.4, p=0.2), "No clear change."),
        (compared(0.25, 0.255, p=0.01), "No clear change."),  # the interval, −0.005 to 0.015, holds 0
    ],
)
def test_a_verdict_needs_the_interval_and_the_test(tmp_path: Path, exact: dict[str, Any], says: str) -> None:
    assert says in read(make_run(tmp_path, results={"metrics": {"exact_match": exact}}))[1].text


def test_lower_is_better_where_it_is(tmp_path: Path) -> None:
    results = {"metrics": {"relevance": compared(0.3, 0.5), "repetition": compared(0.1, 0.3)}}
    text = read(make_run(tmp_path, results=results))[1].text
    assert "Training helped, at a price." in text
    assert "Repetition rose from 0.100 to 0.300" in text


def test_what_a_gain_cost_is_said_beside_it(tmp_path: Path) -> None:
    results = {
        "metrics": {"exact_match": compared(0.25, 0.4), "length": compared(10, 4, half=1)},
        "by_kind": {
            "conflict": {"exact_match": compared(0.1, 0.6)},
            "mix <b>": {"exact_match": compared(0.5, 0.3)},
        },
    }
    text = read(make_run(tmp_path, results=results))[1].text
    assert "at a price" in text
    assert "On kind “mix <b>”: Exact match fell from 0.500 to 0.300" in text
    assert "Shorter answers are often how a reward is gamed" in text
    assert "Exact match by kind" in text


def test_samples_stand_side_by_side_and_say_which_is_right(tmp_path: Path) -> None:
    samples = [
        {"prompt": "Where is Tom?", "before": "attic", "after": "The garden.", "answers": ["garden"], "kind": "mix"},
        {"prompt": "Say hello.", "before": "", "after": "hello", "answers": []},
    ]
    source, page = read(make_run(tmp_path, results={"metrics": {}, "samples": samples}))
    sides = re.findall(r'<div class="side ?(\w*)"><small>([^<]*)</small><p [^>]*>(.*?)</p>', source)
    first, *rest = [sides[place : place + 2] for place in range(0, len(sides), 2)]
    assert rest == [
        [("wrong", "Before · wrong", "attic"), ("right", "After · right", "The garden.")],
        [("", "Before", '<span class="cut">(empty)</span>'), ("", "After", "hello")],
    ]
    assert first in rest and "One answer that changed" in page.text
    assert "Accepted: garden" in page.text and "All 2 changed ones." in page.text and "mix" in page.text
    assert "2 of 2 answers changed: 1 from wrong to right, 0 from right to wrong." in page.text


def test_answers_that_changed_come_before_those_that_did_not(tmp_path: Path) -> None:
    samples = [{"prompt": f"p{i}", "before": "a", "after": "b" if i > 3 else " a", "answers": []} for i in range(6)]
    page = read(make_run(tmp_path, results={"metrics": {}, "samples": samples}))[1]
    shown = page.text.partition("answers changed.")[2]
    assert re.findall(r"p\d", shown) == ["p4", "p5", "p0", "p1", "p2", "p3"]
    assert "2 of 6 answers changed. " in page.text and "All 4 unchanged ones." in page.text


def test_the_contents_name_every_section_there_is(tmp_path: Path) -> None:
    source, page = read(make_run(tmp_path, metrics=STEPS, config="seed: 7\n"))
    assert (
        re.findall(r'<a href="#(\w+)">', source) == re.findall(r'<section id="(\w+)">', source) == ["training", "made"]
    )
    assert "seed 7" in page.text


def test_how_a_run_was_made_stands_on_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=STEPS, results={"metrics": {}, "config": {"seed": 3}})
    record(run, "adhere train --reward '<b>'")
    record(run, "adhere train --resume")
    source, page = read(run)
    assert re.findall(r"<pre>(adhere.*?)</pre>", source) == [
        "adhere train --reward &#x27;&lt;b&gt;&#x27;",
        "adhere train --resume",
    ]
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text and "seed of the evaluation 3" in page.text


@pytest.mark.parametrize(("gameable", "says"), [(True, "It can be gamed."), (False, "It withstood the audit.")])
def test_the_audit_before_training_is_told(tmp_path: Path, gameable: bool, says: str) -> None:
    audit = {"verdict": "Paid for <empty>.", "gameable": gameable, "prompts": 16}
    results = {"metrics": {"exact_match": compared(0.2, 0.4)}}
    page = read(make_run(tmp_path, results=results, **{"audit-before": audit}))[1]
    assert says in page.text and "Paid for <empty>." in page.text
    assert ("The audit before training warned" in page.text) == gameable
    assert ("Training helped, at a price." in page.text) == gameable


def test_the_tables_can_be_taken_along(tmp_path: Path) -> None:
    results = {
        "metrics": {"exact_match": {**compared(0.25, 1 / 3), "p_holm": 0.002}},
        "by_kind": {"=cmd()": {"f1": {"after": figure(-0.5)}}},
    }
    source = read(make_run(tmp_path, results=results))[0]
    links = re.findall(r'download="results\.(\w+)" href="data:[^,]*;base64,([^"]*)"', source)
    files = {suffix: base64.b64decode(content).decode() for suffix, content in links}
    rows = json.loads(files["json"])
    assert [(row["of"], row["group"], row["metric"]) for row in rows] == [
        ("all", "", "exact_match"),
        ("kind", "=cmd()", "f1"),
    ]
    assert rows[0]["after"] == 1 / 3 and rows[0]["p_holm"] == 0.002 and rows[1]["before"] is None
    table = list(csv.DictReader(files["csv"].splitlines()))
    assert float(table[0]["after"]) == 1 / 3 and int(table[0]["after_n"]) == 200
    assert table[1]["group"] == "'=cmd()"  # no spreadsheet runs it
    assert float(table[1]["after"]) == -0.5 and table[1]["before"] == ""


def inspection(word: str) -> Inspection:
    attention = torch.tensor([[0.1, 0.5, 0.02], [0.2, 0.1, 0.3]])
    special, ends = torch.tensor([True, False, False]), torch.tensor([False, True])
    passages = (Passage(1, 2, 0.8, "<b>"),)
    tracks = {"grounding": torch.tensor([0.5, 0.0])}
    maps = {"all heads": attention, "copy heads": attention / 2}
    logprobs = torch.tensor([-1.0, -2.0])
    return Inspection(
        ("<s>", " <b>", " c"), (word, "</s>"), special, ends, maps, logprobs, {"focus": 0.5}, tracks, passages
    )


def test_an_inspection_comes_back_from_its_file() -> None:
    kept = inspection("é")
    found = Inspection.from_json(json.loads(json.dumps(kept.to_json())))
    for name, attention in kept.maps.items():
        assert torch.allclose(found.maps[name], attention, rtol=0.0012)
    assert found.response_tokens == kept.response_tokens and torch.equal(found.prompt_special, kept.prompt_special)
    assert torch.equal(found.logprobs, kept.logprobs) and torch.equal(
        found.tracks["grounding"], kept.tracks["grounding"]
    )
    assert found.passages == kept.passages and found.figures == kept.figures


def test_a_changed_answer_is_shown_with_the_attention_of_both_models(tmp_path: Path) -> None:
    kept = {"before": inspection("no").to_json(), "after": inspection("<i>yes").to_json()}
    source = write_report(make_run(tmp_path, metrics=STEPS, attention=kept)).read_text("utf-8")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", html.unescape(source))
    assert nonce and re.findall(r"<script[^>]*>", source) == [f'<script nonce="{nonce[1]}">']
    assert source.count('class="panel"') == 2 and "&lt;i&gt;yes" in source and "80%</small>" in source


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attention", {"before": {}}),
        ("attention", {"before": {**inspection("a").to_json(), "logprobs": [0.0]}, "after": {}}),
        ("attention", {"before": {**inspection("a").to_json(), "maps": {"all heads": "AB"}}, "after": {}}),
        ("attention", {"before": {**inspection("a").to_json(), "maps": {"all heads": "é" * 12}}, "after": {}}),
        ("audit-before", {"gameable": True}),
        ("origin", {"commands": 3}),
    ],
)
def test_a_document_that_is_none_of_ours_is_refused(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{name}\.json.*(is not what|says neither)"):
        write_report(make_run(tmp_path, metrics=STEPS, **{name: content}))
    assert not (tmp_path / "report.html").exists()


def test_without_an_evaluation_the_reward_is_not_taken_for_success(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, metrics=STEPS))[1]
    assert "Not evaluated." in page.text and "from 0.1 to 3" in page.text
    assert "helped" not in page.text


def test_an_evaluation_without_a_baseline_says_so(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, results={"metrics": {"exact_match": {"after": figure(0.4)}}}))[1]
    assert "Nothing to compare with." in page.text and "0.400" in page.text


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    every = " ".join(NASTY)
    sample = {"prompt": every, "before": every, "after": every, "answers": NASTY, "kind": every, "split": every}
    run = make_run(
        tmp_path / "run <i>&",
        config=f"model: {json.dumps(NASTY[0])}\nreward: {json.dumps(NASTY[1])}\n# {every}\n",
        metrics=[{"step": 1, "reward": 0.1, f"signals/{NASTY[0]}": 1.0, f"seconds/{NASTY[1]}": 1.0}],
        samples=[{"step": every, "prompt": every, "response": every, "reward": 1.0, "signals": {every: 0.5}}],
        results={
            "metrics": {"exact_match": compared(0.2, 0.4), NASTY[0]: compared(0.1, 0.2)},
            "by_kind": {every: {"exact_match": compared(0.4, 0.2)}, "b": {"exact_match": compared(0.4, 0.2)}},
            "samples": [sample, {"prompt": [{"role": "user", "content": every}], "after": every}],
        },
    )
    source, page = read(run)  # `Page` refuses tags and attributes of anybody else's
    for letter in "\x00\x1b\x85\u2028\u2029\u202e\ufeff":
        assert letter not in source
    assert "\\u2028" in page.text and "\\ud800" in page.text and "東京 🙂 مرحبا" in page.text
    assert NASTY[0] in page.text  # shown as what it is
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert f'"{policy}"' in html.unescape(source)
    assert "http://" not in source and "https://" not in source and "@import" not in source


@settings(max_examples=60)
@given(st.text(st.characters(), max_size=40))
def test_escaped_text_reads_as_written(text: str) -> None:
    safe = escape(text)
    assert not set("<>\"'") & set(safe)
    safe.encode("utf-8")
    visible = re.sub(r"\\u[0-9a-f]{4}", "", html.unescape(safe))
    assert all(letter in text for letter in visible)


def test_long_texts_are_cut_and_say_so() -> None:
    assert clip("<" * 2_000) == "&lt;" * 2_000
    assert clip("x" * 2_345) == "x" * 2_000 + '<span class="cut">… (345 more characters)</span>'


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    steps = [{"step": i, "reward": float(i % 7), "kl": float(i)} for i in range(5_000)]
    sample = {"prompt": "p" * 50_000, "before": "b" * 50_000, "after": "a" * 50_000, "answers": ["w" * 5_000] * 50}
    drawn = [{"step": i, "prompt": "q", "response": "r", "reward": 0.5} for i in range(400)]
    run = make_run(
        tmp_path, metrics=steps, samples=drawn, config="x: " + "y" * 100_000,
        results={"metrics": {"exact_match": compared(0.2, 0.4)}, "samples": [sample] * 400},
    )  # fmt: skip
    source, page = read(run)
    assert page.tags.count("article") == 1 + 20 + 20
    assert "20 of 400 changed ones, drawn by lot" in page.text and "48,000 more characters" in page.text
    assert all(len(points.split()) <= MAX_POINTS for points in re.findall(r'points="([^"]*)"', source))
    assert len(source) < 500_000


def test_a_run_that_was_killed_still_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, metrics=[{"step": 1, "reward": 0.5}, {"step": 2, "reward": float("nan")}, [1]])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    (run / "config.yaml").write_text("a: [")
    page = read(run)[1]
    assert "2 unreadable lines left out" in page.text
    assert page.tags.count("circle") == 1  # step 1 alone has a reward that can be drawn


def test_a_resumed_run_counts_a_step_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, metrics=[{"step": s, "reward": r} for s, r in [(1, 0.5), (2, 9.0), (2, 0.25), (3, 0.75)]])
    source, page = read(run)
    assert "0.500 → 0.750" in page.text
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', source)] == [3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no `metrics`"),
        ('{"metrics": {"f1": 3}}', r"metrics\.f1: is not an object"),
        ('{"metrics": {"f1": {"after": {"mean": 1, "low": 0, "high": null, "n": 3}}}}', r"metrics\.f1\.after: is not"),
        ('{"metrics": {}, "by_kind": {"a": {"f1": {"before": 1}}}}', r"by_kind\.a\.f1\.before: is not"),
    ],
)
def test_results_that_are_not_results_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=says):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor results\.json"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "none")


def test_the_page_can_go_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=STEPS)
    out = tmp_path / "pages" / "a.html"
    assert write_report(run, out) == out
    assert out.is_file() and not (run / "report.html").exists()


def test_a_curve_puts_points_where_they_belong() -> None:
    # x: 46 … 328 for steps 0 … 2; y: 156 … 8 for values 0 … 1, ticks 0, 0.5, 1.
    svg = ElementTree.fromstring(curve([(0, 0.0), (1, 1.0), (2, 0.5)], "<Reward>"))
    assert svg.get("aria-label") == "<Reward> by step"
    line = next(item for item in svg if item.tag == "polyline")
    assert line.get("points") == "46.0,156.0 187.0,8.0 328.0,82.0"
    labels = [(text.text, text.get("y")) for text in svg if text.get("text-anchor") == "end"]
    assert labels == [("0", "160.0"), ("0.5", "86.0"), ("1", "12.0")]


def test_an_interval_bar_lies_about_zero() -> None:
    # 60 ± 54 for ±scale: −0.5 of 1 → 33, 0.25 → 73.5, 2 is cut at 114.
    bar = ElementTree.fromstring(interval(-0.5, 0.25, 2.0, 1.0, "up"))
    line, dot = bar[1], bar[2]
    assert (line.get("x1"), line.get("x2"), dot.get("cx")) == ("33.0", "114.0", "73.5")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 4, [0, 1, 2, 3, 4]),
        (1, 300, [0, 100, 200, 300]),
        (-0.7, 0.1, [-0.8, -0.6, -0.4, -0.2, 0, 0.2]),
        (5, 5, [2, 4, 6, 8]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_ticks_enclose_what_is_drawn(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high)
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    ElementTree.fromstring(curve([(0.0, low), (1.0, high)], "any"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-1.5, "−1.5"),
        (999.9, "1,000"),
        (1234.5, "1,234"),
        (2.5e6, "2.5e+06"),
        (3e-5, "3e−05"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_the_moving_average_is_a_mean_of_neighbours() -> None:
    # Window of two to either side, fewer at the ends: (0+1+2)/3, (0+1+2+3)/4, (0+…+4)/5, …
    points = [(float(i), float(i)) for i in range(6)]
    assert [y for _, y in smooth(points)] == pytest.approx([1, 1.5, 2, 3, 3.5, 4])
    assert [y for _, y in smooth([(float(i), 2.0) for i in range(100)])] == pytest.approx([2.0] * 100)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_order_bounds_and_every_spike(values: list[float], limit: int) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 1) and kept == sorted(kept) and set(kept) <= set(points)
    assert {min(values), max(values)} <= {y for _, y in kept}
