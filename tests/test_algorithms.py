"""Algorithms: hand-worked targets, TRL's trainers on one rollout, micro-batches that add up, adaptive KL, options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adhere.errors import UserError
from adhere.learn import advantages
from adhere.learn.algorithms import FORMULAS, loss_of, next_baseline, next_kl_coef, sampled_kl, with_advantages
from adhere.learn.batch import Batch, Outputs, Totals
from adhere.learn.settings import DPO, GRPO, PPO, RLOO, Algorithm, Reinforce
from adhere.options import docs_of
from adhere.types import Chunk
from tests.families import save

INF, NAN = float("inf"), float("nan")
EVERY = [PPO(), PPO(kl_in="loss"), Reinforce(), Reinforce(kl_in="loss"), RLOO(), RLOO(kl_in="loss"), DPO()]
EVERY += [GRPO(), GRPO(kl_in="reward"), GRPO(scale_rewards="batch"), GRPO(loss="grpo", epsilon_high=0.28)]
EVERY += [GRPO(loss="dr_grpo", scale_rewards="none"), GRPO(loss="gspo", epsilon=0.1), GRPO(loss="cispo")]
MASK = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
LOGPROBS = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, -1.0], [-1.0, -1.0]])
REFERENCE = torch.tensor([[-2.0, -2.0], [-2.0, 0.0], [-2.0, -3.0], [-1.0, -1.0]])


def batch(**changes):
    """Two prompts with two responses each. KL of the responses: 1, 1, −1 + 2 = 1, 0."""
    settings = {
        "rewards": torch.tensor([1.0, 3.0, 4.0, 0.0]),
        "group": torch.tensor([0, 0, 1, 1]),
        "mask": MASK,
        "logprobs": LOGPROBS,
        "ref_logprobs": REFERENCE,
        "values": torch.zeros(4, 2),
        "kl_coef": 0.5,
        "totals": Totals(7, 4, 2),
        "max_new_tokens": 5,
    }
    return Batch(**{**settings, **changes})


def some_batch(seed=0, padding=0.0):
    """Groups of 3, 1 and 4 responses of 0 to 6 tokens, with the log-probs of a later policy: (batch, now)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2, 6, 3, 1, 4, 4, 0, 5])
    mask = torch.arange(6) < lengths[:, None]

    def noise(scale=1.0):
        return torch.randn(8, 6, generator=generator, dtype=torch.float64) * scale

    old = -noise().abs()
    scored = Batch(
        rewards=noise()[:, 0],
        group=torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]),
        mask=mask,
        logprobs=old.masked_fill(~mask, padding),
        ref_logprobs=(old + noise(0.3)).masked_fill(~mask, padding),
        values=noise().masked_fill(~mask, padding),
        kl_coef=0.1,
        totals=Totals(int(mask.sum()), 8, 3),
        max_new_tokens=7,
    )
    assert scored.values is not None
    now = ((old + noise(0.3)).masked_fill(~mask, padding), (scored.values + noise(0.3)).masked_fill(~mask, padding))
    return scored, now


def said(logprobs, values=None):
    """What the policy says now; entropy is reported and enters no loss."""
    return Outputs(logprobs, torch.zeros_like(logprobs), values)


def losses_of(algorithm, scored, now, pieces):
    """Loss, metrics and the two gradients, summed over `pieces` of rows, each cut to its longest response."""
    logprobs, values = (tensor.clone().requires_grad_() for tensor in now)
    batch = with_advantages(algorithm, scored)
    total, metrics = 0.0, {}
    for rows in pieces:
        columns = slice(0, max(1, int(scored.mask[rows].sum(-1).max())))
        part = batch.part(Chunk(None, rows, columns, slice(None)))
        loss, own = loss_of(algorithm, part, said(logprobs[rows, columns], values[rows, columns]))
        loss.backward()
        total += float(loss.detach())
        metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in own.items()}
    return total, metrics, logprobs.grad, torch.zeros_like(values) if values.grad is None else values.grad


