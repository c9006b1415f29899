"""The product on SmolLM2-135M-Instruct: what only a real tokenizer, template and 270 heads show.

Skipped where the model is not there; `make real` fetches it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adhere import api
from adhere.checking import check_rows
from adhere.data import Row, read_rows, rows_of
from adhere.integrations.trl import AttentionReward
from adhere.model.policy import Policy
from adhere.model.settings import Lora, Sampling
from adhere.ranking import Group, score_groups, score_rows
from adhere.reward.heads import copy_heads, load_heads, measure_by_copying
from adhere.reward.reward import Reward
from adhere.reward.salience import token_classes
from adhere.reward.sources import context_sentences
from tests.real.fetch import default_folder

FOLDER = default_folder() / "smollm2"
XQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad_xquad" / "validation.jsonl"
QUESTIONS = 60

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model in {FOLDER}; run `make real`")

PASSAGE = (
    "The bakery on Mill Lane opened in 1968. Its founder, Ada Brook, sold only rye bread at first. In 1990 her nephew "
    "Tom took over and added a café. Today the café is known for its walnut cake."
)
ROWS = [
    Row(prompt, response=response)
    for prompt, responses in (
        (f"{PASSAGE}\n\nQuestion: Who founded the bakery?\nAnswer:", ("Ada Brook", "Tom", "rye bread")),
        (f"{PASSAGE}\n\nQuestion: When did the bakery open?\nAnswer:", ("1968", "1990", "")),
    )
    for response in responses
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def reward(policy):
    return Reward.named("attention", policy)


def test_a_reading_is_the_plain_forward(policy):
    reading = policy.read([row.prompt for row in ROWS], [row.response for row in ROWS], attention=False)
    for place in range(len(ROWS)):
        kept = reading.prompt_mask[place], reading.response_mask[place]
        prompt, response = reading.prompt_ids[place][kept[0]], reading.response_ids[place][kept[1]]
        with torch.no_grad():
            logits = policy.network(torch.cat([prompt, response])[None], use_cache=False).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        assert (reading.logprobs[place][kept[1]] - expected).abs().max() <= 1e-4


def test_captured_attention_is_eager_attention(policy):
    eager = Policy(policy.model, policy.tokenizer, eager=True)
    prompts, responses = [ROWS[0].prompt] * 2, ["Ada Brook", "Tom took over in 1990."]
    weights = copy_heads(policy).weights
    ours = policy.read(prompts, responses, copy_weights=weights)
    policy.network.set_attn_implementation("eager")
    try:
        theirs = eager.read(prompts, responses, copy_weights=weights)
    finally:
        policy.network.set_attn_implementation("sdpa")
    assert (ours.attention - theirs.attention).abs().max() <= 1e-5
    assert (ours.copy_attention - theirs.copy_attention).abs().max() <= 1e-5


def test_copying_finds_the_same_few_heads_every_time(policy):
    first, again = measure_by_copying(policy), measure_by_copying(policy)
    assert torch.equal(first.scores, again.scores)
    layer, head, score = first.top(1)[0]
    assert (layer, head) == (18, 6) and score > 0.9
    assert float(first.scores.median()) < 0.02
    assert torch.equal(copy_heads(policy).scores, first.scores)  # from the cache


def test_a_response_is_worth_the_same_wherever_it_is_scored(policy, reward, tmp_path):
    """In a file, by itself, over the server's scorer, in TRL, and by Ray's workers: 1e-4."""
    in_file = [line["reward"] for line in score_rows(reward, ROWS)]
    alone = [score_rows(reward, [row])[0]["reward"] for row in ROWS if row.response]
    groups = [Group(row.prompt, [row.response], [True]) for row in ROWS if row.response]
    served = [group[0]["reward"] for group in score_groups(reward, groups)]
    assert alone == pytest.approx(served, abs=1e-4)
    assert alone == pytest.approx([value for row, value in zip(ROWS, in_file, strict=True) if row.response], abs=1e-4)

    whole = [Group(rows[0].prompt, [r.response for r in rows], [True] * 3) for rows in (ROWS[:3], ROWS[3:])]
    assert in_file == pytest.approx([one["reward"] for g in score_groups(reward, whole) for one in g], abs=1e-4)

    trl = AttentionReward(str(FOLDER))
    said = policy.paired([row.prompt for row in ROWS], [row.response for row in ROWS])
    ids = [row[mask].tolist() for row, mask in zip(said.response_ids, said.response_mask, strict=True)]
    texts = [row.response for row in ROWS]
    turns = [[{"role": "user", "content": row.prompt}] for row in ROWS]  # TRL templates conversations only
    assert trl(turns, texts, ids) == pytest.approx(in_file, abs=1e-4)

    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": r.prompt, "response": r.response}) + "\n" for r in ROWS))
    given = ["--model", str(FOLDER), "--input", str(source), "--output", str(tmp_path / "scored"), "--device", "cpu"]
    command = [sys.executable, "-m", "adhere", "score", *given, "--engine", "ray", "--batch-size", "3", "--quiet"]
    subprocess.run(command, check=True, timeout=300)
    lines = [line for file in sorted((tmp_path / "scored").glob("part-*")) for line in file.read_text().splitlines()]
    assert [json.loads(line)["reward"] for line in lines] == pytest.approx(in_file, abs=1e-4)


def test_a_checked_answer_rests_on_the_sentence_that_says_it(policy):
    """And sentences left out by their masked keys come near the shortened prompt: r = 0.94 here, 0.998 on samples."""
    asked = {"context": PASSAGE, "question": "Who founded the bakery?"}
    rows = rows_of([{**asked, "response": text} for text in ("Ada Brook", "Tim Moss", "The ferry left at noon.")])
    right, elsewhere, off = check_rows(policy, rows)
    (source, *_) = right["sentences"][0]["sources"]
    assert source["text"] == "Its founder, Ada Brook, sold only rye bread at first."
    assert right["faithfulness"] > 0.5 > elsewhere["faithfulness"] and right["faithfulness"] > off["faithfulness"]
    rollout = policy.paired([row.prompt for row in rows], [row.response for row in rows])
    parts = context_sentences(rollout.prompts, token_classes(policy.tokenizer))
    masked = policy.read_without(rollout, parts)
    shorter = [
        policy.read(replace(rollout, prompts=rollout.prompts.only(rollout.prompts.mask & (parts != part), left=True)),
                    attention=False, spread=()).logprobs
        for part in range(4)
    ]  # fmt: skip
    own = policy.read(rollout, attention=False, spread=()).logprobs[:, None]
    drops = [(own - found).sum(-1).flatten() for found in (masked, torch.stack(shorter, dim=1))]
    assert float(torch.corrcoef(torch.stack(drops))[0, 1]) >= 0.9


def test_the_empty_response_never_wins(policy, reward):
    scores = reward.score([ROWS[3].prompt] * 3, ["1968", "", "  "]).reward.tolist()
    assert scores[0] > scores[1] and scores[0] > scores[2]


@pytest.mark.skipif(not XQUAD.is_file(), reason="no ../shared/data here")
@pytest.mark.slow
def test_the_right_answer_stands_above_the_empty_one_and_another_rows(policy, reward):
    """At least 95 of 100, over questions of XQuAD."""
    rows = read_rows(XQUAD, limit=QUESTIONS)
    others = [*rows[1:], rows[0]]
    right = []
    for row, other in zip(rows, others, strict=True):
        answers = [row.answers[0], "", other.answers[0]]
        best, *rest = reward.score([row.prompt] * 3, answers).reward.tolist()
        right.append(all(best > value for value in rest))
    assert sum(right) >= 0.95 * len(rows), f"{sum(right)} of {len(rows)}"


@pytest.mark.slow
def test_twenty_steps_with_an_adapter_are_sound_and_resume_exactly(tmp_path):
    asked = ("Who founded the bakery?", "When did it open?", "Who took over in 1990?", "What is the café known for?")
    prompts = [{"context": PASSAGE, "question": question} for question in asked]

    def train(folder: Path, steps: int, resume: bool = False) -> None:
        torch.manual_seed(0)
        policy = Policy.load(FOLDER, device="cpu", lora=Lora(rank=4, alpha=8), train=True)
        done = api.train(
            policy, prompts, output=folder, steps=steps, resume=resume, prompts_per_step=2, num_samples=2,
            max_new_tokens=6, learning_rate=1e-4, save_every=10, completions_every=0,
        )  # fmt: skip
        assert done.steps == steps

    train(tmp_path / "whole", 20)
    train(tmp_path / "halves", 10)
    train(tmp_path / "halves", 20, resume=True)
    names = ("model/model.safetensors", "adapter/adapter_model.safetensors")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "whole" / "adapter")).eval()
    merged = Policy.load(tmp_path / "whole" / "model", device="cpu")
    assert all(bool(weight.isfinite().all()) for weight in merged.network.parameters())
    ids = merged.encode([prompts[0]["question"]]).ids
    with torch.no_grad():
        assert (adapted(ids).logits - merged.network(ids).logits).abs().max() < 1e-3
    assert load_heads(tmp_path / "whole").method == "copying"


def test_samples_end_by_themselves_in_a_chat(policy):
    prompts = policy.encode(["Say yes."])
    drawn = policy.sample(prompts, 2, sampling=Sampling(temperature=0.5, max_new_tokens=24), seed=0)
    assert bool(drawn.ended.any())
