"""The view of one response: its tokens, attention and figures against the reading, and what it shows where."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from adhere import Policy, Reward, UserError
from adhere.cli import main
from adhere.data import rows_of
from adhere.inspection.html import FINE_CELLS, view
from adhere.inspection.inspection import ALL, COPY, Inspection
from adhere.inspection.packing import FLOOR, packed
from adhere.inspection.panel import PROMPT_DRAWN, RESPONSE_DRAWN, SINK, Heads, Passage, sinks
from adhere.inspection.tokens import token_texts
from adhere.reward.heads import copy_heads
from adhere.reward.inspecting import inspect
from adhere.reward.sources import cite
from adhere.toy import make_rows, model_path
from tests.families import save

PROMPT = make_rows("conflict", "test", 1)[0]["prompt"]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
NASTY = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "'--> <!--",
    "a\u2028\x1b[31m\u202e",
    "&lt;",
]
ALLOWED = "div span b i small p h3 button canvas details summary style script"
CHAT = "{% for m in messages %}</s> {{ m['content'] }} {% endfor %}answer :"


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request):
    return Policy.load(model_path(request.param), device="cpu")


@pytest.fixture(scope="module")
def causal():
    return Policy.load(model_path("causal"), device="cpu")


def made(prompt, response, seed=0):
    """An inspection of given tokens and random attention that sums to one half."""
    draw = torch.rand(len(response), len(prompt), generator=torch.Generator().manual_seed(seed))
    attention = draw / draw.sum(-1, keepdim=True) / 2
    special = torch.zeros(len(prompt), dtype=torch.bool)
    logprobs = torch.full((len(response),), -0.5)
    ends = torch.zeros(len(response), dtype=torch.bool)
    figures = Inspection.figures_of(attention, special, logprobs)
    return Inspection(tuple(prompt), tuple(response), special, ends, {ALL: attention}, logprobs, figures)


class View(HTMLParser):
    """Tags, the text of each word, and the pieces that are no text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.words, self.text, self.raw = [], [], {"prompt": [], "response": []}, "", []
        self.part = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag in ALLOWED.split(), tag
        assert not any(name.startswith("on") or name in ("src", "href") for name in given), given
        names = (given.get("class") or "").split()
        self.part = next((part for part in self.words if part in names), self.part)
        if "word" in names:
            self.words[self.part].append("")
        self.tags.append((tag, given))
        self.open.append((tag, "word" in names))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, word = self.open[-1]
        if tag in ("style", "script"):
            self.raw.append(data)
        else:
            self.text += data
        if word:
            self.words[self.part][-1] += data


def test_the_greedy_response_is_inspected_with_the_attention_of_its_replay(policy):
    found = policy.inspect(PROMPT)
    rollout = policy.answered(PROMPT, None, 64)
    reading = policy.read(rollout)
    length, width = int(rollout.lengths[0]), int(rollout.prompts.mask.sum())
    assert found.attention.shape == (length, width) == (len(found.response_tokens), len(found.prompt_tokens))
    assert torch.equal(found.attention, reading.attention[0])
    assert torch.equal(found.logprobs, reading.logprobs[0])
    assert PROMPT in found.prompt and rollout.responses[0] in found.response
    assert found.response_special.tolist() == [False] * (length - 1) + [True]


def test_a_given_response_is_inspected_as_it_is(policy):
    found = policy.inspect(PROMPT, "garden")
    assert found.response_tokens[0].strip() == "garden" and len(found.response_tokens) == 2
    place, most = found.most_attended(0, count=1)[0]
    assert most == float(found.attention[0][~found.prompt_special].max()) == float(found.attention[0, place])


def test_coverage_and_focus_are_the_signals_over_the_users_own_words(policy):
    reward = Reward.resolve({"weights": {"coverage": 1.0, "focus": 1.0, "lookback": 1.0}, "salience": "all"}, policy)
    signals = reward.score([PROMPT], ["garden"]).signals
    figures = policy.inspect(PROMPT, "garden").figures
    for figure, signal in (("coverage", "coverage"), ("focus", "focus"), ("on the prompt", "lookback")):
        assert figures[figure] == pytest.approx(float(signals[signal]), abs=1e-5)


