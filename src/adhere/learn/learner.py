"""What the optimiser sees: the network and, for PPO, a value head, in one module that accelerate can wrap.

Its forward is the differentiable reading of a rollout, with the prompt of a group computed once.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from adhere.learn.batch import Outputs
from adhere.model import adapters
from adhere.model.logits import token_logprobs, token_spread
from adhere.model.policy import Policy
from adhere.model.precision import computing
from adhere.model.prefix import plain_forwards, shared_forwards
from adhere.types import Rollout


class Learner(nn.Module):
    """Network and value head. The value head is linear, starts at zero and reads what the language-model head reads."""

    def __init__(self, policy: Policy, value_head: bool) -> None:
        super().__init__()
        self.network = policy.network
        self.share = policy.shares_prefixes
        self.device, self.compute = policy.device, policy.compute
        self.value_head: nn.Linear | None = None
        if value_head:
            width = policy.network.get_output_embeddings().weight.shape[1]
            self.value_head = nn.Linear(width, 1, device=policy.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, rollout: Rollout) -> Outputs:
        parts = shared_forwards if self.share else plain_forwards
        logprobs, entropy, values = [], [], []
        # Dropout of adapters belongs to the update, not to the values that are read before it.
        dropping = adapters.dropout(self.network) if torch.is_grad_enabled() else nullcontext()
        with dropping, computing(self.device, self.compute):
            for part in parts(self.network, rollout, hidden=self.value_head is not None):
                given = rollout.response_ids[:, part.response]
                logprobs.append(token_logprobs(part.logits, given, rollout.temperature))
                entropy.append(token_spread(part.logits.detach(), rollout.temperature)[0])
                if self.value_head is not None and part.hidden is not None:
                    values.append(self.value_head(part.hidden.to(self.value_head.weight.dtype)).squeeze(-1).float())
        padding = ~rollout.response_mask
        return Outputs(
            torch.cat(logprobs, dim=1).masked_fill(padding, 0.0),
            torch.cat(entropy, dim=1).masked_fill(padding, 0.0),
            torch.cat(values, dim=1).masked_fill(padding, 0.0) if values else None,
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name, each once (tied weights too)."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