WHOLE = [slice(0, 8)]


@pytest.mark.parametrize("algorithm", EVERY, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up_to_the_batch(algorithm, seed):
    scored, now = some_batch(seed)
    one, metrics, *gradients = losses_of(algorithm, scored, now, WHOLE)
    for pieces in ([slice(0, 3), slice(3, 4), slice(4, 8)], [slice(0, 4), slice(4, 8)]):
        other, others, *parts = losses_of(algorithm, scored, now, pieces)
        assert other == pytest.approx(one, abs=1e-9)
        assert others == pytest.approx(metrics, abs=1e-6)
        for whole, part in zip(gradients, parts, strict=True):
            assert torch.allclose(whole, part, atol=1e-9)
    assert gradients[0].abs().max() > 1e-3, "there was a gradient to compare"


@pytest.mark.parametrize("algorithm", EVERY, ids=str)
@pytest.mark.parametrize("padding", [-INF, INF, NAN, 5.0])
def test_padding_changes_nothing(algorithm, padding):
    clean = losses_of(algorithm, *some_batch(), WHOLE)
    scored, now = some_batch(padding=padding)
    dirty = losses_of(algorithm, scored, now, WHOLE)
    assert math.isfinite(clean[0]) and clean[:2] == dirty[:2]
    for one, other in zip(clean[2:], dirty[2:], strict=True):
        assert torch.equal(one, other)
        assert other[~scored.mask].eq(0).all()
    targets = with_advantages(algorithm, scored)
    for tensor in (targets.advantages, targets.returns):
        assert tensor is None or tensor[~scored.mask].eq(0).all()


@pytest.mark.parametrize("algorithm", EVERY, ids=str)
def test_a_step_along_the_gradient_prefers_what_was_rewarded(algorithm):
    """The sign of it all: without KL, the better response of a group becomes likelier than the worse."""
    scored = batch(kl_coef=0.0)
    *_, gradient, _ = losses_of(algorithm, scored, (LOGPROBS, torch.zeros(4, 2)), [slice(0, 4)])
    step = -(gradient * MASK).sum(-1)
    assert step[1] > step[0] and step[2] > step[3]


@pytest.mark.parametrize("algorithm", [a for a in EVERY if not isinstance(a, DPO | PPO)], ids=str)
def test_equal_rewards_and_no_kl_leave_the_policy_alone(algorithm):
    scored = batch(rewards=torch.full((4,), 0.1), kl_coef=0.0)
    total, _, gradient, _ = losses_of(algorithm, scored, (LOGPROBS, torch.zeros(4, 2)), [slice(0, 4)])
    assert total == pytest.approx(0, abs=1e-7) and gradient.abs().max() < 1e-7


def test_kl_of_a_batch_by_hand():
    assert sampled_kl(batch()).tolist() == [1, 1, 1, 0]
    assert sampled_kl(batch(ref_logprobs=None)).tolist() == [0, 0, 0, 0]


def test_reinforce_targets_by_hand():
    # Rewards after KL: 1 − 0.5, 3 − 0.5, 4 − 0.5, 0 = 0.5, 2.5, 3.5, 0. Their mean: 6.5 / 4 = 1.625.
    assert with_advantages(Reinforce(), batch()).advantages[:, 0].tolist() == [-1.125, 0.875, 1.875, -1.625]
    assert with_advantages(Reinforce(), batch(baseline=1.0)).advantages[:, 0].tolist() == [-0.5, 1.5, 2.5, -1.0]
    # With the KL in the loss the rewards stay: mean 2.
    assert with_advantages(Reinforce(kl_in="loss"), batch()).advantages[:, 0].tolist() == [-1, 1, 2, -2]


def test_rloo_targets_by_hand():
    # 0.5 − 2.5 = −2 and 2; 3.5 − 0 = 3.5 and −3.5; every token of a response gets its advantage, padding none.
    assert with_advantages(RLOO(), batch()).advantages.tolist() == [[-2, -2], [2, 0], [3.5, 3.5], [-3.5, -3.5]]
    assert with_advantages(RLOO(kl_in="loss"), batch()).advantages[:, 0].tolist() == [-2, 2, 4, -4]


def test_grpo_targets_by_hand():
    # KL stays out of the rewards. Centred −1, 1, 2, −2; deviations with Bessel √2 and √8.
    found = with_advantages(GRPO(), batch()).advantages[:, 0].tolist()
    assert found == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2), 1 / math.sqrt(2), -1 / math.sqrt(2)], rel=1e-3)
    assert with_advantages(GRPO(scale_rewards="none"), batch()).advantages[:, 0].tolist() == [-1, 1, 2, -2]
    assert with_advantages(GRPO(scale_rewards="none", kl_in="reward"), batch()).advantages[:, 0].tolist() == [
        -1,
        1,
        1.75,
        -1.75,
    ]