def test_figures_by_hand():
    # Two words and a special token, one row: 0.5 of the attention on the special one, 0.3 and 0.1 on the words.
    attention, special = torch.tensor([[0.5, 0.3, 0.1]]), torch.tensor([True, False, False])
    figures = Inspection.figures_of(attention, special, torch.tensor([-2.0]))
    # Among the words 3/4 and 1/4: entropy 0.5623 of log 2 = 0.6931, so focus 1 − 0.8113.
    assert figures == pytest.approx(
        {"log-prob": -2.0, "on the prompt": 0.9, "coverage": 0.4, "focus": 0.1887}, abs=1e-4
    )
    alone = Inspection.figures_of(attention[:, :2], special[:2], torch.tensor([-2.0]))
    assert alone["focus"] == 0.0


def test_a_reward_shows_its_signals_and_the_copy_heads(policy):
    reward = Reward.named("attention", policy)
    scores = reward.score([row["prompt"] for row in make_rows("conflict", "test", 4)], ["garden"] * 4)
    found = reward.inspect(PROMPT, "garden")
    assert found.figures["reward"] == pytest.approx(float(scores.reward[0]), abs=1e-4)
    assert {name: found.figures[name] for name in scores.signals} == pytest.approx(
        {name: float(value[0]) for name, value in scores.signals.items()}, abs=1e-4
    )
    assert list(found.maps) == [ALL, COPY] and "copy heads" in View(found.html()).text


def test_a_reward_of_text_alone_still_shows_attention(causal):
    found = Reward.named("overlap", causal).inspect(PROMPT, "garden")
    assert torch.equal(found.attention, causal.inspect(PROMPT, "garden").attention)


def test_the_words_of_a_chat_template_are_told_from_the_users_own(causal):
    causal.tokenizer.chat_template = CHAT
    found = causal.inspect([{"role": "user", "content": "mary is in the yard ."}], "yard")
    causal.tokenizer.chat_template = None
    own = [text.strip() for text, special in zip(found.prompt_tokens, found.prompt_special, strict=True) if not special]
    assert own == ["mary", "is", "in", "the", "yard", "."]
    classes = [given["class"] for _, given in View(found.html()).tags if "word" in (given.get("class") or "")]
    assert classes[0] == "word special" and classes[1] == "word"


def test_no_text_of_a_token_becomes_markup():
    plain, nasty = (View(made(words, words).html()) for words in ([" word"] * len(NASTY), NASTY))
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in nasty.tags]
    assert nasty.words["prompt"] == nasty.words["response"]
    assert nasty.words["prompt"] == [*NASTY[:3], "a\\u2028\\u001b[31m\\u202e", "&lt;"]
    assert not any("alert" in piece for piece in nasty.raw)


def test_the_view_touches_nothing_but_itself_and_asks_for_nothing():
    inspection = made(["a", " b"], ["c"])
    first, second = View(inspection.html()), View(inspection.html())
    names = [view.tags[0][1]["id"] for view in (first, second)]
    assert names[0] != names[1]
    style, script = first.raw
    rules = re.sub(r"@media[^{]*\{(.*)\}\s*$", r"\1", style, flags=re.DOTALL)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", rules) for part in rule.split(",")]
    assert len(selectors) > 10 and all(selector.startswith(f"#{names[0]}") for selector in selectors)
    assert set(re.findall(r"document\.\w+", script)) == {"document.getElementById", "document.createElement"}
    assert script.count("getElementById") == 1 and f'getElementById("{names[0]}")' in script
    assert not re.search(r"https?:|url\(|import|fetch|innerHTML|VIEW", style + script)
    assert [given.get("nonce") for tag, given in View(inspection.html("n1")).tags if tag == "script"] == ["n1"]


def test_a_long_prompt_and_response_are_cut_and_the_view_says_so():
    inspection = made([f" p{i}" for i in range(PROMPT_DRAWN + 1000)], [f" r{i}" for i in range(RESPONSE_DRAWN + 10)])
    source = inspection.html()
    view = View(source)
    assert len(view.words["prompt"]) == PROMPT_DRAWN and len(view.words["response"]) == RESPONSE_DRAWN
    assert (view.words["prompt"][0], view.words["prompt"][-1]) == ("p0", f"p{PROMPT_DRAWN + 999}")
    assert "1,000 prompt tokens in the middle are not drawn" in view.text and "The last 10 response tokens" in view.text
    # A third of an attention that sums to one half, spread evenly.
    assert "17% of a token's attention went there" in view.text
    assert len(source) < 1_200_000 and len(repr(inspection)) < 4_000


def unpacked(text, digits):
    """What a page reads back: see `packing`."""
    codes = np.array([ALPHABET.index(letter) for letter in text]).reshape(-1, digits)
    steps = codes @ 64 ** np.arange(digits - 1, -1, -1)
    return np.where(steps == 0, 0.0, FLOOR ** (1 - (steps - 1) / (64**digits - 2)))


