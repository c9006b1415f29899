"""Named rewards: configs and user functions that are refused, and in which words; and on real
tiny models, causal and encoder–decoder: order, groups, scorer, what is captured, contrast."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from adhere.errors import RunFailed, UserError
from adhere.model.logits import SPREAD
from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.reward import signals
from adhere.reward.custom import user_function
from adhere.reward.gates import GATE_FUNCTIONS
from adhere.reward.group import GATE_MARGIN
from adhere.reward.heads import CopyHeads
from adhere.reward.named import GATES, NAMED, SALIENCES, SIGNALS, RewardConfig, config_of
from adhere.reward.reward import FORMULAS, Reward
from adhere.reward.salience import SALIENCE
from adhere.toy import model_path
from tests.families import save
from tests.test_signals import evidence_of, padded, reads

# --- what is refused, and in which words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("atention", "unknown reward 'atention'; did you mean attention"),
        ({"weights": {"coverag": 1.0}}, "unknown signal 'coverag'; did you mean coverage"),
        ({"weights": {}}, "`weights` is empty"),
        ({"salience": "idf"}, "`weights` is empty"),
        ({"weights": ["coverage"]}, "`weights` is empty or no mapping"),
        ({"weights": {"coverage": "1e-3"}}, "weight of coverage is '1e-3'; write a finite number"),
        ({"weights": {"coverage": float("nan")}}, "weight of coverage is nan"),
        ({"weights": {"coverage": True}}, "weight of coverage is True"),
        ({"weights": {"coverage": 1}, "salience": "tfidf"}, "unknown salience 'tfidf'; did you mean idf"),
        ({"weights": {"coverage": 1}, "scorer": "judge"}, "unknown scorer 'judge'; choose one of policy, reference"),
        ({"weights": {"coverage": 1}, "normalise": "groups"}, "unknown normalise 'groups'; did you mean group"),
        ({"weights": {"coverage": 1}, "gates": ["end"]}, "unknown gate 'end'; did you mean ended"),
        ({"weights": {"coverage": 1}, "gates": "ended"}, r"`gates` is 'ended'; write a list: gates: \[ended\]"),
        (
            {"weights": {"coverage": 1}, "learn_from": "ended"},
            r"`learn_from` is 'ended'; write a list: learn_from: \[ended\]",
        ),
        ({"weights": {"coverage": 1}, "ngram": 0}, "`ngram` is 0; write a whole number, 1 or more"),
        ({"weights": {"coverage": 1}, "ngram": 2.0}, "`ngram` is 2.0"),
        ({"weights": {"coverage": 1}, "focus_clamp": 1.0}, "`focus_clamp` is 1.0; write a number from 0 to below 1"),
        ({"weights": {"coverage": 1}, "logprob_floor": "-6"}, "`logprob_floor` is '-6'"),
        ({"weights": {"coverage": 1}, "shuffle": 1}, "`shuffle` is 1; write true or false"),
        ({"weights": {"coverage": 1}, "renormalise": "yes"}, "`renormalise` is 'yes'"),
        ({"weigths": {"coverage": 1}}, "unknown reward option 'weigths'; did you mean weights"),
        ({"weights": {"coverag": 1}, "ngram": -1}, "'coverag'.*; reward: `ngram` is -1"),  # all at once
        (":function", "cannot be imported"),
        ("preference:nowhere", "nowhere: no reward model"),
        ("calibrated:nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_reward_is_refused_with_what_to_write(spec, message, causal):
    with pytest.raises(UserError, match=message):
        Reward.resolve(spec, causal)


def test_a_mapping_as_yaml_gives_it_becomes_a_config():
    config = config_of({"weights": {"coverage": 1, "repetition": -0.5}, "gates": ["ended"], "salience": "idf"})
    assert config == RewardConfig({"coverage": 1, "repetition": -0.5}, salience="idf", gates=("ended",))
    assert config_of("paper") is NAMED["paper"]


USER = """
import torch
def good(evidence): return evidence.reading.attention.sum((1, 2)) + evidence.reading.logprobs.sum(-1)
def lengthy(evidence): return evidence.reading.rollout.lengths
def scalar(evidence): return torch.tensor(1.0)
def infinite(evidence): return torch.full((len(evidence.reading.rollout),), float("inf"))
def words(evidence): return "long"
number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_adhere_reward.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "my_adhere_reward"
    assert sys.path == path
    sys.modules.pop("my_adhere_reward", None)