def test_ppo_targets_by_hand():
    # γ = λ = 1 and values 0: the advantage of a token is the sum of rewards from it on. Token rewards −0.5 (log π − log
    # π_ref), the score at the last token:
    #   −0.5, 0 + 1 → 0.5, 1    −0.5 + 3 → 2.5    0.5, −1 + 4 → 3.5, 3    0, 0 → 0, 0
    targets = with_advantages(PPO(gae_lambda=1.0), batch())
    wanted = torch.tensor([[0.5, 1.0], [2.5, 0.0], [3.5, 3.0], [0.0, 0.0]])
    assert torch.equal(targets.returns, wanted)
    assert torch.allclose(targets.advantages, advantages.whiten(wanted, MASK))
    # With the KL in the loss only the score is left.
    plain = with_advantages(PPO(gae_lambda=1.0, kl_in="loss"), batch()).returns
    assert plain.tolist() == [[1, 1], [3, 0], [4, 4], [0, 0]]


def test_ppo_weighs_the_value_loss():
    scored, now = some_batch()
    one, other = (losses_of(PPO(value_coef=coef), scored, now, WHOLE) for coef in (0.0, 0.5))
    assert other[0] - one[0] == pytest.approx(0.5 * one[1]["value_loss"])
    assert one[3].eq(0).all() and other[3].abs().max() > 0


@pytest.mark.parametrize("algorithm", [a for a in EVERY if not isinstance(a, DPO)], ids=str)
def test_kl_enters_once_where_kl_in_says(algorithm):
    """In the loss it moves the loss and leaves the targets, in the reward the reverse; without a reference, neither."""
    scored, now = some_batch()
    free = replace(scored, kl_coef=0.0)
    moved = not torch.equal(with_advantages(algorithm, scored).advantages, with_advantages(algorithm, free).advantages)
    assert moved == (algorithm.kl_in == "reward")
    aimed = replace(scored, advantages=torch.zeros(8, 6), returns=scored.values)
    charged, nothing = (loss_of(algorithm, given, said(*now))[0] for given in (aimed, replace(aimed, kl_coef=0.0)))
    assert torch.equal(loss_of(algorithm, replace(aimed, ref_logprobs=None), said(*now))[0], nothing)
    gap = ((scored.ref_logprobs - now[0]) * scored.mask).sum(-1)
    assert gap.abs().sum() > 0
    assert bool(charged > nothing) == (algorithm.kl_in == "loss")