@pytest.mark.parametrize("scale", [1.0, 1e-2, FLOOR * 2])
@pytest.mark.parametrize(("digits", "error"), [(1, 0.08), (2, 0.0012)])
def test_a_packed_cell_says_the_attention_to_a_share_of_itself(scale, digits, error):
    attention = torch.rand(7, 33, generator=torch.Generator().manual_seed(1)) * scale / 2 + scale / 2
    text = packed(attention, digits)
    assert len(text) == digits * attention.numel()
    assert unpacked(text, digits).reshape(7, 33) == pytest.approx(attention.numpy(), rel=error)


def test_the_ends_of_the_scale_are_packed_as_they_are():
    ends = torch.tensor([0.0, FLOOR / 2, FLOOR, 1.0], dtype=torch.double)
    assert [packed(ends, 1), packed(ends, 2)] == ["AAB/", "AAAAAB//"]
    assert unpacked(packed(ends, 2), 2) == pytest.approx([0, 0, FLOOR, 1])


def panel_of(source):
    return json.loads(next(given["data-panel"] for _, given in View(source).tags if "data-panel" in given))


def test_the_numbers_of_a_page_are_those_that_were_captured(policy):
    found = inspect(policy, PROMPT, "garden", heads=copy_heads(policy))
    told = panel_of(found.html())
    assert told["digits"] == 2 and list(told["maps"]) == [COPY, ALL]
    for name, text in told["maps"].items():
        captured = found.maps[name].numpy()
        assert unpacked(text, 2).reshape(captured.shape) == pytest.approx(captured, rel=0.0012, abs=FLOOR)
    assert told["tracks"]["log-prob"] == pytest.approx(found.logprobs.tolist(), abs=5e-4)
    assert sum(told["prompt"]) == len(found.prompt_tokens) and sum(told["response"]) == len(found.response_tokens)


def test_single_heads_are_those_of_eager_attention(causal):
    heads = copy_heads(causal)
    found = inspect(causal, PROMPT, "garden", heads=heads)
    rollout = causal.answered(PROMPT, "garden", 4)
    asked = int(rollout.prompts.mask.sum())
    ids = torch.cat([rollout.prompts.ids, rollout.response_ids], dim=1)
    causal.network.set_attn_implementation("eager")
    maps = torch.stack(causal.network(ids, output_attentions=True).attentions)[:, 0]
    causal.network.set_attn_implementation("sdpa")
    own = ~sinks(found.attention, found.prompt_special)
    rows = maps[:, :, asked - 1 : -1, :asked] * own  # [L, H, R, P]
    assert torch.equal(found.heads.kept, torch.ones(rows.shape[:2]).nonzero())
    for (layer, head), places, values in zip(found.heads.kept, found.heads.places, found.heads.values, strict=True):
        assert torch.allclose(rows[layer, head].gather(-1, places), values, atol=1e-5)
        assert torch.allclose(values[:, 0], rows[layer, head].amax(-1), atol=1e-5)
    weights = heads.weights
    whole = torch.zeros(rows.shape[2:])
    for (layer, head), places, values in zip(found.heads.kept, found.heads.places, found.heads.values, strict=True):
        whole.scatter_add_(-1, places, weights[layer, head] * values)
    assert torch.allclose(whole, found.maps[COPY] * own, atol=1e-4)  # all cells of so short a prompt are kept


def asked(context):
    return rows_of([{"context": context, "question": "where is john ?"}])[0].prompt


def test_passages_are_the_sources_that_scores_cite(causal):
    prompt = asked("mary is in the yard . john is in the office .")
    heads = copy_heads(causal)
    found = inspect(causal, prompt, "office", heads=heads)
    reading = causal.read(causal.answered(prompt, "office", 4), copy_weights=heads.weights)
    cited = {source.text: source.share for source in cite(reading, causal.tokenizer)[0][0].sources}
    assert max(cited, key=cited.get) == max(found.passages, key=lambda one: one.share).text
    assert sum(one.share for one in found.passages) == pytest.approx(1, abs=0.1)
    marked = "".join(found.prompt_tokens[found.passages[0].start : found.passages[0].stop]).strip()
    assert marked == found.passages[0].text == "mary is in the yard ."
    assert f">{found.passages[0].share:.0%}</small>" in found.html()