def test_a_users_function_from_the_working_directory_reads_the_replay(user_module, causal):
    spec = f"{user_module}:good"
    reward = Reward.resolve({"weights": {spec: 2.0, "length": 1.0}, "normalise": "none"}, causal)
    scores = reward.score(["mary is in the garden", "w1 w2"], ["garden", "w1 w2"])
    reading = scores.reading
    expected = reading.attention.sum((1, 2)) + reading.logprobs.sum(-1)
    torch.testing.assert_close(scores.signals[spec], expected)
    torch.testing.assert_close(scores.reward, 2 * expected + torch.tensor([2.0, 3.0]))


def test_a_working_directory_that_is_on_the_path_keeps_its_place(user_module, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        path = list(sys.path)
        user_function(f"{user_module}:good")
        assert sys.path == path


def test_lists_of_yaml_are_taken_for_gates() -> None:
    config = config_of({"weights": {"coverage": 1}, "gates": ["ended"], "learn_from": ["supported"]})
    assert config.gates == ("ended",) and config.learn_from == ("supported",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lengthy", r"lengthy' returned torch.int64 \[2\]; return a finite float tensor of shape \[2\]"),
        ("scalar", r"scalar' returned torch.float32 \[\]"),
        ("infinite", "infinite' returned a value that is not finite"),
        ("words", "words' returned str"),
        ("number", "has no function 'number'"),
        ("absent", "has no function 'absent'"),
        ("", "has no function ''"),
    ],
)
def test_a_users_function_that_is_no_reward_is_named(user_module, causal, name, message):
    with pytest.raises(UserError, match=message):
        Reward.resolve(f"{user_module}:{name}", causal).score(["w1", "w2"], ["w1", "w2"])


# --- on real models ------------------------------------------------------------------------------------------------