def test_the_kl_term_is_brought_together_as_the_policy_term():
    # Responses of 1 and 3 tokens; k3 is 0 in the first and 1 at every token of the second, where d = log π_ref − log π
    # solves e^d − d − 1 = 1. β = 0.1: over tokens 0.1 · 3/4, over means 0.1 · 1/2, over sums (RLOO) 0.1 · 3/2, over
    # sums by the 5 tokens that a response may have (Dr. GRPO) 0.1 · 3/10.
    reference = torch.tensor([[0.0], [1.1461932206205825]]).expand(2, 3)
    mask, zeros = torch.tensor([[True, False, False], [True, True, True]]), torch.zeros(2, 3)
    scored = Batch(zeros[:, 0], torch.tensor([0, 0]), mask, zeros, Totals(4, 2, 1), reference, kl_coef=0.1)
    scored = replace(scored, advantages=zeros, max_new_tokens=5)
    cases = [(GRPO(), 0.075), (GRPO(loss="grpo"), 0.05), (GRPO(loss="gspo"), 0.05), (GRPO(loss="cispo"), 0.075)]
    cases += [(GRPO(loss="dr_grpo"), 0.03), (Reinforce(kl_in="loss"), 0.075)]
    for algorithm, wanted in [*cases, (RLOO(kl_in="loss"), 0.15)]:
        assert loss_of(algorithm, scored, said(zeros))[0].item() == pytest.approx(wanted, rel=1e-5), algorithm


@pytest.mark.parametrize(
    ("loss", "wanted"), [("dapo", -7 / 4), ("grpo", -3 / 2), ("dr_grpo", -7 / 10), ("gspo", -3 / 2), ("cispo", 0.0)]
)
def test_each_loss_brings_the_policy_term_together_in_its_way(loss, wanted):
    # Responses of 1 and 3 tokens with advantages 1 and 2, ratio 1: −(1 + 3 · 2)/4 over tokens, −(1 + 2)/2 over
    # responses, −(1 + 3 · 2)/(2 · 5) where a response may have 5. CISPO's value is A log π, and log π is 0 here.
    mask, zeros = torch.tensor([[True, False, False], [True, True, True]]), torch.zeros(2, 3)
    gains = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    scored = Batch(zeros[:, 0], torch.tensor([0, 0]), mask, zeros, Totals(4, 2, 1), max_new_tokens=5, advantages=gains)
    assert loss_of(GRPO(loss=loss), scored, said(zeros))[0].item() == pytest.approx(wanted)


@pytest.mark.parametrize(("one", "other"), [("grpo", "gspo"), ("dapo", "cispo")])
def test_in_the_first_pass_losses_differ_in_what_they_are_a_mean_over_alone(one, other):
    """Every ratio is 1 then: docs/train.md says so."""
    scored, _ = some_batch()
    now = (scored.logprobs, scored.values)
    left, right = (losses_of(GRPO(loss=loss), scored, now, WHOLE)[2] for loss in (one, other))
    assert left.abs().max() > 1e-3 and torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        (GRPO(), (0.2, 0.2)),
        (GRPO(loss="gspo"), (3e-4, 4e-4)),
        (GRPO(loss="cispo"), (1.0, 4.0)),
        (GRPO(loss="cispo", epsilon_high=1.0), (1.0, 1.0)),
        (GRPO(loss="gspo", epsilon=0.01), (0.01, 0.01)),
        (GRPO(epsilon_high=0.28), (0.2, 0.28)),
        (GRPO(epsilon=0.1, epsilon_high=0.3), (0.1, 0.3)),
        (PPO(epsilon=0.1), (0.1, 0.1)),
        (RLOO(epsilon_high=0.3), (0.2, 0.3)),
    ],
    ids=str,
)
def test_epsilon_holds_above_too_unless_epsilon_high_says_otherwise(options, clip):
    assert options.clip == clip


def test_next_kl_coef_by_hand():
    # Error clip(KL/target − 1, ±0.2): 0.1 → 1 + 0.1 · 500/1000; far above and far below are held at 0.2.
    assert next_kl_coef(0.2, 2.2, 2.0, 500, 1000) == pytest.approx(0.2 * 1.05)
    assert next_kl_coef(0.2, 90.0, 2.0, 500, 1000) == pytest.approx(0.2 * 1.1)
    assert next_kl_coef(0.2, -5.0, 2.0, 500, 1000) == pytest.approx(0.2 * 0.9)
    assert next_kl_coef(0.2, 2.0, 2.0, 500) == 0.2