def test_the_figures_of_a_token_are_those_of_the_signals(causal):
    heads = copy_heads(causal)
    reward = Reward.resolve({"weights": {"grounding": 1.0, "leave_one_out": 1.0}, "normalise": "none"}, causal, heads)
    prompt = asked("john is in the office .")
    found = reward.inspect(prompt, "office")
    content = torch.tensor([True, False])  # the word, and what ends it
    assert float(found.tracks["grounding"][content].mean()) == pytest.approx(found.figures["grounding"], abs=1e-5)
    # One sentence in all: to leave out the one that was read most is to leave out the one that is needed most.
    assert float(found.tracks["drop"].mean()) == pytest.approx(found.figures["leave_one_out"], abs=1e-4)


def test_a_first_token_that_takes_most_attention_is_a_sink():
    special = torch.tensor([False, True, False])
    much, little = (torch.tensor([[share, 0.1, 0.1]] * 4) for share in (SINK + 0.05, SINK - 0.05))
    assert sinks(much, special).tolist() == [True, True, False]
    assert sinks(little, special).tolist() == [False, True, False]


def test_two_responses_stand_side_by_side_in_one_view():
    one, other = made(["a", " b"], ["c"]), made(["a", " b"], ["d", " e"], seed=1)
    source = view([one.panel("First"), other.panel("<Second>")])
    found = View(source)
    assert found.words == {"prompt": ["a", "b"] * 2, "response": ["c", "d", "e"]}
    assert "First" in found.text and "<Second>" in found.text
    assert sum("data-panel" in given for _, given in found.tags) == 2 and found.raw[1].count("getElementById") == 1


def test_the_largest_page_of_all_heads_stays_below_two_megabytes():
    prompt, response = PROMPT_DRAWN, RESPONSE_DRAWN
    big = made([f" p{i}" for i in range(prompt)], [f" r{i}" for i in range(response)])
    layers, count, cells = 32, 32, 100_000
    kept = torch.cartesian_prod(torch.arange(layers), torch.arange(count))[: cells // response]
    places = torch.randint(0, prompt, (len(kept), response, 1), generator=torch.Generator().manual_seed(0))
    heads = Heads(torch.rand(layers, count), kept, places, torch.rand(places.shape))
    tracks = dict.fromkeys(("grounding", "drop"), torch.rand(response))
    passages = (Passage(10, 30, 0.6, "p"), Passage(30, 50, 0.4, "q"))
    whole = replace(big, maps={COPY: big.attention, ALL: big.attention}, heads=heads, tracks=tracks, passages=passages)
    assert 2 * prompt * response > FINE_CELLS
    assert len(whole.html().encode()) < 2_000_000


def test_more_heads_than_a_page_has_room_for_are_chosen_by_copy_score(causal, monkeypatch):
    monkeypatch.setattr("adhere.reward.inspecting.HEAD_CELLS", 2 * 3)  # three heads of two rows, a cell each
    heads = copy_heads(causal)
    found = inspect(causal, PROMPT, "garden", heads=heads)
    best = heads.scores.flatten().argsort(descending=True, stable=True)[:3].sort().values
    assert (found.heads.kept @ torch.tensor([heads.scores.shape[1], 1])).tolist() == best.tolist()
    assert found.heads.places.shape == (3, 2, 1)
    told = panel_of(found.html())["heads"]
    assert len(told["places"]) == 2 * 3 * 2 and told["shape"] == list(heads.scores.shape)


def test_nothing_but_special_tokens_or_no_attention_at_all_is_drawn_too():
    inspection = made(["<s>", "</s>"], ["a"])
    special = replace(inspection, prompt_special=torch.ones(2, dtype=torch.bool))
    dark = replace(inspection, maps={ALL: torch.zeros(1, 2)})
    for found in (special, dark):
        assert View(found.html()).words["prompt"] == ["<s>", "</s>"]
        assert found.most_attended(0) == [] and "nan" not in repr(found)


def test_a_terminal_is_shown_a_table_without_control_characters(policy):
    text = repr(policy.inspect(PROMPT, "garden"))
    assert "garden" in text and "log-prob" in text and "looked at, all heads:" in text
    assert "\x1b" not in repr(made(NASTY, [*NASTY, "\n", " "])) and "\\u001b" in repr(made(NASTY, NASTY))


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    alphabet = {piece: place for place, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "naïve 🙂 東京"
    ids = tokenizer.encode(text).ids
    pieces = token_texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ids)
    assert "".join(pieces) == text and len(pieces) == len(ids) == len(text.encode())
    assert pieces[2:4] == ("", "ï") and pieces[7:11] == ("", "", "", "🙂")
    cut = token_texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ids[:9])
    assert "".join(cut) == "naïve \ufffd"
    assert View(made(pieces, ["a"]).html()).words["prompt"] == ["naïve", " ", "🙂", " ", "東", "京"]


