"""Sentences left out: masked keys against one forward under the same mask, shortened prompts, and signals by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adhere.model.logits import token_logprobs
from adhere.model.policy import Policy
from adhere.reward.named import RewardConfig
from adhere.reward.reward import Reward
from adhere.row_prompt import prompt_of
from adhere.toy import model_path
from adhere.types import Prompts, Role, Rollout
from tests.families import CAUSAL, VOCAB, build, tokenizer

PARTS = torch.tensor([[-1, -1, -1, 0, 0, 0, 1, 1, -1, -1, -1], [-1, 0, 0, 1, 1, 1, 2, 2, 2, 2, -1], [-1] * 11])
PROMPTS = [
    prompt_of({"context": "mary went to the garden . john is in the office .", "question": "where is mary ?"})[0],
    prompt_of({"context": "john is in the kitchen .", "question": "where is john ?"})[0],
]


def rollout(left: bool) -> Rollout:
    """Two prompts with parts and one without, of unequal length, with one to three responses each."""
    torch.manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, : 2 if left else 0] = False
    prompts = Prompts(
        ("a", "b", "c"), torch.randint(3, VOCAB, (3, 11)) * mask, mask.to(torch.uint8) * Role.USER, ((),) * 3
    )
    kept = torch.arange(5)[None] < torch.tensor([4, 5, 5, 2, 1, 3])[:, None]
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    return Rollout(prompts, index, torch.randint(3, VOCAB, (6, 5)) * kept, kept, kept.any(-1), ("",) * 6)


def under_mask(model, batch: Rollout, row: int, part: int) -> torch.Tensor:
    """[R] log-probs of one response from a single plain forward, whose rows after the last part do not see `part`."""
    number = int(batch.prompt_index[row])
    ids = torch.cat([batch.prompts.ids[number], batch.response_ids[row]])[None]
    real = torch.cat([batch.prompts.mask[number], batch.response_mask[row]])
    size, parts = ids.shape[1], torch.cat([PARTS[number], torch.full((5,), -1)])
    seen = torch.tril(torch.ones(size, size, dtype=torch.bool)) & real
    cut = int((parts >= 0).nonzero().max()) + 1
    seen[min(cut, 10) :, parts == part] = False
    seen |= torch.eye(size, dtype=torch.bool)  # padding looks at itself, and nobody at padding
    weight = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    places = (real.long().cumsum(-1) - 1).clamp(min=0)[None]
    logits = model(input_ids=ids, attention_mask=weight, position_ids=places, use_cache=False).logits[:, 10:15]
    return token_logprobs(logits, batch.response_ids[row : row + 1])[0] * batch.response_mask[row]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_masked_part_equals_one_forward_that_does_not_see_it(family: str) -> None:
    model = build(family)
    batch = rollout(left=True)
    found = Policy(model, tokenizer()).read_without(batch, PARTS)
    assert found.shape == (6, 3, 5)
    for row, number in enumerate(batch.prompt_index.tolist()):
        for part in range(3):
            if part in PARTS[number]:
                with torch.no_grad():
                    want = under_mask(model, batch, row, part)
                assert torch.allclose(found[row, part], want, atol=1e-5), (row, part)
            else:
                assert not found[row, part].any()


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart"])
def test_nothing_depends_on_company_or_budget(family: str) -> None:
    policy = Policy(build(family), tokenizer())
    batch = rollout(left=not policy.is_encoder_decoder)
    whole = policy.read_without(batch, PARTS)
    policy.reader.budget.tokens = 16
    assert torch.allclose(policy.read_without(batch, PARTS), whole, atol=1e-5)
    for number in range(2):
        alone = batch.groups(number, number + 1)
        own = policy.read_without(alone.rollout, PARTS[number : number + 1, alone.span])
        assert torch.allclose(whole[alone.rows, : own.shape[1], alone.columns], own, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_reads_the_shortened_prompt(family: str) -> None:
    policy = Policy(build(family), tokenizer())
    batch = rollout(left=False)
    found = policy.read_without(batch, PARTS)
    shorter = batch.prompts.only(batch.prompts.mask & (PARTS != 1), left=False)
    want = policy.read(replace(batch, prompts=shorter), attention=False, spread=()).logprobs
    assert torch.allclose(found[:5, 1], want[:5], atol=1e-5) and not found[5].any()


def test_the_sentence_that_holds_the_answer_matters_most() -> None:
    policy = Policy.load(model_path("causal"), device="cpu")
    reward = Reward(RewardConfig({"leave_one_out": 1.0}, normalise="none"), policy)
    evidence = reward.evidence(reward.paired([PROMPTS[0]] * 2, ["garden", "office"])[0])
    without = evidence.left_out_logprobs
    assert without is not None and without.shape[1] == 2
    drops = (evidence.reading.logprobs[:, None] - without).sum(-1) / evidence.reading.response_mask.sum(-1)[:, None]
    assert drops.argmax(-1).tolist() == [0, 1]
    assert torch.allclose(reward.score_evidence(evidence).reward, drops.amax(-1), atol=1e-5)


def test_one_pair_has_one_score() -> None:
    """The signals of a response are the same alone, in its group and beside a longer prompt; 0 without a context."""
    policy = Policy.load(model_path("causal"), device="cpu")
    reward = Reward(RewardConfig({"leave_one_out": 1.0, "selfcite": 1.0}, normalise="none"), policy)
    together = reward.score([PROMPTS[1], PROMPTS[0], PROMPTS[1]], ["kitchen", "garden", "office"]).signals
    alone = reward.score([PROMPTS[1]], ["kitchen"]).signals
    for name in ("leave_one_out", "selfcite"):
        assert torch.allclose(together[name][:1], alone[name], atol=1e-4)
    bare = reward.score([prompt_of({"question": "where is mary ?"})[0]], ["garden"]).signals
    assert bare["leave_one_out"].tolist() == bare["selfcite"].tolist() == [0.0]
