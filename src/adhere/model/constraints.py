"""Decoding constraints of a model's `generation_config`: tokens that it forces, forbids or penalises.

They are part of the model's distribution: what `generate` cannot say is not sampled here, and log-probs, entropy and
certainty are those of the constrained distribution. The rules are transformers' own logits processors, applied row by
row without padding. Temperature and truncation (top-p, top-k) are choices of whoever samples: `Sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as rules

from adhere.errors import RunFailed, UnsupportedModel
from adhere.model.families import decoder_start
from adhere.types import Rollout

Rule = Callable[[Any, Any], Tensor]
"""ids [n, t] int64, scores [n, V] → scores [n, V]."""

# What each field is set to where it does nothing; None does nothing anywhere.
OBEYED: dict[str, Any] = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""Fields of a generation configuration that are obeyed, in the order in which `generate` applies them."""
REFUSED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Fields that change what is said and that no processor of a single row can obey."""


@dataclass(frozen=True)
class Constraints:
    """The constraints of one model. `ends` are the tokens that end a response."""

    config: GenerationConfig
    ends: tuple[int, ...]
    start: int | None
    """What a decoder begins with in an encoder–decoder; a decoder-only model goes on from its prompt."""

    @classmethod
    def of(cls, model: PreTrainedModel, ends: Sequence[int]) -> Constraints | None:
        """The constraints of `model`; None where it has none. Raises `UnsupportedModel` for one that is not obeyed."""
        config = model.generation_config
        if config is None:
            return None
        if refused := _active(config, REFUSED):
            named = ", ".join(f"{name} ({getattr(config, name)})" for name in refused)
            raise UnsupportedModel(
                f"its generation_config sets {named}, which sampling does not obey",
                where=model.config.name_or_path or None,
                fix="remove it from generation_config.json",
            )
        if not _active(config, OBEYED):
            return None
        return cls(config, tuple(ends), decoder_start(model) if model.config.is_encoder_decoder else None)

    @property
    def opening(self) -> tuple[int, ...]:
        """What every response begins with."""
        token = self.config.forced_bos_token_id
        return () if token is None or self.start is None else (int(token),)

    @property
    def forces_end(self) -> bool:
        """Whether the last token that the length limit allows is an end."""
        return bool(self._forced_end())

    def forced_ends(self, rollout: Rollout) -> Tensor:
        """[B] bool: responses whose last token is an end that was forced at the length limit: it did not end them."""
        forced = self._forced_end()
        last = rollout.response_ids.gather(1, (rollout.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        return ~rollout.ended & (rollout.lengths > 0) & torch.isin(last, torch.tensor(forced, device=last.device))

    def apply(self, logits: Tensor, prompts: Tensor, mask: Tensor, given: Tensor, last: Tensor) -> Tensor:
        """The constrained logits of the token after the response tokens `given` [n, t], float32 [n, V] → [n, V].

        `prompts` [n, P] int64 and `mask` [n, P] bool, `last` [n] bool: the length limit allows no token after this.
        Raises `RunFailed` where nothing may be said.
        """
        lengths = mask.sum(-1)
        out = logits
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(-1)
            prompt = prompts[rows][mask[rows]].view(len(rows), length)
            begun = prompt if self.start is None else torch.full_like(prompt[:, :1], self.start)
            ids = torch.cat([begun, given[rows]], dim=1)
            scores = logits[rows]
            for rule in self._rules(prompt, begun.shape[1], ids, last[rows]):
                scores = rule(ids, scores)
            out = out.index_copy(0, rows, scores)
        if bool((out.amax(-1) == -torch.inf).any()):
            names = ", ".join(_active(self.config, OBEYED))
            raise RunFailed(f"the generation_config leaves no token to say ({names})", fix="relax one of them")
        return out

    def read(self, logits: Tensor, rollout: Rollout, rows: Tensor, places: Tensor) -> Tensor:
        """The constrained logits of the response tokens at `places` [n] of the responses `rows` [n], [n, V] → [n, V].

        A token that they forbid was not said under them (a text that someone else wrote): it is read without them.
        """
        forced = self.forced_ends(rollout)
        owner = rollout.prompt_index[rows]
        prompts, mask = rollout.prompts.ids[owner], rollout.prompts.mask[owner]
        out = logits
        for place in places.unique().tolist():
            here = (places == place).nonzero().squeeze(-1)
            own = rows[here]
            last = forced[own] & (rollout.lengths[own] == place + 1)
            part = self.apply(logits[here], prompts[here], mask[here], rollout.response_ids[own, :place], last)
            said = part.gather(1, rollout.response_ids[own, place, None])
            out = out.index_copy(0, here, torch.where(said == -torch.inf, logits[here], part))
        return out

    def _forced_end(self) -> list[int]:
        token = self.config.forced_eos_token_id
        return [] if token is None else [token] if isinstance(token, int) else [int(each) for each in token]

    def _rules(self, prompt: Any, begin: int, ids: Tensor, last: Tensor) -> list[Rule]:
        """The active rules for rows of one length with `begin` tokens before the response, as
        `GenerationMixin._get_logits_processor` makes them."""
        config, device = self.config, str(ids.device)
        ends = torch.tensor(self.ends, device=ids.device)
        # The rule of the first token skips one that is forced.
        opening = begin + int(begin == 1 and config.forced_bos_token_id is not None)
        made: dict[str, Callable[[], Rule]] = {
            "sequence_bias": lambda: rules.SequenceBiasLogitsProcessor(config.sequence_bias),
            "encoder_repetition_penalty": lambda: rules.EncoderRepetitionPenaltyLogitsProcessor(
                config.encoder_repetition_penalty, prompt
            ),
            "repetition_penalty": lambda: rules.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
            "no_repeat_ngram_size": lambda: rules.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size),
            "encoder_no_repeat_ngram_size": lambda: rules.EncoderNoRepeatNGramLogitsProcessor(
                config.encoder_no_repeat_ngram_size, prompt
            ),
            "bad_words_ids": lambda: rules.NoBadWordsLogitsProcessor(config.bad_words_ids, ends),
            "min_length": lambda: rules.MinLengthLogitsProcessor(config.min_length, ends, device),
            "min_new_tokens": lambda: rules.MinNewTokensLengthLogitsProcessor(
                begin, config.min_new_tokens, ends, device
            ),
            "forced_bos_token_id": lambda: rules.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id),
            "forced_eos_token_id": lambda: _where(
                last, rules.ForcedEOSTokenLogitsProcessor(ids.shape[1] + 1, self._forced_end(), device)
            ),
            "exponential_decay_length_penalty": lambda: rules.ExponentialDecayLengthPenalty(
                config.exponential_decay_length_penalty, ends, begin
            ),
            "suppress_tokens": lambda: rules.SuppressTokensLogitsProcessor(config.suppress_tokens, device),
            "begin_suppress_tokens": lambda: rules.SuppressTokensAtBeginLogitsProcessor(
                config.begin_suppress_tokens, opening, device
            ),
        }
        return [made[name]() for name in _active(config, OBEYED)]


def _where(rows: Tensor, rule: Rule) -> Rule:
    """`rule` for the `rows` [n] bool alone."""
    return lambda ids, scores: torch.where(rows[:, None], rule(ids, scores), scores)


def _active(config: GenerationConfig, fields: dict[str, Any]) -> list[str]:
    """Those of `fields` that the configuration sets to something that does something."""
    return [name for name, idle in fields.items() if getattr(config, name, None) not in (None, idle, [], {})]