PROMPTS = ["mary is in the garden . where is mary ?", "w3 w4 w5 the w6 ?"]
HEADS = CopyHeads(torch.full((3, 4), 0.5), "copying", 40, -0.5, "0" * 32)
RESPONSES = ["garden", "mary is in the garden", "w1 w1 w1 w1 w1"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return Policy.load(save("llama", tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="module", params=["llama", "t5"])
def policy(request, tmp_path_factory):
    return Policy.load(save(request.param, tmp_path_factory.mktemp(request.param)), device="cpu")


@pytest.fixture(scope="module")
def rollout(policy):
    return policy.sample(policy.encode(PROMPTS), 4, sampling=Sampling(max_new_tokens=8), seed=1)


@pytest.mark.parametrize("name", [n for n in NAMED if n != "exact"])
def test_every_named_reward_scores_a_sample(policy, rollout, name):
    scores = Reward.named(name, policy, HEADS)(rollout)
    assert scores.reward.shape == (8,) and scores.reward.isfinite().all()
    assert set(scores.signals) == set(NAMED[name].weights)
    # A signal is given as it is, before weight, normalising and gate.
    if scores.reading is not None and "coherence" in scores.signals:
        torch.testing.assert_close(
            scores.signals["coherence"], signals.masked_mean(scores.reading.logprobs, rollout.response_mask)
        )


DEFAULT = {"agreement": 10, "support": 5, "question_reliance": 0.5, "coherence": 1, "repetition": -5, "grounding": 0}


def test_the_default_reward_is_the_sum_of_its_signals_gated(policy):
    reward = Reward.named("attention", policy, HEADS)
    texts = ["garden", "in the garden", "w1 w2", "where is mary ?", "garden garden garden", ""]
    said, _ = reward.paired([PROMPTS[0]] * 6, texts)
    said = replace(said, ended=torch.tensor([True, True, True, True, False, True]))
    scores = reward(said)
    total = sum(weight * scores.signals[name] for name, weight in DEFAULT.items())
    passed = scores.reward[:4]
    torch.testing.assert_close(passed, total[:4])
    worst = min(passed.min().item(), passed.max().item() - GATE_MARGIN)  # what was cut off, and what is empty
    assert scores.reward[4:].tolist() == pytest.approx([worst] * 2)
    assert torch.equal(reward(said, training=True).reward, scores.reward)


@pytest.mark.parametrize("cut", [False, True])
def test_training_learns_nothing_from_a_group_of_which_nothing_is_supported(policy, cut):
    """Nor where the one supported response was cut off."""
    reward = Reward.named("attention", policy, HEADS)
    texts = ["w1 w2", "where is mary ?", "w3", "garden" if cut else "w4"]
    said, _ = reward.paired([PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, [*texts, "w4", "w1"])
    said = replace(said, ended=torch.tensor([True, True, True, not cut, True, True]))
    plain, taught = reward(said).reward, reward(said, training=True).reward
    assert len(set(plain[:3].tolist())) == 3
    assert taught[:4].tolist() == [plain[:4].min().item()] * 4
    assert torch.equal(taught[4:], plain[4:])  # a prompt that is all question has no context to be supported by


def test_without_a_context_no_response_is_held_back_for_want_of_support(policy):
    reward = Reward(RewardConfig({"coherence": 1.0}, normalise="none", gates=("supported",)), policy)
    scores = reward.score(["where is mary ?"] * 2, ["garden", "w1 w2"])
    torch.testing.assert_close(scores.reward, scores.signals["coherence"])


def test_z_scores_bring_each_signal_to_one_scale_within_its_group(policy, rollout):
    weights = {"grounding": 0.5, "coherence": 1.0, "repetition": -1.0}
    scores = Reward(RewardConfig(weights), policy, HEADS)(rollout)
    total = torch.zeros(8)
    for name, weight in weights.items():
        for rows in (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])):
            x = scores.signals[name][rows]
            if x.std(unbiased=False) > 1e-5:
                total[rows] += weight * (x - x.mean()) / x.std(unbiased=False)
    torch.testing.assert_close(scores.reward, total, atol=1e-3, rtol=1e-3)


def test_comprehensiveness_is_what_the_attended_context_does_for_the_response(policy):
    prompt, said = "w9 is in the w8 . w5 w6 . where is w9 ?", ["w8", "w7"]
    reward = Reward(RewardConfig({"comprehensiveness": 1.0}, normalise="none", ablate=0.4), policy, HEADS)
    scores = reward.score([prompt] * 2, said)
    reading = policy.read([prompt] * 2, said, copy_weights=HEADS.weights)
    rows = reading.copy_attention.sum(1) / reading.response_mask.sum(-1, keepdim=True)
    context = prompt.split(" ")[:9]
    start = int(reading.prompt_mask.shape[1]) - len(prompt.split(" ")) if not policy.is_encoder_decoder else 0
    mass = rows.sum(0)[start : start + 9]
    gone = mass.argsort(descending=True)[:4].tolist()  # ceil(0.4 × 9) tokens of the context
    rest = " ".join([word for n, word in enumerate(context) if n not in gone] + prompt.split(" ")[9:])
    without = policy.read([rest] * 2, said)
    expected = signals.masked_mean(reading.logprobs - without.logprobs, reading.response_mask)
    torch.testing.assert_close(scores.reward, expected, atol=1e-5, rtol=1e-4)


def test_scores_come_in_the_order_given_and_equal_prompts_form_a_group(policy):
    reward = Reward.resolve({"weights": {"coherence": 1.0, "coverage": 1.0}}, policy)
    together = reward.score([PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, RESPONSES * 2)
    order = [3, 0, 4, 1, 2, 5]
    mixed = reward.score([([PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)[i] for i in order], [(RESPONSES * 2)[i] for i in order])
    torch.testing.assert_close(mixed.reward, together.reward[order], atol=1e-3, rtol=1e-3)
    for name, value in together.signals.items():
        torch.testing.assert_close(mixed.signals[name], value[order])
    assert together.reading.rollout.responses == tuple(RESPONSES * 2)
    assert mixed.reading is None  # its rows would be in another order than the scores
    assert together.reward[:3].sum().item() == pytest.approx(0, abs=1e-4) and together.reward[:3].std() > 0.5


def test_an_empty_response_scores_and_in_z_scores_a_group_of_one_gets_zero(policy):
    alone = Reward(RewardConfig({"coherence": 1.0}), policy).score(PROMPTS, ["", "w3"])
    assert alone.reward.tolist() == [0, 0]
    scores = Reward.named("attention", policy, HEADS).score(PROMPTS, ["", "w3"])
    assert (scores.reward != 0).all()
    assert scores.signals["grounding"][0] == 0 and scores.signals["coherence"][0] < 0


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((["w1"], []), "1 prompts and 0 responses"),
        (([], []), "0 prompts and 0 responses"),
        ((["w1"], ["w1"], []), "1 prompts and 1 responses and 0 lists of answers"),
    ],
)
def test_lists_that_do_not_pair_are_refused_with_their_lengths(causal, arguments, counts):
    with pytest.raises(UserError, match=counts):
        Reward.named("length", causal).score(*arguments)


@pytest.mark.parametrize(
    ("weights", "options", "captured"),
    [
        (
            {"length": 1, "exact": 1, "majority": 1, "overlap": 1, "random": 1, "repetition": 1},
            {"salience": "self"},
            [],
        ),
        ({"coherence": 1}, {}, [(False, False)]),
        ({"length": 1}, {"logprob_floor": -6.0}, [(False, False)]),
        ({"coverage": 1}, {}, [(True, False)]),
        ({"focus": 1}, {"salience": "self"}, [(True, False)]),
        ({"grounding": 1}, {}, [(False, True)]),
        ({"grounding": 1, "coverage": 1}, {}, [(True, True)]),
        ({"contrast": 1}, {}, [(False, False)] * 2),
        ({"reliance": 1}, {}, [(False, False)] * 2),
        ({"question_reliance": 1}, {}, [(False, False)] * 2),
        ({"agreement": 1, "question_reliance": 1}, {}, [(False, True), (False, False)]),
    ],
)
def test_only_what_the_signals_read_is_captured(policy, monkeypatch, weights, options, captured):
    seen = []
    real = Policy.read

    def spy(self, rollout, *, attention=True, copy_weights=None, spread=SPREAD, question=None):
        seen.append((attention, copy_weights is not None))
        assert spread == ()  # nothing here reads entropy or certainty
        assert (question is not None) == ("agreement" in weights and copy_weights is not None)
        return real(self, rollout, attention=attention, copy_weights=copy_weights, spread=spread, question=question)

    monkeypatch.setattr(Policy, "read", spy)
    reward = Reward(RewardConfig(weights, **options), policy, HEADS)
    scores = reward.score(PROMPTS, ["garden", "w3"], [["Garden."], ["w4"]])
    assert seen == captured
    assert (scores.reading is None) == (not captured)
    if "exact" in weights:
        assert scores.signals["exact"].tolist() == [1, 0]


def test_every_signal_that_has_a_name_has_a_formula_and_every_salience_too():
    assert FORMULAS.keys() == SIGNALS.keys() and all(callable(formula) for formula in FORMULAS.values())
    assert tuple(SALIENCE) == SALIENCES and tuple(GATE_FUNCTIONS) == GATES


def test_the_reference_stays_and_the_policy_moves(tmp_path):
    policy = Policy.load(save("llama", tmp_path), device="cpu")
    fixed, moving = (
        Reward(RewardConfig({"coherence": 1.0}, scorer=scorer, normalise="none"), policy, reference=policy.reference())
        for scorer in ("reference", "policy")
    )
    before = fixed.score(PROMPTS, ["garden", "w3"]).reward
    torch.testing.assert_close(moving.score(PROMPTS, ["garden", "w3"]).reward, before)
    other = policy.reference()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    rollout = policy.respond(policy.encode(PROMPTS), ["garden", "w3"], torch.tensor([0, 1]))
    torch.testing.assert_close(fixed(rollout, other).reward, before)
    assert (moving(rollout, other).reward - before).abs().min() > 1e-3
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(fixed(rollout).reward, before)
    torch.testing.assert_close(moving(rollout).reward, moving(rollout, other).reward)


def test_contrast_compares_with_the_next_prompt_that_differs(policy):
    prompts = [PROMPTS[0], PROMPTS[1], "w9 the w8"]
    config = RewardConfig({"contrast": 1.0}, normalise="none")
    scores = Reward(config, policy).score(prompts, RESPONSES)
    mine, other = policy.read(prompts, RESPONSES), policy.read([*prompts[1:], prompts[0]], RESPONSES)
    expected = signals.masked_mean(mine.logprobs - other.logprobs, mine.response_mask)
    torch.testing.assert_close(scores.reward, expected, atol=1e-5, rtol=1e-4)


def test_reliance_compares_with_the_question_alone(policy):
    prompts = ["w9 is in the w8 . where is w9 ?", "where is w2 ?"]
    scores = Reward(RewardConfig({"reliance": 1.0}, normalise="none"), policy).score(prompts, RESPONSES[:2])
    mine = policy.read(prompts, RESPONSES[:2])
    alone = policy.read(["where is w9 ?", "where is w2 ?"], RESPONSES[:2])
    expected = signals.masked_mean(mine.logprobs - alone.logprobs, mine.response_mask)
    torch.testing.assert_close(scores.reward, expected, atol=1e-5, rtol=1e-4)
    assert scores.reward[0].abs() > 1e-3 and scores.reward[1].abs() < 1e-5


def test_contrast_with_a_single_prompt_is_refused(policy):
    with pytest.raises(UserError, match="contrast needs another prompt"):
        Reward.resolve({"weights": {"contrast": 1}}, policy).score([PROMPTS[0]] * 2, ["w1", "w2"])


def test_shuffling_changes_where_and_not_what(policy, rollout):
    plain, moved = (Reward.named(name, policy, HEADS)(rollout) for name in ("attention", "shuffled"))
    for name in ("coherence", "support", "question_reliance"):
        torch.testing.assert_close(moved.signals[name], plain.signals[name])
    for name in ("agreement", "grounding"):
        assert (moved.signals[name] != plain.signals[name]).any()


def test_renormalising_reads_rows_over_the_users_tokens(policy):
    weights = {"coverage": 1.0, "lookback": 1.0}
    one = Reward(RewardConfig(weights, salience="all", renormalise=True, normalise="none"), policy)
    scores = one.score(PROMPTS, ["garden", "w3"])
    torch.testing.assert_close(scores.signals["coverage"], torch.ones(2))  # every user token counts, rows sum to 1
    if not policy.is_encoder_decoder:
        assert (scores.signals["lookback"] < 0.999).all()


def test_a_token_under_the_log_prob_floor_closes_the_gate(policy):
    free = Reward(RewardConfig({"length": 1.0}, normalise="none", logprob_floor=-1000.0), policy)
    prompts, responses = [PROMPTS[0]] * 3, ["garden", "w7 mary w1", "mary w5 w9 w2 w3"]
    scores = free.score(prompts, responses)
    assert scores.reward.tolist() == [2, 4, 6]
    lowest = scores.reading.logprobs.amin(-1)
    floor = (lowest.min().item() + lowest.max().item()) / 2
    gated = Reward(replace(free.config, logprob_floor=floor), policy).score(prompts, responses)
    kept = [length for length, low in zip([2, 4, 6], lowest.tolist(), strict=True) if low >= floor]
    assert 0 < len(kept) < 3
    expected = [
        length if low >= floor else min(min(kept), max(kept) - GATE_MARGIN)
        for length, low in zip([2, 4, 6], lowest.tolist(), strict=True)
    ]
    assert gated.reward.tolist() == expected


def test_options_reach_their_signals(policy):
    def value(signal, **options):
        config = RewardConfig({signal: 1.0}, normalise="none", **options)
        return Reward(config, policy).score([PROMPTS[0]], ["w1 w2 w1 w2"]).reward.item()

    # With the end token: w1 w2 w1 w2 <eos>. Bigrams 12 21 12 2e: one of four repeated. Words: two of five.
    assert value("repetition") == pytest.approx(1 / 4)
    assert value("repetition", ngram=1) == pytest.approx(2 / 5)
    assert value("focus", focus_clamp=0.99) <= 0.01 + 1e-6 < value("focus")


def test_a_scorer_that_answers_nan_fails_the_run_and_names_the_signal(tmp_path):
    policy = Policy.load(save("llama", tmp_path), device="cpu")
    with torch.no_grad():
        policy.network.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="signal coherence is not finite"):
        Reward.resolve({"weights": {"coherence": 1}}, policy).score(PROMPTS, ["w1", "w2"])


