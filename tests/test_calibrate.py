"""The hybrid: weights from labelled pairs, which pairs to ask for, and the page that asks."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from importlib import util

import numpy as np
import pytest
import torch
import yaml

from adhere.cli import main
from adhere.data import Row, read_rows
from adhere.errors import UserError
from adhere.model.policy import Policy
from adhere.preferences.answer import BODY_LIMIT, Session, serve
from adhere.preferences.calibrate import HEADS_FROM, SIGNALS, Features, calibrate, features_of, fit_weights
from adhere.preferences.suggest import SuggestConfig, suggest
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import build, save, tokenizer

NAMES = (*SIGNALS, "0.0", "0.1")


def features(n, decides, seed=0, per_prompt=1):
    """Random features of n pairs, of which `decides` alone says which response is better; the default knows nothing."""
    rng = np.random.default_rng(seed)
    values, base = rng.normal(size=(n, len(NAMES))), rng.normal(size=n)
    if decides is not None:
        place = NAMES.index(decides)
        values[:, place] = np.abs(values[:, place]) + 0.1
    return Features(NAMES, values, base, rng.normal(size=n), tuple(f"p{i // per_prompt}" for i in range(n)))


@pytest.fixture(scope="module", params=["causal", "encdec"])
def policy(request):
    return Policy.load(model_path(request.param), device="cpu")


@pytest.fixture(scope="module")
def rows():
    stories = make_rows("conflict", "train", 12, seed=3, kinds=("extractive", "synonym", "category"))
    return [
        Row(row["prompt"], chosen=row["answers"][0], rejected=row["prior"], where=f"row {n}")
        for n, row in enumerate(stories)
    ]


def test_attention_of_each_head_equals_eager(tmp_path):
    for family in ("llama", "t5", "mistral", "bart"):
        folder = save(family, tmp_path / family)
        fast, slow = (Policy.load(folder, device="cpu", attention=how) for how in ("auto", "eager"))
        prompts = ["w1 is in the w2 . where is w1 ?", "w5 ?", "w5 ?"]
        rollout = fast.paired(prompts, ["w2 w3", "w4", "w1 w2 w3 w4"])
        salience = torch.rand(3, rollout.prompts.ids.shape[1]) * rollout.prompts.mask[rollout.prompt_index]
        mass = fast.head_mass(rollout, salience)
        torch.testing.assert_close(mass, slow.head_mass(rollout, salience), atol=1e-5, rtol=1e-4)
        # All heads together are what `attention` says.
        reading = fast.read(rollout)
        rows = torch.einsum("brp,bp->br", reading.attention, salience).sum(-1) / rollout.lengths
        torch.testing.assert_close(mass.mean((1, 2)), rows, atol=1e-5, rtol=1e-4)


def test_the_signal_that_decides_gets_the_weight():
    found = fit_weights(features(200, "grounding"), "x")
    assert found.accuracy.mean > 0.95 and found.gain.low > 0.3
    assert max(found.weights, key=lambda name: abs(found.weights[name])) == "grounding"
    assert found.verdict.startswith("Better than the uncalibrated reward")


def test_no_fold_sees_pairs_of_its_own_prompts():
    """A label that is random by prompt but the same for all its pairs: only a leak could put them in order."""
    accuracies = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        mark = rng.normal(size=(14, len(NAMES))).repeat(6, axis=0)
        prompts = tuple(f"p{i // 6}" for i in range(84))
        accuracies.append(
            fit_weights(Features(NAMES, mark, np.zeros(84), np.zeros(84), prompts), "x", seed).accuracy.mean
        )
    assert np.mean(accuracies) < 0.65


def test_pairs_of_one_prompt_count_as_one_in_the_intervals():
    many = features(120, "grounding", per_prompt=6)
    found = fit_weights(many, "x")
    assert found.pairs == 120 and {figure.n for figure in found.figures.values()} == {20}
    noise, claimed = np.random.default_rng(0), 0
    for seed in range(10):
        values = noise.normal(size=(20, len(NAMES))).repeat(6, axis=0)
        base = noise.normal(size=20).repeat(6)
        claimed += fit_weights(replace(many, values=values, base=base), "x", seed).gain.low > 0
    assert claimed <= 1  # one by one, 8 in 30 such samples of pure noise passed for a gain


def test_length_gets_no_weight_and_is_reported_beside():
    known = features(40, "grounding")
    found = fit_weights(replace(known, length=np.r_[np.ones(30), -np.ones(6), np.zeros(4)]), "x")
    assert found.longer.mean == pytest.approx((30 + 4 / 2) / 40)
    assert "length" not in SIGNALS and "length" not in found.weights


def test_weights_are_in_the_units_of_the_signals():
    """A signal told in thousandths gets a thousand times the weight, and every margin stays what it was."""
    known = features(60, "coverage")
    scale = np.ones(len(NAMES))
    scale[NAMES.index("coverage")] = 1000.0
    one, other = fit_weights(known, "x"), fit_weights(replace(known, values=known.values * scale), "x")
    assert other.weights["coverage"] * 1000 == pytest.approx(one.weights["coverage"], rel=1e-3)
    assert other.accuracy == one.accuracy


def test_a_head_that_decides_is_found_once_there_are_pairs_enough():
    found = fit_weights(features(300, "0.1"), "x")
    assert found.accuracy.mean > 0.95 and max(found.heads, key=lambda name: abs(found.heads[name])) == "0.1"
    assert not fit_weights(features(HEADS_FROM - 1, "0.1"), "x").heads


def test_labels_that_mean_nothing_are_said_to_be_too_few():
    found = fit_weights(features(40, None), "x")
    assert "too few" in found.verdict or "Worse" in found.verdict
    assert found.gain.low <= 0


def test_with_few_labels_it_stays_with_the_default_reward():
    known = features(12, None)
    base = np.abs(known.base) + 0.1  # the default puts every pair in order
    found = fit_weights(replace(known, base=base), "x")
    assert found.uncalibrated.mean == 1.0 and found.accuracy.mean >= 0.75


def test_features_are_differences_of_what_the_reward_says(policy, rows):
    found = features_of(policy, rows)
    assert found.values.shape == (12, len(found.names)) and found.names[: len(SIGNALS)] == SIGNALS
    reward = Reward.resolve({"weights": {"coherence": 1.0}, "normalise": "none"}, policy)
    for row, value in zip(rows[:3], found.values[:3, SIGNALS.index("coherence")], strict=True):
        scores = reward.score([row.prompt, row.prompt], [row.chosen, row.rejected]).reward.tolist()
        assert scores[0] - scores[1] == pytest.approx(value, abs=1e-4)


def test_the_saved_reward_orders_pairs_as_the_regression_did(policy, rows, tmp_path):
    found = calibrate(policy, rows)
    path = tmp_path / "weights.yaml"
    found.save(path)
    document = yaml.safe_load(path.read_text())
    assert document["format"] == 1 and document["pairs"] == 12 and document["verdict"] == found.verdict
    known = features_of(policy, rows)
    margins = known.values[:, : len(SIGNALS)] @ np.array([found.weights.get(name, 0.0) for name in SIGNALS])
    reward = Reward.resolve(f"calibrated:{path}", policy)
    for row, margin in zip(rows, margins, strict=True):
        scores = reward.score([row.prompt, row.prompt], [row.chosen, row.rejected]).reward.tolist()
        assert scores[0] - scores[1] == pytest.approx(margin, abs=2e-3)


def test_weights_of_heads_are_a_signal(policy):
    prompt, responses = "mary is in the kitchen . where is mary ?", ["kitchen", "garden"]
    spec = {"weights": {"heads": 1.0}, "head_weights": {"0.1": 2.0, "1.0": -1.0}, "normalise": "none"}
    reward = Reward.resolve(spec, policy)
    rollout = policy.paired([prompt, prompt], responses)
    mass = reward.evidence(rollout, policy).head_mass
    torch.testing.assert_close(reward(rollout).reward, 2 * mass[:, 0, 1] - mass[:, 1, 0])
    with pytest.raises(UserError, match=r"no head 90\.0 in this model"):
        Reward.resolve({**spec, "head_weights": {"90.0": 1.0}}, policy)(rollout)
    with pytest.raises(UserError, match="head_weights"):
        Reward.resolve({**spec, "head_weights": {"first": 1.0}}, policy)


def test_a_calibration_is_for_its_own_model(rows, tmp_path):
    causal, encdec = (Policy.load(model_path(kind), device="cpu") for kind in ("causal", "encdec"))
    calibrate(causal, rows).save(tmp_path / "weights.yaml")
    with pytest.raises(UserError, match="was made for llama 4x144, 6 heads"):
        Reward.resolve(f"calibrated:{tmp_path / 'weights.yaml'}", encdec)
    (tmp_path / "other.yaml").write_text("weights: {overlap: 1}\n")
    with pytest.raises(UserError, match="is no calibration"):
        Reward.resolve(f"calibrated:{tmp_path / 'other.yaml'}", causal)
    document = yaml.safe_load((tmp_path / "weights.yaml").read_text())
    for version in (2, None):
        (tmp_path / "later.yaml").write_text(yaml.safe_dump({**document, "format": version}))
        with pytest.raises(UserError, match=f"has format {version}, and this version reads 1"):
            Reward.resolve(f"calibrated:{tmp_path / 'later.yaml'}", causal)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        Reward.resolve(f"calibrated:{tmp_path / 'none.yaml'}", causal)


@pytest.mark.parametrize("family", ["llama", "bart", "t5", "t5gemma"])
def test_the_kind_of_a_model_tells_its_decoder_and_its_heads(family):
    # bart has 2 encoder layers and 3 decoder layers; t5gemma keeps both in configs of their own.
    assert Policy(build(family), tokenizer()).kind == f"{family} 3x32, 4 heads, vocabulary 64"


def test_without_scikit_learn_the_way_to_get_it_is_told(policy, rows, monkeypatch):
    monkeypatch.setattr("adhere.preferences.calibrate.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adhere\[calibrate\]"):
        calibrate(policy, rows)
    assert util.find_spec("sklearn") is not None


def test_too_few_pairs_are_refused(policy, rows):
    with pytest.raises(UserError, match="3 pairs cannot be cross-validated"):
        calibrate(policy, rows[:3])
    same = [Row(rows[0].prompt, chosen="a", rejected="b")] * 6
    with pytest.raises(UserError, match="cannot be cross-validated"):
        calibrate(policy, same)


def test_what_is_suggested_is_least_sure_and_different(policy, rows):
    reward = Reward.named("attention", policy)
    asked = suggest(policy, reward, rows, SuggestConfig(suggest=4, max_new_tokens=8, batch_size=5))
    margins = [pair["margin"] for pair in asked]
    assert 0 < len(asked) <= 4 and margins == sorted(margins) and min(margins) >= 0
    assert len({pair["prompt"] for pair in asked}) == len(asked)
    assert all(pair["response_a"] != pair["response_b"] for pair in asked)


def test_a_prompt_given_twice_is_asked_about_once(policy, rows):
    reward = Reward.named("attention", policy)
    asked = suggest(policy, reward, [*rows, *rows], SuggestConfig(max_new_tokens=8))
    assert len({pair["prompt"] for pair in asked}) == len(asked)


def test_train_and_audit_take_a_calibrated_reward(rows, tmp_path, capsys):
    weights, prompts = tmp_path / "weights.yaml", tmp_path / "prompts.jsonl"
    calibrate(Policy.load(model_path("causal"), device="cpu"), rows).save(weights)
    prompts.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows[:6]))
    shared = ["--model", str(model_path("causal")), "--device", "cpu", "--prompts", str(prompts)]
    reward = ["--reward", f"calibrated:{weights}"]
    audit = ["audit", *shared, *reward, "--output", str(tmp_path / "audit")]
    assert main(audit) in (0, 3)  # 3: it found the reward gameable
    assert (tmp_path / "audit" / "audit.json").exists()
    steps = ["--steps", "1", "--num-samples", "2", "--max-new-tokens", "6", "--output", str(tmp_path / "run")]
    assert main(["train", *shared, *reward, *steps]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(row["reward"])
    wrong = ["score", "--model", str(model_path("encdec")), "--device", "cpu", "--input", str(prompts), *reward]
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "where ?", "response": "there"}) + "\n")
    wrong[wrong.index("--input") + 1] = str(tmp_path / "in.jsonl")
    assert main([*wrong, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "was made for llama" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_what_must_not_be_read_or_overwritten_is_told(rows, tmp_path, capsys):
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "weights.yaml"
    fit_them = ["calibrate", "--model", str(model_path("causal")), "--pairs", str(pairs), "--output", str(output)]
    pairs.write_text('{"prompt": "q", "chosen": "x"}\n')
    assert main(fit_them) == 2 and "pairs.jsonl:1: no `chosen` and `rejected`" in capsys.readouterr().err
    pairs.write_text('{"prompt": "q", "chosen": "x", "rejected": "y", "tie": true}\n')
    assert main([*fit_them, "--device", "cpu"]) == 2 and "0 pairs cannot be" in capsys.readouterr().err
    assert not output.exists()
    pairs.write_text(json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"}) + "\n")
    output.write_text("mine")
    assert main(fit_them) == 2 and "already exists" in capsys.readouterr().err and output.read_text() == "mine"


def test_from_the_command_line(rows, tmp_path, capsys):
    pairs, model = tmp_path / "pairs.jsonl", ["--model", str(model_path("causal")), "--device", "cpu"]
    written = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*written, {**written[0], "tie": True}]))
    weights = tmp_path / "weights.yaml"
    assert main(["calibrate", *model, "--pairs", str(pairs), "--output", str(weights), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 12
    scored = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    given = [{"prompt": row.prompt, "response": said} for row in rows for said in (row.chosen, row.rejected)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    assert main(["score", *model, *scored, "--reward", f"calibrated:{weights}"]) == 0
    asked = [
        "--suggest",
        "2",
        "--prompts",
        str(pairs),
        "--max-new-tokens",
        "8",
        "--output",
        str(tmp_path / "ask.jsonl"),
    ]
    assert main(["calibrate", *model, *asked, "--reward", f"calibrated:{weights}"]) == 0
    assert len(read_rows(tmp_path / "ask.jsonl")) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "give one of --pairs, --suggest and --answer"),
        (["--model", "m", "--pairs", "p", "--suggest", "3"], "give one of --pairs, --suggest and --answer"),
        (["--pairs", "p"], "no --model"),
        (["--model", "m", "--suggest", "3"], "--suggest needs --prompts"),
        (["--model", "m", "--suggest", "0", "--prompts", "p"], "suggest is 0"),
        (["--model", "m", "--pairs", "none.jsonl"], "none.jsonl"),
        (["--answer", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_usage_is_one_clear_line(options, message, tmp_path, capsys):
    assert main(["calibrate", *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# The page that asks

ASKED = [
    {"prompt": f"q{n} <script>alert(1)</script>", "response_a": f"a{n}", "response_b": f"b{n}", "margin": 0.1}
    for n in range(3)
]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "ask.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return str(path)


def post(url, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/answer", data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def raw(server, request):
    """The status line of a request that no client library would send."""
    with socket.create_connection(server.server_address, timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(4096).split(b"\r\n")[0]


def test_a_session_writes_each_answer_and_ends_when_all_are_given(asked, tmp_path):
    output = tmp_path / "pairs.jsonl"
    with serve(Session.open(asked, output)) as server:
        waiting = threading.Thread(target=server.wait)
        waiting.start()
        with urllib.request.urlopen(server.url, timeout=5) as reply:
            page = reply.read().decode()
        nonce = re.search(r'<script nonce="(.+?)">', page)[1]
        assert f"script-src 'nonce-{nonce}'; connect-src 'self'" in page
        assert "Pair 1 of 3" in page and "&lt;script&gt;alert" in page and "<script>alert" not in page
        assert post(server.url, {"number": 0, "choice": "b"}) == 200
        assert read_rows(output)[0].chosen == "b0"
        assert post(server.url, {"number": 0, "choice": "a"}) == 409  # pressed twice
        assert post(server.url, {"number": 1, "choice": "undo"}) == 200
        assert output.read_text() == ""
        assert post(server.url, {"number": 0, "choice": "a"}) == 200
        assert post(server.url, {"number": 1, "choice": "tie"}) == 200
        assert post(server.url, {"number": 2, "choice": "b"}) == 200
        waiting.join(5)
        assert not waiting.is_alive()
    kept = read_rows(output)
    assert [(row.chosen, row.rejected) for row in kept] == [("a0", "b0"), ("a1", "b1"), ("b2", "a2")]
    assert [row.fields.get("tie") for row in kept] == [None, True, None]


def test_a_session_goes_on_where_it_stopped_and_knows_its_pairs(asked, tmp_path):
    output = tmp_path / "pairs.jsonl"
    assert Session.open(asked, output).answer(0, "a")
    again = Session.open(asked, output)
    assert again.done == 1 and again.left == 2
    for other in (
        {"prompt": "another", "chosen": "x", "rejected": "y"},
        {"prompt": ASKED[0]["prompt"], "chosen": "x", "rejected": "y"},  # asked again of new samples
    ):
        output.write_text(json.dumps(other) + "\n")
        with pytest.raises(UserError, match="holds answers to other pairs"):
            Session.open(asked, output)


def test_only_the_page_itself_may_answer(asked, tmp_path):
    with serve(Session.open(asked, tmp_path / "pairs.jsonl")) as server:
        assert server.server_address[0] == "127.0.0.1"
        elsewhere = server.url.rsplit("/", 1)[0] + "/guess"
        assert post(elsewhere, {"number": 0, "choice": "a"}) == 403
        assert post(server.url, {"number": 0, "choice": "a"}, {"Host": "evil.example"}) == 403
        assert post(server.url, b"x" * (BODY_LIMIT + 1)) == 413
        assert post(server.url, b"not json") == 400
        assert post(server.url, b"\xff\xfe") == 400
        assert post(server.url, [1]) == 400
        assert post(server.url, {"number": 0, "choice": "c"}) == 400
        assert post(server.url, {"number": 0, "choice": ["a"]}) == 400
        assert post(server.url, b"[" * BODY_LIMIT) == 400
        assert post(server.url, {"number": True, "choice": "a"}) == 400
        assert post(server.url, {"number": -1, "choice": "a"}) == 409
        assert post(server.url, {"number": 0, "choice": "a"}) == 200  # it lives
    assert len(read_rows(tmp_path / "pairs.jsonl")) == 1


@pytest.mark.parametrize(("length", "status"), [(b"\xb2", b"413"), (b"-1", b"413"), (b"", b"413"), (b"x", b"413")])
def test_a_length_that_is_no_number_is_refused(asked, tmp_path, length, status):
    with serve(Session.open(asked, tmp_path / "pairs.jsonl")) as server:
        head = f"POST /{server.token}/answer HTTP/1.1\r\nHost: 127.0.0.1:1\r\n".encode()
        assert status in raw(server, head + b"Content-Length: " + length + b"\r\n\r\n")


def test_a_path_that_is_no_ascii_is_refused(asked, tmp_path):
    with serve(Session.open(asked, tmp_path / "pairs.jsonl")) as server:
        assert b"403" in raw(server, b"GET /\xe9 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")


def test_the_last_answer_before_the_end_can_be_taken_back_after_a_restart(asked, tmp_path):
    output = tmp_path / "pairs.jsonl"
    session = Session.open(asked, output)
    assert session.answer(0, "a") and session.answer(1, "b")
    again = Session.open(asked, output)
    assert again.undo() and again.undo() and not again.undo() and output.read_text() == ""


def test_rows_that_are_no_pairs_are_told_by_line(tmp_path):
    path = tmp_path / "ask.jsonl"
    path.write_text('{"prompt": "q", "response_a": "x"}\n')
    with pytest.raises(UserError, match=r"ask\.jsonl:1: no `response_a` and `response_b`"):
        Session.open(str(path), tmp_path / "out")