@given(st.floats(1e-6, 10), st.floats(-1e3, 1e3), st.floats(1e-3, 100), st.integers(1, 10**6), st.integers(1, 10**5))
def test_next_kl_coef_moves_the_right_way_and_stays_positive(coef, kl, target, responses, horizon):
    after = next_kl_coef(coef, kl, target, responses, horizon)
    assert 0.8 * coef * (1 - 1e-9) <= after <= 1.2 * coef * (1 + 1e-9)
    assert (after - coef) * (kl - target) >= 0


def test_next_baseline_by_hand():
    assert next_baseline(None, 3.0) == 3.0
    assert next_baseline(1.0, 3.0) == pytest.approx(1.2)
    assert next_baseline(0.0, 1.0, decay=0.5) == 0.5


def test_every_algorithm_has_its_formulas_and_says_what_it_needs():
    assert set(FORMULAS) == set(Algorithm.__args__)
    assert {cls.name for cls in FORMULAS} == {"ppo", "reinforce", "rloo", "grpo", "dpo"}
    assert {cls.name for cls in FORMULAS if cls.needs_value_head} == {"ppo"}
    assert {cls.name for cls in FORMULAS if cls.needs_reference} == {"dpo"}
    assert {cls.name for cls in FORMULAS if cls.compares_samples} == {"rloo", "grpo", "dpo"}
    assert {cls.name for cls in FORMULAS if cls().kl_coef} == {"ppo", "reinforce", "rloo", "grpo"}
    assert all(cls().epochs >= 1 for cls in FORMULAS)
    assert with_advantages(DPO(), batch()).advantages is None


@pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.name)
def test_every_option_says_what_it_does(cls):
    options = {field.name for field in dataclasses.fields(cls)}
    assert options == {name for name in docs_of(cls) if name in options}
    assert len(options) <= 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO(epochs=0), "epochs is 0; set it to 1 or above, at most 1,000,000"),
        (lambda: PPO(epsilon=0.0), "epsilon is 0.0; set it above 0, at most 1"),
        (lambda: RLOO(epsilon=1.5), "epsilon is 1.5; set it above 0, at most 1"),
        (lambda: GRPO(epsilon_high=-0.1), "epsilon_high is -0.1; set it above 0, finite"),
        (lambda: PPO(gamma=1.01), "gamma is 1.01; set it to 0 or above, at most 1"),
        (lambda: PPO(gae_lambda=NAN), "gae_lambda is nan; set it to 0 or above, at most 1"),
        (lambda: PPO(value_coef=-1.0), "value_coef is -1.0; set it to 0 or above, finite"),
        (lambda: PPO(value_clip=-1.0), "value_clip is -1.0; set it to 0 or above, finite"),
        (lambda: GRPO(scale_rewards="batches"), "unknown `scale_rewards` 'batches'; did you mean batch?"),
        (lambda: GRPO(loss="drgrpo"), "unknown `loss` 'drgrpo'; did you mean dr_grpo or grpo or gspo?"),
        (
            lambda: GRPO(loss="cispo", epsilon=0.2),
            "cispo has no lower bound, so it takes no epsilon; set epsilon_high",
        ),
        (lambda: Reinforce(kl_in="both"), "unknown `kl_in` 'both'; choose one of loss, reward"),
        (lambda: DPO(beta=0.0), "beta is 0.0; set it above 0, finite"),
        (lambda: RLOO(kl_coef=-0.1), "kl_coef is -0.1; set it to 0 or above, finite"),
        (lambda: Reinforce(kl_target=0.0), "kl_target is 0.0; set it above 0, finite"),
        (lambda: PPO(kl_target=5.0, kl_coef=0.0), "kl_target adapts kl_coef, which is 0; set kl_coef above 0 too"),
        (lambda: DPO(epochs=-1), "epochs is -1; set it to 1 or above, at most 1,000,000"),
        (
            lambda: PPO(epochs=0, gamma=2.0),
            "epochs is 0; set it to 1 or above, at most 1,000,000; gamma is 2.0; set it to 0 or above, at most 1",
        ),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def in_trl(trainer, config, folder, **options):
    """A trainer of TRL on a tiny model that has left its reference: (trainer, one scored rollout, its rewards)."""
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"w{i} is in w{i + 1}"} for i in range(2)]
    rewards = []

    def reward(completion_ids, **columns):
        rewards[:] = [sum(ids) % 7 / 2 for ids in completion_ids]
        return list(rewards)

    settings = {"output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": [], "seed": 3}
    settings |= {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "num_iterations": 2,
    }
    arguments = config(**settings, **options)
    made = trainer(
        model=str(save("llama", folder / "model")),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    move(made.model, 1)
    scored = made._generate_and_score_completions([rows[0]] * 4 + [rows[1]] * 4)
    return made, scored, torch.tensor(rewards)


def move(model, seed):
    """Change the weights a little: a later policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def logprobs_of(model, scored):
    ids = torch.cat([scored["prompt_ids"], scored["completion_ids"]], dim=1)
    start = scored["prompt_ids"].shape[1]
    logits = model(ids).logits[:, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, scored["completion_ids"][..., None])[..., 0]


CASES = [
    ("RLOO", RLOO(), {}),
    ("GRPO", GRPO(), {"loss_type": "dapo"}),
    ("GRPO", GRPO(loss="grpo", scale_rewards="batch"), {"loss_type": "grpo", "scale_rewards": "batch"}),
    ("GRPO", GRPO(loss="dr_grpo", scale_rewards="none"), {"loss_type": "dr_grpo", "scale_rewards": False}),
    ("GRPO", GRPO(loss="gspo"), {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("GRPO", GRPO(loss="cispo", epsilon_high=0.02), {"loss_type": "cispo"}),
]
"""What docs/train.md says TRL calls each loss."""


@pytest.mark.parametrize(("name", "algorithm", "called"), CASES, ids=lambda case: getattr(case, "loss", None))
def test_advantage_and_loss_are_those_of_trls_trainer(name, algorithm, called, tmp_path):
    """A real trainer of TRL samples, scores and computes its loss after the policy has moved on: ours are the same."""
    trl = pytest.importorskip("trl", reason="trl is not installed: whole algorithms are not compared with TRL's")
    # TRL's default weighs the KL term with the probability ratio (DeepSeek-V3.2); ours is the GRPO paper's, without.
    options = {"use_bias_correction_kl": False, **called} if name == "GRPO" else called
    low, high = algorithm.clip
    # TRL's bound of CISPO is the ratio itself; ours, as in all other losses and in its paper, the distance from 1.
    bounds = {"epsilon_high": 1 + high} if "cispo" in called.values() else {"epsilon": low, "epsilon_high": high}
    trainer, scored, rewards = in_trl(
        getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), tmp_path, beta=0.2, **bounds, **options
    )
    mask = scored["completion_mask"].bool()
    assert mask.sum(-1).unique().numel() > 1, "responses of several lengths"
    assert rewards.unique().numel() > 2
    with torch.no_grad():
        old, reference = (logprobs_of(model, scored) for model in (trainer.model, trainer.ref_model))
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    scored_here = Batch(rewards, group, mask, old, Totals(int(mask.sum()), 8, 2), reference, kl_coef=0.2)
    scored_here = replace(scored_here, max_new_tokens=trainer.max_completion_length)
    ours = with_advantages(algorithm, scored_here)
    assert ours.advantages[:, 0].tolist() == pytest.approx(scored["advantages"].tolist(), abs=2e-5)

    move(trainer.model, 2)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, scored)
    now = logprobs_of(trainer.model, scored)
    loss, metrics = loss_of(algorithm, ours, said(now))
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    weight = trainer.model.lm_head.weight
    mine, other = (torch.autograd.grad(value, weight)[0] for value in (loss, theirs))
    assert (mine - other).abs().max() < 1e-4 * other.abs().max()
    logged = trainer._metrics["train"]
    for key, value in metrics.items():
        assert float(value) == pytest.approx(logged[key][-1], abs=1e-6)
