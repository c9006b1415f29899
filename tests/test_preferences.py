"""Pairs without people, reward models fitted to pairs, and the reward that reads them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adhere.cli import main
from adhere.data import Row, read_rows
from adhere.errors import UserError
from adhere.learn.preference import PreferenceConfig, bradley_terry_loss, fit, preferred, split
from adhere.measure.preferences import CORRUPTIONS, PairConfig, make_pairs
from adhere.model.policy import Policy
from adhere.reward.preference import PreferenceModel, pair_ids
from adhere.reward.reward import Reward
from adhere.toy import make_rows, model_path
from tests.families import save

EASY = [
    # A rule that a tiny network learns: w1 is good, w2 is bad, whatever the prompt.
    Row(f"w{i} is in the w{i + 3} . where is w{i} ?", chosen=f"w1 w{i}", rejected=f"w2 w{i}", where=f"row {i}")
    for i in range(3, 27)
]


@pytest.fixture(scope="module", params=["llama", "t5"])
def backbone(request, tmp_path_factory):
    return str(save(request.param, tmp_path_factory.mktemp("backbone") / "model"))


def settings(backbone, folder):
    rate = {"steps": 60, "batch_size": 8, "learning_rate": 3e-3}
    return PreferenceConfig(backbone, str(folder), **rate, held_out=0.2, device="cpu")


@pytest.fixture(scope="module")
def fitted(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "reward"
    return folder, fit(settings(backbone, folder), EASY)


def test_the_loss_is_that_of_bradley_and_terry():
    # σ(1) = 0.7311 → 0.3133; σ(0) = ½ → 0.6931; mean 0.5032.
    loss = bradley_terry_loss(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0]))
    assert math.isclose(float(loss), 0.5032, abs_tol=1e-4)


def test_a_reward_model_learns_a_rule_and_says_so_on_prompts_it_never_saw(fitted):
    folder, found = fitted
    assert found.pairs + len(found.accuracy) == len(EASY) and len(found.accuracy) == 5
    assert sum(found.accuracy) / len(found.accuracy) > 0.9
    card = json.loads((folder / "preference.json").read_text())
    assert card["pairs"] == found.pairs and card["accuracy"] > 0.9


def test_what_was_saved_scores_as_what_was_fitted(fitted, backbone, tmp_path):
    folder, found = fitted
    again = fit(settings(backbone, tmp_path / "again"), EASY)
    assert again == found
    prompts, responses = ["w1 is in the w4 .", "w5 ?"], ["w1", "w2 w3 w4"]
    one, two = (PreferenceModel.load(path).score(prompts, responses) for path in (folder, tmp_path / "again"))
    torch.testing.assert_close(one, two)
    alone = torch.cat([PreferenceModel.load(folder).score([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


def test_as_a_reward_it_reads_text_and_prefers_what_it_learned(fitted, backbone):
    folder, _ = fitted
    policy = Policy.load(backbone, device="cpu")
    reward = Reward.resolve(f"preference:{folder}", policy)
    assert reward.reference is None and not reward.reads_attention
    prompt = "w3 is in the w9 . where is w3 ?"
    good, bad = reward.score([prompt, prompt], ["w1 w3", "w2 w3"]).reward.tolist()
    assert good > bad
    mixed = Reward.resolve({"weights": {f"preference:{folder}": 2.0, "repetition": -1.0}, "normalise": "none"}, policy)
    assert mixed.score([prompt], ["w1 w3"]).reward[0] == pytest.approx(2 * good, abs=1e-5)


def test_training_raises_it(fitted, backbone, tmp_path, capsys):
    folder, _ = fitted
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in EASY))
    options = [
        "--steps",
        "2",
        "--prompts-per-step",
        "2",
        "--num-samples",
        "2",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
    ]
    arguments = ["--model", backbone, "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    assert main(["train", *arguments, "--reward", f"preference:{folder}", *options]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert f"signals/preference:{folder}" in row


def test_a_prompt_is_on_one_side_of_the_split():
    rows = [Row(f"p{i % 7}", chosen="a", rejected="b") for i in range(30)]
    known, kept = split(rows, 0.3, 0)
    assert len(known) + len(kept) == 30 and not {row.prompt for row in known} & {row.prompt for row in kept}
    assert len({row.prompt for row in kept}) == 2


def test_ids_are_prompt_response_and_one_end():
    tokenizer = Policy.load(model_path("encdec"), device="cpu").tokenizer
    ids = pair_ids(tokenizer, "where is mary ?", "kitchen")
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).split()[-1] == "kitchen"


@pytest.mark.parametrize("kind", ["causal", "encdec"])
def test_made_pairs_prefer_the_answer_and_refuse_its_corruption(kind):
    policy = Policy.load(model_path(kind), device="cpu")
    stories = make_rows("agree", "train", 9, seed=3)
    rows = [Row(row["prompt"], answers=tuple(row["answers"])) for row in stories]
    config = PairConfig(max_new_tokens=8, batch_size=4, pairs_per_prompt=2)
    pairs = make_pairs(policy, rows, config)
    assert pairs == make_pairs(policy, rows, config)
    answers = {row["prompt"]: row["answers"][0] for row in stories}
    assert len(pairs) > 9
    for pair in pairs:
        assert pair["chosen"] == answers[pair["prompt"]] != pair["rejected"] and pair["corruption"] in CORRUPTIONS
    own = make_pairs(policy, [Row(row.prompt) for row in rows], config)
    assert {pair["prompt"] for pair in own} <= set(answers)


def test_make_and_fit_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("trl")
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in make_rows("agree", "train", 8)))
    model = str(model_path("causal"))
    make = [
        "--model",
        model,
        "--device",
        "cpu",
        "--prompts",
        str(prompts),
        "--output",
        str(pairs),
        "--max-new-tokens",
        "8",
    ]
    assert main(["preferences", "make", *make, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == len(read_rows(pairs, need=("chosen", "rejected"))) == sum(found["corruptions"].values())
    fit_to = [
        "--model",
        model,
        "--pairs",
        str(pairs),
        "--output",
        str(tmp_path / "reward"),
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    assert main(["preferences", "fit", *fit_to, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] > 0
    assert main(["preferences", "fit", *fit_to]) == 2
    assert "already holds a reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chosen": "best"}, "unknown `chosen`"), ({"pairs_per_prompt": 0}, "pairs_per_prompt is 0")],
)
def test_options_of_pairs_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        PairConfig(**options)


def test_bad_input_is_told(tmp_path, backbone):
    policy = Policy.load(backbone, device="cpu")
    with pytest.raises(UserError, match="two prompts or more"):
        make_pairs(policy, EASY[:1])
    with pytest.raises(UserError, match="row 3: no `answers` and no `reference`"):
        make_pairs(policy, EASY, PairConfig(chosen="answer"))
    with pytest.raises(UserError, match="holds no config"):
        fit(PreferenceConfig(str(tmp_path), str(tmp_path / "x")), EASY)
    with pytest.raises(UserError, match="no pairs to learn from"):
        fit(PreferenceConfig(backbone, str(tmp_path / "x")), [])
    with pytest.raises(UserError, match="no reward model"):
        Reward.resolve(f"preference:{tmp_path}", policy)
    with pytest.raises(UserError, match="held_out is 1"):
        PreferenceConfig(backbone, "x", held_out=1)
    assert not (tmp_path / "x").exists()


def test_a_pair_too_long_is_refused_rather_than_cut(tmp_path):
    llama = str(save("llama", tmp_path / "model"))
    long = [Row("w1 " * 5000, chosen="w1", rejected="w2"), Row("w2", chosen="w1", rejected="w2")]
    with pytest.raises(UserError, match="reward model's context holds"):
        fit(PreferenceConfig(llama, str(tmp_path / "x"), device="cpu"), long)


def test_ties_are_half_right(fitted):
    model = PreferenceModel.load(fitted[0])
    assert preferred(model, [Row("w1 ?", chosen="w3", rejected="w3")]) == [0.5]
