"""What the optimiser sees: the network and, for PPO, a value head, in one module that accelerate can wrap.

Its forward is the differentiable reading of a rollout, with the prompt of a group computed once.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from adhere.learn.batch import Outputs
from adhere.model import adapters
from adhere.model.chunks import chunks
from adhere.model.memory import TokenBudget
from adhere.model.policy import Policy
from adhere.model.precision import computing
from adhere.model.prefix import forwards
from adhere.model.read import FORWARD_TOKENS
from adhere.model.recompute import recomputing, tokens_that_fit
from adhere.model.tokens import token_statistics
from adhere.types import Rollout


class Learner(nn.Module):
    """Network and value head. The value head is linear, starts at zero and reads what the language-model head reads."""

    def __init__(self, policy: Policy, value_head: bool, max_tokens: int = FORWARD_TOKENS) -> None:
        super().__init__()
        self.network = policy.network
        self.plain_tokens = tokens_that_fit(policy.network, policy.compute, recomputed=False)
        """Tokens of a forward that may keep its activations; larger ones are recomputed in the backward pass."""
        recomputed = tokens_that_fit(policy.network, policy.compute, recomputed=True)
        self.budget = TokenBudget(min(max_tokens, max(self.plain_tokens, recomputed)))
        self.share = policy.shares_prefixes
        self.device, self.compute = policy.device, policy.compute
        self.progress = policy.progress
        self.constraints, self.head = policy.constraints, policy.reader.head
        self.value_head: nn.Linear | None = None
        if value_head:
            width = policy.network.get_output_embeddings().weight.shape[1]
            self.value_head = nn.Linear(width, 1, device=policy.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, rollout: Rollout) -> Outputs:
        shape, device = rollout.response_ids.shape, rollout.response_ids.device
        names = ["logprobs", "entropy"] + (["values"] if self.value_head is not None else [])
        whole = {name: torch.zeros(shape, device=device) for name in names}
        # Dropout of adapters belongs to the update, not to the values that are read before it.
        dropping = partial(adapters.dropout, self.network) if torch.is_grad_enabled() else nullcontext
        with dropping(), computing(self.device, self.compute):
            for chunk in chunks(self.network, rollout, sys.maxsize):
                large = torch.is_grad_enabled() and chunk.rollout.tokens(self.share) > self.plain_tokens
                with recomputing(self.network, dropping) if large else nullcontext():
                    read = self._read(chunk.rollout)
                for name, found in read.items():
                    whole[name][chunk.rows, chunk.columns] = found.masked_fill(~chunk.rollout.response_mask, 0.0)
        return Outputs(whole["logprobs"], whole["entropy"], whole.get("values"))

    def _read(self, part: Rollout) -> dict[str, Tensor]:
        """The fields of `Outputs`, [b, r] each, of responses that may share a forward."""
        found: dict[str, list[Tensor]] = {}
        for piece in forwards(self.network, part, self.share, head=self.head):
            row = token_statistics(piece, part, self.head, self.constraints, ("entropy",))
            if self.value_head is not None and piece.hidden is not None:
                row["values"] = self.value_head(piece.hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
            for name, values in row.items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(pieces, dim=1) for name, pieces in found.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name, each once (tied weights too)."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
