"""Prompts through the tokenizer and chat template of SmolLM2-135M-Instruct; skipped where its folder is missing."""

from __future__ import annotations

import pytest
import torch

from adhere.model.policy import Policy
from adhere.model.settings import Sampling
from adhere.row_prompt import prompt_of
from adhere.types import Role
from tests.real.fetch import default_folder

FOLDER = default_folder() / "smollm2"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model in {FOLDER}; run `make real`")

CONTEXT = "Hugging Face trained the model. Paris is the capital of France."
QUESTION = "What is the capital of France?"
SAME = f"{CONTEXT}\n\nQuestion: {QUESTION}\nAnswer:"
ROWS = [
    {"messages": [{"role": "user", "content": SAME}]},
    {"prompt": SAME},
    {"context": CONTEXT, "question": QUESTION},
    {"documents": [CONTEXT], "question": QUESTION},
    {"documents": [{"text": CONTEXT}], "question": QUESTION},
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(FOLDER, device="cpu")


def test_a_chat_a_plain_prompt_context_and_documents_are_one_prompt_with_one_likelihood(policy: Policy) -> None:
    asked = [prompt_of(row)[0] for row in ROWS]
    prompts = policy.encode(asked)
    assert all(torch.equal(ids, prompts.ids[0]) for ids in prompts.ids)
    assert prompts.guessed.tolist() == [True, True, False, False, False]
    turns = [{"role": "user", "content": SAME}]
    rendered = policy.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert prompts.ids[0].tolist() == rendered["input_ids"]
    logprobs = policy.read(asked, ["Paris"] * len(asked), attention=False).logprobs
    assert (logprobs - logprobs[0]).abs().max() < 1e-5


def test_the_default_system_text_is_the_templates_and_the_words_in_it_are_the_users(policy: Policy) -> None:
    prompts = policy.encode([prompt_of(ROWS[2])[0], "Hugging Face"])
    tokens = [
        policy.tokenizer.decode(ids[roles == Role.DOCUMENT])
        for ids, roles in zip(prompts.ids, prompts.roles, strict=True)
    ]
    assert tokens[0] == CONTEXT and "trained by Hugging Face" in prompts.texts[1]
    assert policy.tokenizer.decode(prompts.ids[1][prompts.roles[1] == Role.USER]) == "Hugging Face"


def test_a_greedy_reply_and_the_same_reply_given_as_text_are_the_same_tokens(policy: Policy) -> None:
    prompts = policy.encode(["What is the capital of France? Answer with one word."])
    drawn = policy.sample(prompts, sampling=Sampling(temperature=0, max_new_tokens=24))
    assert bool(drawn.ended[0]) and "Paris" in drawn.responses[0]
    given = policy.respond(prompts, list(drawn.responses), torch.tensor([0]))
    assert torch.equal(given.response_ids, drawn.response_ids)


def test_a_turn_ends_with_the_template_though_the_tokenizer_says_otherwise(policy: Policy) -> None:
    other = Policy.load(FOLDER, device="cpu")
    other.tokenizer.eos_token = other.tokenizer.pad_token = "<|endoftext|>"
    other.network.generation_config.eos_token_id = 0
    given = other.paired(["What is the capital of France?"], ["Paris."])
    assert int(given.response_ids[0, -1]) == 2 and other.endings.tokens == {0, 2}