def test_what_does_not_fit_the_context_is_one_clear_line(causal):
    with pytest.raises(UserError, match="do not fit the model's context of 512; shorten the response or the prompt"):
        causal.inspect(PROMPT, "garden " * causal.network.config.max_position_embeddings)
    with pytest.raises(UserError, match="set max_new_tokens to"):
        causal.inspect(PROMPT, max_new_tokens=100_000)


def test_a_reward_that_compares_responses_says_nothing_of_one(causal):
    figures = Reward.resolve({"weights": {"coverage": 1.0}}, causal).inspect(PROMPT, "garden").figures
    assert "reward" not in figures and 0 < figures["coverage"] < 1


def inspected(tmp_path, *options):
    given = ["--model", str(model_path("causal")), "--device", "cpu", "--output", str(tmp_path / "page.html")]
    return main(["inspect", *given, *options])


def test_the_command_writes_a_page_that_runs_its_own_scripts_alone(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": PROMPT, "response": "garden"}, {"prompt": PROMPT}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspected(tmp_path, "--prompts", str(file), "--reward", "certainty", "--json") == 0
    told = json.loads(capsys.readouterr().out)["inspections"]
    assert len(told) == 2 and told[0]["response"].startswith("garden") and "certainty" in told[0]["figures"]
    page = (tmp_path / "page.html").read_text("utf-8")
    nonce = re.search(r"default-src 'none'; style-src [^\"]*; script-src 'nonce-([\w-]+)'", page)[1]
    assert re.findall(r"<script[^>]*>", page) == [f'<script nonce="{nonce}">'] * 2
    assert len(set(re.findall(r'id="(adhere-\w+)"', page))) == 2


def test_the_command_shows_copy_heads_and_passages_by_itself(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    row = {"context": "mary is in the yard . john is in the office .", "question": "where is john ?"}
    file.write_text(json.dumps({**row, "response": "office"}))
    assert inspected(tmp_path, "--prompts", str(file), "--json") == 0
    told = json.loads(capsys.readouterr().out)["inspections"]
    assert max(told[0]["passages"], key=lambda one: one["share"])["text"] == "john is in the office ."
    page = (tmp_path / "page.html").read_text("utf-8")
    assert list(panel_of(re.search(r'<section class="card sample">(.*)</section>', page, re.DOTALL)[1])["maps"]) == [
        COPY,
        ALL,
    ]
    assert "<title>Where causal read “office” · adhere</title>" in page


def test_two_responses_and_two_models_stand_beside_each_other(tmp_path, capsys):
    given = ["--prompt", PROMPT, "--response", "garden", "--response", "office"]
    assert inspected(tmp_path, *given, "--baseline", str(model_path("causal")), "--json") == 0
    told = json.loads(capsys.readouterr().out)["inspections"]
    labels = ["Before · Response 1", "Before · Response 2", "After · Response 1", "After · Response 2"]
    assert [one["label"] for one in told] == labels
    assert told[0]["figures"] == told[2]["figures"] != told[1]["figures"]  # the same model


def test_a_model_without_copy_heads_is_shown_by_all_heads_with_a_warning(tmp_path, capsys):
    model = save("llama", tmp_path / "model")
    out = tmp_path / "page.html"
    assert main(["inspect", "--model", str(model), "--device", "cpu", "--prompt", "w1 w2", "--output", str(out)]) == 0
    assert "only the mean of all heads is shown: copy heads cannot be measured" in capsys.readouterr().err
    assert COPY not in out.read_text("utf-8").partition("<script")[0].partition("<main>")[2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--prompt", PROMPT, "--baseline", "./none"], "./none"),
        (["--prompt", PROMPT, "--max-new-tokens", "9999"], "--prompt: prompt and 9999 new tokens do not fit"),
        (["--prompt", PROMPT, "--response", "garden " * 9999], "--prompt: prompt and a response of 10000 tokens"),
        (["--prompts", "rows.jsonl", "--response", "garden"], "--response is for --prompt; write the responses into"),
        (["--prompt", PROMPT, "--reward", "exact"], "`exact` reads answers, and there are none here"),
        (["--prompt", " "], "--prompt: the prompt is empty; write some text"),
        ([], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_what_cannot_be_inspected_is_one_clear_line_and_no_page(tmp_path, capsys, options, line):
    assert inspected(tmp_path, *options) == 2
    assert line in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "page.html").exists()
