"""A reward model at work: a network fitted to preferences (`adhere.preferences.fit`) reads prompt and response.

r(x, y) is one number, the head of a sequence classifier with a single label. Only differences between responses to the
same prompt mean anything (Bradley & Terry 1952).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from adhere.errors import UserError
from adhere.model.context import context_length
from adhere.model.load import load_network, load_tokenizer
from adhere.model.rope import alike, original_frequencies
from adhere.progress import Progress, silent
from adhere.reward.signals import Evidence

CARD = "preference.json"
TOKENS = 8192
"""Tokens read at a time, padding included."""


class PreferenceModel:
    """A fitted network and its tokenizer."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.network, self.tokenizer = network, tokenizer

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str = "cpu", progress: Progress = silent
    ) -> PreferenceModel:
        """A folder that `adhere preferences fit` wrote. Raises `UserError` where it did not."""
        folder, fix = Path(folder), "give the folder that `adhere preferences fit` wrote"
        try:
            json.loads((folder / CARD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"no reward model ({error})", where=str(folder), fix=fix) from error
        network = load_network(
            str(folder), lambda _: AutoModelForSequenceClassification, device=str(device), progress=progress
        )
        tokenizer = load_tokenizer(str(folder))
        if network.config.num_labels != 1:
            raise UserError(f"a head of {network.config.num_labels} labels, not 1", where=str(folder), fix=fix)
        return cls(network, tokenizer)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """r(prompt, response) of each pair of texts, [B] float32 on the CPU. Raises `UserError` for one too long."""
        rows = [pair_ids(self.tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
        check_lengths(self.network, rows)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))  # little padding
        out = torch.zeros(len(rows))
        while order:
            width = len(rows[order[-1]])
            part, order = order[-max(1, TOKENS // width) :], order[: -max(1, TOKENS // width)]
            out[part] = logits(self.network, [rows[place] for place in part]).float().cpu()
        return out

    def signal(self, evidence: Evidence) -> Tensor:
        """As a signal: [B] float32."""
        rollout = evidence.reading.rollout
        prompts = [rollout.prompts.texts[place] for place in rollout.prompt_index.tolist()]
        return self.score(prompts, rollout.responses).to(rollout.prompt_index.device)


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """What the network reads: prompt, response, end. A prompt's own end and a second start are left out."""
    start, end = tokenizer.bos_token, int(tokenizer.eos_token_id)
    rendered = bool(start) and prompt.startswith(start)  # a chat template has written it already
    before = list(tokenizer(prompt, add_special_tokens=not rendered)["input_ids"])
    while before and before[-1] == end:
        before.pop()
    return [*before, *tokenizer(response, add_special_tokens=False)["input_ids"], end]


def logits(network: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """The head's number for each row of ids, [B]; gradients flow. Where RoPE depends on length, no row is read with the
    frequencies of a longer one."""
    pad, device = int(network.config.get_text_config().pad_token_id), network.device
    found = torch.zeros(len(rows), device=device, dtype=network.dtype)
    for places in alike(network, torch.tensor([len(row) for row in rows])):
        some = [rows[place] for place in places.tolist()]
        width = max(len(row) for row in some)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in some], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some], device=device)
        with original_frequencies(network):
            found[places] = network(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
    return found


def check_lengths(network: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` for a row that the context cannot hold: cut, it would be another pair."""
    limit, longest = context_length(network), max((len(row) for row in rows), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"prompt and response have {longest} tokens, the reward model's context holds {limit}",
            fix="shorten them, or fit a reward model on a backbone with a longer context",
        )
