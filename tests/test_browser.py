"""The pages in a browser: what pointing and keys show, that numbers read back are those captured, that no text runs, no
request leaves and nothing is cut off. Skipped without chromium, or without playwright."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adhere import Policy
from adhere.data import rows_of
from adhere.inspection.inspection import ALL, COPY, Inspection
from adhere.inspection.panel import PROMPT_DRAWN, RESPONSE_DRAWN, Heads, Passage
from adhere.origin import record
from adhere.report.inspection import write_inspections
from adhere.report.page import write_report
from adhere.reward.heads import copy_heads
from adhere.reward.inspecting import inspect
from adhere.toy import model_path

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")]

CONTEXT = "mary is in the yard . john is in the office ."
NASTY = [
    "<script>window.ran = true</script>",
    " \"><img src=x onerror='window.ran = true'>",
    " '\"&quot;&lt;",
    " مرحبا بالعالم",
    " \u202egnp.exe",
    " 🙂👩‍👩‍👧",
    " 東京",
    "\n\t",
    "</div></style></main>",
]
SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a file; at the end of the test nothing may have been said in the console, and nothing asked for."""
    told, contexts = [], []

    def open_(path, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert told == []


@pytest.fixture(scope="module")
def found():
    policy = Policy.load(model_path("causal"), device="cpu")
    prompt = rows_of([{"context": CONTEXT, "question": "where is john ?"}])[0].prompt
    return inspect(policy, prompt, "office", heads=copy_heads(policy))


def made(prompt, response, seed=0):
    """An inspection of given tokens and random attention, half of it on the prompt."""
    draw = torch.rand(len(response), len(prompt), generator=torch.Generator().manual_seed(seed))
    draw[range(len(response)), [(7 * row + 1) % len(prompt) for row in range(len(response))]] += len(prompt) / 4
    attention = draw / draw.sum(-1, keepdim=True) / 2
    none, logprobs = torch.zeros(len(prompt), dtype=torch.bool), torch.full((len(response),), -0.5)
    ends = torch.zeros(len(response), dtype=torch.bool)
    figures = Inspection.figures_of(attention, none, logprobs)
    return Inspection(tuple(prompt), tuple(response), none, ends, {ALL: attention}, logprobs, figures)


def written(tmp_path: Path, *rows) -> Path:
    path = tmp_path / "page.html"
    write_inspections([row if isinstance(row, dict) else {"": row} for row in rows], "models/tiny", path)
    return path


def word(page, side, text):
    return page.locator(f".{side} .word", has_text=text).first


def shades(page, side):
    return page.locator(f".{side} .word").evaluate_all(
        "words => words.map((word) => Number(word.style.getPropertyValue('--shade')))"
    )


def said(page):
    return page.locator(".said").first.text_content()


def test_pointing_at_the_answer_lights_up_what_the_copy_heads_read(found, opened, tmp_path):
    page = opened(written(tmp_path, found))
    assert page.title().startswith("Where tiny read “office")
    word(page, "response", "office").hover()
    own = found.maps[COPY][0].masked_fill(found.prompt_special, 0)
    lit = shades(page, "prompt")
    assert len(lit) == len(own)  # words of the toys are tokens
    top = max(found.maps[COPY].masked_fill(found.prompt_special, 0).amax(), 0)
    assert lit == pytest.approx((own / top).sqrt().clamp(max=1).tolist(), abs=0.01)
    best = found.prompt_tokens[int(own.argmax())].strip()
    assert best == "office"
    assert f"looked most at: {best} {100 * float(own.max()):.0f} %" in said(page)
    page.mouse.move(0, 0)
    assert said(page).startswith("The whole response, on average")


def test_pointing_at_the_prompt_lights_up_the_words_that_read_it(found, opened, tmp_path):
    page = opened(written(tmp_path, found))
    place = [token.strip() for token in found.prompt_tokens].index("office")
    page.locator(".prompt .word").nth(place).hover()
    read = found.maps[COPY][:, place]
    lit = shades(page, "response")
    assert lit.index(max(lit)) == int(read.argmax()) == 0
    assert "“office” of the prompt was read by: office" in said(page)


def test_the_mean_of_all_heads_and_the_sinks_are_a_press_away(found, opened, tmp_path):
    page = opened(written(tmp_path, found))
    page.get_by_role("button", name="all heads").click()
    mean = found.attention.mean(0).masked_fill(found.prompt_special, 0)
    assert shades(page, "prompt") == pytest.approx((mean / mean.max()).sqrt().tolist(), abs=0.01)
    whole = found.attention.mean(0)
    page.get_by_role("button", name="Attention sinks").click()
    assert shades(page, "prompt") == pytest.approx((whole / whole.max()).sqrt().tolist(), abs=0.01)


def test_keys_do_what_the_mouse_does(found, opened, tmp_path):
    page = opened(written(tmp_path, found))
    first, second = page.locator(".response .word").nth(0), page.locator(".response .word").nth(1)
    first.focus()
    told = said(page)
    assert "looked most at: office" in told
    page.keyboard.press("ArrowRight")
    assert second.evaluate("word => word === document.activeElement") and said(page) != told
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "true" and first.get_attribute("role") == "button"
    first.evaluate("word => word.blur()")
    assert said(page) == told  # it stays
    page.keyboard.press("Tab")
    first.focus()
    page.keyboard.press("Escape")
    assert first.get_attribute("aria-pressed") == "false"
    page.get_by_text("Token by token").click()
    page.locator(".cells canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert f"Response token 2, prompt token 2: “{found.response_tokens[1].strip()}”" in said(page)


def test_any_head_can_be_chosen_from_the_grid(found, opened, tmp_path):
    page = opened(written(tmp_path, found))
    page.get_by_text("Head by head").click()
    page.locator(".thumbs button").first.wait_for()  # drawn when the browser says that they are open
    layers, heads = found.heads.scores.shape
    assert page.locator(".thumbs button").count() == layers * heads
    layer, head = divmod(int(found.heads.scores.argmax()), heads)
    score = float(found.heads.scores.max())
    page.get_by_role("button", name=f"layer {layer}, head {head}, copy score {score:.2f}").click()
    word(page, "response", "office").hover()
    row = torch.zeros(len(found.prompt_tokens))
    number = found.heads.kept.tolist().index([layer, head])
    row[found.heads.places[number, 0]] = found.heads.values[number, 0]
    top = float(found.heads.values[number].max())
    assert shades(page, "prompt") == pytest.approx((row / top).sqrt().tolist(), abs=0.01)
    assert page.get_by_role("button", name="copy heads").get_attribute("aria-pressed") == "false"


def test_two_responses_share_the_colour_scale(opened, tmp_path):
    prompt = [" a", " b", " c"]
    one, other = made(prompt, [" d"]), made(prompt, [" e"], seed=3)
    page = opened(written(tmp_path, {"Before": one, "After": other}))
    page.locator(".response .word").nth(0).hover()
    top = float(max(one.attention.max(), other.attention.max()))
    both = torch.cat([one.attention[0], other.attention[0]])
    assert shades(page, "prompt") == pytest.approx((both / top).sqrt().tolist(), abs=0.01)
    assert page.locator(".legend span").text_content() == f"0 to {100 * top:.0f} %"
    page.locator(".prompt .word").nth(1).hover()  # the same word of the same prompt is pointed at in both
    assert page.locator(".prompt .word.at").count() == 2


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_no_text_runs_and_nothing_is_cut_off(opened, tmp_path, width, scheme):
    pair = {"A": made(NASTY, NASTY), "B": made(NASTY, ["x" * 300])}
    page = opened(written(tmp_path, made(NASTY, NASTY), pair), width, scheme)
    assert page.evaluate("window.ran === undefined")
    for details in page.locator("summary").all():
        details.click()
    page.locator(".response .word").nth(0).hover()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    texts = page.locator(".panel").first.locator(".prompt .word").all_text_contents()
    assert "<script>window.ran = true</script>" in "".join(texts) and "東京" in texts and "🙂👩‍👩‍👧" in texts
    assert "مرحبا بالعالم" in texts and "\\u202egnp" in "".join(texts)


def test_a_page_of_2000_by_300_tokens_is_small_and_answers_within_a_second(opened, tmp_path):
    big = made([f" prompt{i}" for i in range(PROMPT_DRAWN)], [f" said{i}" for i in range(RESPONSE_DRAWN)])
    kept = torch.cartesian_prod(torch.arange(30), torch.arange(9))
    places = big.attention.argmax(-1).expand(len(kept), -1)[..., None]
    heads = Heads(torch.rand(30, 9), kept, places, torch.rand(places.shape))
    tracks = dict.fromkeys(("grounding", "drop"), torch.rand(RESPONSE_DRAWN))
    passages = (Passage(10, 30, 0.6, "p"), Passage(30, 50, 0.4, "q"))
    whole = replace(big, maps={COPY: big.attention, ALL: big.attention}, heads=heads, tracks=tracks, passages=passages)
    path = written(tmp_path, whole)
    assert path.stat().st_size < 2_000_000
    page = opened(path)
    loaded = []
    for _ in range(3):  # the machine may be busy with something else
        loaded.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        page.reload()
    assert min(loaded) < 1_000  # milliseconds
    pointed = page.evaluate(
        """() => {
          const start = performance.now();
          for (const word of [...document.querySelectorAll(".response .word")].slice(0, 10)) {
            word.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
            document.body.offsetHeight;
          }
          return (performance.now() - start) / 10;
        }"""
    )
    assert pointed < 200  # milliseconds, layout included
    assert "looked most at: prompt64 17 %" in said(page)  # row 9: 500 of 1,500, halved; a digit is right to 8 %
    page.get_by_text("Token by token").click()
    page.wait_for_function(f"document.querySelector('.cells canvas').height === {RESPONSE_DRAWN}")
    width, shown, *strongest = page.locator(".cells canvas").evaluate(
        """canvas => {
          const { width, height, clientWidth } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          const most = new Array(height).fill(0);
          data.forEach((value, at) => {
            const row = Math.floor(at / 4 / width);
            if (at % 4 === 3) most[row] = Math.max(most[row], value);
          });
          return [width, clientWidth, ...most];
        }"""
    )
    # 2,000 columns on fewer pixels, and the strongest cell of every row is there: 0.17 of at most 0.17, less 8 %.
    assert width <= shown < PROMPT_DRAWN and len(strongest) == RESPONSE_DRAWN and min(strongest) > 240


@pytest.fixture(scope="module")
def run(tmp_path_factory, found):
    """A run with everything that a page shows, and long names in it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    estimate = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 200}
    figure = {"before": estimate, "after": estimate, "difference": estimate, "p": 0.001, "p_holm": 0.01}
    names = ("exact_match", "f1", "relevance_words", "consistency", "length", "a_metric_of_my_own_with_a_long_name")
    samples = [{"prompt": "".join(NASTY), "before": NASTY[0], "after": NASTY[1] * 20, "answers": ["w" * 300]}]
    kinds = {"k" * 90: {"exact_match": figure}, "b": {"exact_match": figure}}
    written = {
        "results.json": {"metrics": dict.fromkeys(names, figure), "by_kind": kinds, "samples": samples},
        "audit-before.json": {"verdict": "Paid for: empty. " * 9, "gameable": True, "prompts": 16},
        "attention.json": {"before": found.to_json(), "after": made(NASTY, NASTY).to_json()},
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    steps = [{"step": i, "reward": i / 10, "kl": 0.1, "signals/grounding": 0.2} for i in range(30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "config.yaml").write_text("seed: 1\nmodel: " + "m" * 200)
    record(folder, "adhere train --model " + "m" * 200)
    return write_report(folder)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_of_a_report_is_cut_off(run, opened, width, scheme):
    page = opened(run, width, scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # No box hides what runs out of it: only the maps of tokens and of heads scroll, in their own frames.
    cut = page.locator("main *:not(.thumbs, .grid, .prompt)").evaluate_all(
        """boxes => boxes
             .filter((box) => ["auto", "hidden", "scroll"].includes(getComputedStyle(box).overflowX))
             .filter((box) => box.clientWidth > 1 && box.scrollWidth > box.clientWidth + 1)
             .map((box) => box.outerHTML.slice(0, 80))"""
    )
    assert cut == []
    assert page.evaluate("window.ran === undefined")


def test_the_first_screen_has_the_verdict_and_the_answer_that_changed(run, opened):
    page = opened(run)
    for text in (
        "Training helped, at a price.",
        "The audit before training warned",
        "Exact match",
        "One answer that changed",
    ):
        assert page.get_by_text(text, exact=False).first.bounding_box()["y"] < 900
    page.locator(".panel").first.locator(".response .word").first.hover()
    assert "looked most at: office" in said(page)
    page.get_by_role("link", name="How it was made").click()
    assert page.evaluate("location.hash") == "#made" and page.locator("#made").is_visible()


def test_the_tables_are_saved_without_a_request(run, opened):
    page = opened(run)
    for suffix in ("CSV", "JSON"):
        with page.expect_download() as saved:
            page.get_by_role("link", name=suffix, exact=True).click()
        text = Path(saved.value.path()).read_text()
        assert saved.value.suggested_filename == f"results.{suffix.lower()}" and "exact_match" in text