def test_a_weight_of_zero_reports_a_signal_and_pays_nothing(policy):
    config = RewardConfig({"coherence": 1.0, "length": 0.0}, normalise="none")
    scores = Reward(config, policy).score(PROMPTS, ["garden", "w3"])
    assert scores.signals["length"].tolist() == [2, 2]
    assert torch.equal(scores.reward, scores.signals["coherence"])


@given(reads())
@settings(max_examples=20, deadline=None)
def test_padding_changes_no_signal_of_the_table(evidence):
    rollout = evidence.reading.rollout
    known = replace(rollout, prompts=replace(rollout.prompts, answers=(("a",),) * 2))
    evidence = replace(evidence, reading=replace(evidence.reading, rollout=known))
    wide = padded(evidence, 1, 2, 3)
    for name, formula in FORMULAS.items():
        torch.testing.assert_close(formula(wide), formula(evidence), msg=name)
        assert formula(evidence).dtype == torch.float32 and formula(evidence).shape == (2,)


def test_every_signal_of_the_table_says_zero_of_an_empty_response():
    evidence = evidence_of([[5]], [[-1]], texts=[""], answers=[["a"]])
    values = {name: formula(evidence).item() for name, formula in FORMULAS.items() if name != "random"}
    assert values == dict.fromkeys(values, 0.0)


@pytest.mark.parametrize("kind", ["causal", "encdec"])
def test_the_default_pays_a_response_the_same_alone_and_in_its_group(kind):
    """What a gate holds back is paid by its group; every other response by itself."""
    policy = Policy.load(model_path(kind), device="cpu")
    reward = Reward.named("attention", policy)
    story = "mary went to the garden . john is in the office . where is mary ? answer :"
    texts = ["garden", "", "the office", "john is in the office .", "where is mary ?"]
    together = reward.score([story] * len(texts), texts).reward.tolist()
    assert max(together) - min(together) > 1
    for text, value in zip(texts, together, strict=True):
        if text:
            assert reward.score([story], [text]).reward.item() == pytest.approx(value, abs=1e-4)
