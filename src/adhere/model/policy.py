"""The policy: a network and its tokenizer behind encode, sample and reading, causal or encoder–decoder alike."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adhere.errors import TooLong, UserError
from adhere.inspection.inspection import Inspection
from adhere.model import adapters, capture, precision, prefix, rope
from adhere.model.accumulate import Accumulator, CopyHits, HeadMass, WeightedMap
from adhere.model.compose import takes_chat
from adhere.model.embedded import located
from adhere.model.encode import Prompt, context_length, encode_prompts
from adhere.model.endings import Endings
from adhere.model.families import attention_layers, shareable
from adhere.model.fingerprint import fingerprint
from adhere.model.load import load
from adhere.model.logits import token_logprobs, token_spread
from adhere.model.observe import AttentionObserver
from adhere.model.responses import given_rollout
from adhere.model.sampling import draw
from adhere.model.settings import CHAT, ChatMode, ChatOptions, Lora, Sampling
from adhere.prompt import prompt_key
from adhere.types import Prompts, Reading, Rollout

# Tokens of one scoring forward, padding included: about 200 MB of activations for a 100M-parameter model.
FORWARD_TOKENS = 16_384


class Policy:
    """A language model that can be sampled from and replayed.

    >>> from adhere.toy import model_path
    >>> policy = Policy.load(str(model_path("causal")))
    >>> policy.is_encoder_decoder
    False
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: ChatOptions = CHAT,
        adapter: bool = True,
        eager: bool = False,
        folder: Path | None = None,
        compute: torch.dtype | None = None,
    ) -> None:
        takes_chat(tokenizer, chat)  # at once, not at the first prompt
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.chat = chat
        network = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(network, PreTrainedModel)
        self.network = network
        self.eager = eager
        self.compute = compute
        """What forwards are cast to; None where they compute in the dtype of the weights."""
        self._adapter = adapter
        self._verified = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        lora: Lora | None = None,
        attention: str = "auto",
        trust_remote_code: bool = False,
        train: bool = False,
        chat: ChatMode = "auto",
        system: str | None = None,
        stop: Sequence[str] = (),
    ) -> Policy:
        """Load a folder or hub id. `attention="eager"` reads attention from `output_attentions`, for families that
        bypass transformers' attention interface; `train`: its weights are to be trained, in float32 whatever `dtype`
        it computes in; `chat`, `system`, `stop`: see `ChatOptions`. Raises `UnsupportedModel` (see
        `adhere.model.load`)."""
        options = ChatOptions(chat, system, tuple(stop))
        model, tokenizer = load(
            str(path),
            dtype=precision.loading_dtype(dtype, lora is not None) if train else dtype,
            device=device,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
        folder = Path(located(str(path)))
        policy = cls(
            adapters.add(model, lora) if lora else model,
            tokenizer,
            chat=options,
            eager=attention == "eager",
            folder=folder if folder.is_dir() else None,
        )
        if train:
            policy.prepare_training(dtype)
        return policy

    def prepare_training(self, dtype: str = "auto") -> None:
        """Keep the weights that are trained in float32, and compute in `dtype` from here on (auto: float32 too).
        Raises `UserError` for float16, and where all weights are quantised."""
        self.compute = precision.keep_trained_in_float32(self.model, dtype)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.network.config.is_encoder_decoder)

    @property
    def kind(self) -> str:
        """The architecture in a word, weights aside: family, decoder layers × width, heads, vocabulary."""
        config = self.network.config
        text = config.get_text_config(decoder=True)
        shape = f"{text.num_hidden_layers}x{text.hidden_size}, {text.num_attention_heads} heads"
        return f"{config.model_type} {shape}, vocabulary {text.vocab_size}"

    @property
    def attention_shape(self) -> tuple[int, int]:
        """(L, H): layers and heads whose attention reaches the prompt."""
        config = self.network.config.get_text_config(decoder=True)
        return attention_layers(self.network), int(config.num_attention_heads)

    def fingerprint(self) -> str:
        """Which weights this policy has, the adapter included where it is on (`adhere.model.fingerprint`)."""
        return fingerprint(self.network, adapters=self._adapter)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def takes_chat(self) -> bool:
        """Whether a plain prompt becomes a user turn of the chat template."""
        return takes_chat(self.tokenizer, self.chat)

    @property
    def endings(self) -> Endings:
        """What ends a response, as tokenizer and generation configuration are now."""
        return Endings.of(self.tokenizer, self.network, self.chat)

    @property
    def shares_prefixes(self) -> bool:
        """Whether the prompt of a group is computed once (else: the plain batch)."""
        return shareable(self.network) and not self.eager

    def reference(self) -> Policy:
        """A frozen policy that stays what this one is now: the adapter switched off, or a copy without gradients."""
        if isinstance(self.model, PeftModel):
            frozen, adapter = self.model, False
        else:
            frozen, adapter = copy.deepcopy(self.network).requires_grad_(False).eval(), True
        return Policy(
            frozen,
            self.tokenizer,
            chat=self.chat,
            adapter=adapter,
            eager=self.eager,
            folder=self.folder,
            compute=self.compute,
        )

    def encode(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]] | None = None,
        names: Sequence[str] | None = None,
    ) -> Prompts:
        """Tokenise prompts (texts, annotated or not, or lists of chat messages) for this model, in its chat template
        as `chat` says; `names` says where each comes from. Raises `UserError` (see `encode_prompts`)."""
        return encode_prompts(self.tokenizer, self.network, prompts, answers, names, self.chat).to(self.device)

    def encode_texts(self, texts: Sequence[str]) -> Prompts:
        """Tokenise bare texts, without any chat template."""
        plain = ChatOptions(chat="off")
        return encode_prompts(self.tokenizer, self.network, texts, options=plain).to(self.device)

    def response_room(self, prompts: Prompts) -> Tensor | None:
        """[N] int64: tokens that a response to each prompt may have before the context is full; None = no limit."""
        limit = context_length(self.network)
        if limit is None:
            return None
        return torch.full_like(prompts.ids[:, 0], limit) if self.is_encoder_decoder else limit - prompts.mask.sum(-1)

    def check_room(self, prompts: Prompts, max_new_tokens: int, names: Sequence[str]) -> None:
        """Raise `UserError` where a prompt and `max_new_tokens` do not fit the context; `names` says where each is."""
        room = self.response_room(prompts)
        if room is not None and (short := (room < max_new_tokens).nonzero().flatten().tolist()):
            raise UserError(
                f"prompt and {max_new_tokens} new tokens do not fit the model's context"
                + (f" ({len(short)} such prompts)" if len(short) > 1 else ""),
                where=names[short[0]] or f"prompt {short[0] + 1}",
                fix=f"shorten the prompt, or set max_new_tokens to {int(room.min())} or less",
            )

    def respond(
        self,
        prompts: Prompts,
        responses: Sequence[str | Sequence[int]],
        prompt_index: Tensor,
        ended: Sequence[bool] | None = None,
    ) -> Rollout:
        """A rollout of given responses: `responses[b]` answers prompt `prompt_index[b]` ([B] int64, non-decreasing).

        Responses are texts, which `ended` by themselves unless it says otherwise, or token ids as they were sampled,
        which did if they close with what ends a response. A text is encoded as the model would write it after its
        prompt, and closed (see `encode_responses`).
        """
        whole = [True] * len(responses) if ended is None else ended
        return given_rollout(self.endings, prompts, responses, prompt_index, whole, alone=self.is_encoder_decoder)

    def fits(self, rollout: Rollout) -> Tensor:
        """[B] bool: whether prompt and response fit the model's context."""
        room = self.response_room(rollout.prompts)
        return torch.ones_like(rollout.ended) if room is None else rollout.lengths <= room[rollout.prompt_index]

    def sample(
        self, prompts: Prompts, num_samples: int = 1, *, sampling: Sampling | None = None, seed: int = 0
    ) -> Rollout:
        """`num_samples` responses to each prompt, drawn with `seed`; log-probs of the drawn tokens come along."""
        return self._draw(prompts, num_samples, sampling or Sampling(), seed)

    def sample_and_read(
        self, prompts: Prompts, num_samples: int, sampling: Sampling, seed: int, maps: Mapping[str, Tensor | None]
    ) -> Reading:
        """The rollout that `sample` draws and its `reading` in one: read from the very forwards that draw it, where the
        family lets us. `maps`: `attention` and `copy_attention`, as far as they are wanted, → weights of the heads."""
        if not self.shares_prefixes or not rope.fixed_while_drawing(self.network, prompts, sampling.max_new_tokens):
            rollout = self.sample(prompts, num_samples, sampling=sampling, seed=seed)
            return self.read(rollout, attention="attention" in maps, copy_weights=maps.get("copy_attention"))
        if maps:
            self._verify()
        watch = AttentionObserver(self.network, maps, sampling.temperature or 1.0)
        return watch.read(self._draw(prompts, num_samples, sampling, seed, watch))

    def read(
        self,
        rollout: Rollout | Sequence[Prompt],
        responses: Sequence[str] | None = None,
        *,
        attention: bool = True,
        copy_weights: Tensor | None = None,
    ) -> Reading:
        """One teacher-forced forward: log-probs, entropy, certainty and (where asked) attention together.

        Give a rollout, or as many prompts as responses. `copy_weights` [L, H] asks for `copy_attention` too.
        """
        if not isinstance(rollout, Rollout):
            if responses is None or len(responses) != len(rollout):
                raise UserError("reading needs one response to each prompt", fix="pass read(prompts, responses)")
            rollout = self.paired(rollout, responses)
        size, width = rollout.response_ids.shape
        places = rollout.prompts.ids.shape[1]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("logprobs", "entropy", "certainty"), (size, width))
        if attention:
            shapes["attention"] = (size, width, places)
        if copy_weights is not None:
            shapes["copy_attention"] = (size, width, places)
        whole = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        for chunk in rope.chunks(self.network, rollout, FORWARD_TOKENS):
            padding = ~chunk.rollout.response_mask
            for name, values in self._read(chunk.rollout, attention, copy_weights).items():
                if values.dim() == 3:
                    whole[name][chunk.rows, chunk.columns, chunk.span] = values.masked_fill(padding[..., None], 0.0)
                else:
                    whole[name][chunk.rows, chunk.columns] = values.masked_fill(padding, 0.0)
        return Reading(rollout, **whole)

    def inspect(
        self, prompt: Prompt, response: str | None = None, *, max_new_tokens: int = 64, name: str = ""
    ) -> Inspection:
        """Where each response token looked in the prompt: a view in a notebook, a table in a terminal.

        Without a response the greedy one is inspected, of at most `max_new_tokens`. Raises `UserError` where prompt and
        response do not fit the context; `name` says where they come from.
        """
        return Inspection.of(self.read(self.answered(prompt, response, max_new_tokens, name)), self.tokenizer)

    def answered(self, prompt: Prompt, response: str | None, max_new_tokens: int, name: str = "") -> Rollout:
        """One prompt with one response: the given one, or the greedy one where there is none."""
        prompts = self.encode([prompt], names=[name])
        if response is None:
            self.check_room(prompts, max_new_tokens, [name])
            return self.sample(prompts, sampling=Sampling(temperature=0.0, max_new_tokens=max_new_tokens))
        rollout = self.respond(prompts, [response], torch.zeros(1, dtype=torch.long))
        if not bool(self.fits(rollout)):
            raise TooLong(
                f"prompt and a response of {int(rollout.lengths[0])} tokens do not fit the model's context",
                where=name or None,
                fix="shorten the response or the prompt",
            )
        return rollout

    def paired(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rollout:
        """The rollout of given pairs; neighbours with the same prompt form a group."""
        keys = [prompt_key(prompt) for prompt in prompts]
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        index = torch.zeros(len(prompts), dtype=torch.long)
        index[starts[1:]] = 1
        return self.respond(self.encode([prompts[i] for i in starts]), responses, index.cumsum(0))

    @torch.no_grad()
    def copy_hits(self, rollout: Rollout, counted: Tensor, copied: Tensor) -> tuple[Tensor, float]:
        """In how many of the `counted` response places ([B, R] bool) the prompt position that head (l, h) attends to
        most is one `copied` there ([B, R, P] bool): [L, H] int64. And the mean log-prob of the tokens at those places,
        nats."""
        total: Tensor | None = None
        logprobs: list[Tensor] = []
        for chunk in rope.chunks(self.network, rollout, FORWARD_TOKENS):
            part, here = chunk.rollout, counted[chunk.rows, chunk.columns]
            hits = CopyHits(copied[chunk.rows, chunk.columns, chunk.span], here)
            for piece in self._forwards(part, share=False, watchers=lambda _window, hits=hits: [hits]):
                found = token_logprobs(piece.logits, part.response_ids[:, piece.response])
                logprobs.append(found[here[:, piece.response]])
            total = hits.result() if total is None else total + hits.result()
        assert total is not None
        return total, float(torch.cat(logprobs).mean())

    @torch.no_grad()
    def head_mass(self, rollout: Rollout, salience: Tensor) -> Tensor:
        """[B, L, H] float32: attention of each head to the salient prompt, Σ_i s_i a[t, i], the mean over response
        tokens. `salience` is [B, P]."""
        found: Tensor | None = None
        for chunk in rope.chunks(self.network, rollout, FORWARD_TOKENS):
            part, rows = chunk.rollout, chunk.rows
            mass = HeadMass(salience[chunk.rows, chunk.span], part.response_mask)
            list(self._forwards(part, share=False, watchers=lambda _window, mass=mass: [mass]))
            part_mass = mass.result()
            found = part_mass.new_zeros(len(rollout), *part_mass.shape[1:]) if found is None else found
            found[rows] = part_mass
        assert found is not None
        return found

    def save(self, folder: Path) -> None:
        """Write weights (adapters merged, in float32) and tokenizer so that AutoModel loads them without adhere.

        Raises `RunFailed` where a weight is not finite."""
        precision.require_finite(self.model.named_parameters())
        network = adapters.merged(self.model) if isinstance(self.model, PeftModel) else self.network
        network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _draw(
        self, prompts: Prompts, count: int, sampling: Sampling, seed: int, watch: AttentionObserver | None = None
    ) -> Rollout:
        endings = self.endings
        with self._active():
            ids, mask, ended, logprobs = draw(
                self.network, prompts, count, sampling, endings, int(self.tokenizer.pad_token_id), seed, watch
            )
        said = self.tokenizer.batch_decode(
            [row[keep] for row, keep in zip(ids, mask, strict=True)], skip_special_tokens=True
        )
        texts = [endings.cut(text) for text in said]
        index = torch.arange(len(prompts), device=self.device).repeat_interleave(count)
        rollout = Rollout(prompts, index, ids, mask, ended, tuple(texts), logprobs, sampling.temperature or 1.0)
        if rope.fixed_while_drawing(self.network, prompts, sampling.max_new_tokens):
            return rollout
        # Each token was drawn with the frequencies of the length so far; what counts are those of the finished row.
        return replace(rollout, logprobs=self.read(rollout, attention=False).logprobs)

    def _verify(self) -> None:
        """See `capture.verify`; once a policy."""
        if not self._verified:
            with precision.exact(self.device):  # the tolerance is that of the weights' dtype
                capture.verify(self.network)
            self._verified = True

    def _read(self, part: Rollout, attention: bool, copy_weights: Tensor | None) -> dict[str, Tensor]:
        """Statistics [b, r] and maps [b, r, p] of one chunk."""
        wanted: dict[str, Tensor | None] = {"attention": None} if attention else {}
        if copy_weights is not None:
            wanted["copy_attention"] = copy_weights.to(self.device)
        windows: list[tuple[prefix.Window, dict[str, WeightedMap]]] = []

        def watchers(window: prefix.Window) -> list[Accumulator]:
            shape = (window.batch, window.rows.stop - window.rows.start, window.columns.stop)
            maps = {name: WeightedMap(shape, self.device, weights) for name, weights in wanted.items()}
            windows.append((window, maps))
            return list(maps.values())

        with torch.no_grad():
            found: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "certainty": []}
            for piece in self._forwards(part, self.shares_prefixes, watchers if wanted else None):
                targets = part.response_ids[:, piece.response]
                found["logprobs"].append(token_logprobs(piece.logits, targets, part.temperature))
                spread = token_spread(piece.logits, part.temperature)
                for name, values in zip(("entropy", "certainty"), spread, strict=True):
                    found[name].append(values)
        for window, maps in windows:
            expand = window.batch != len(part)
            for name, kept in maps.items():
                found.setdefault(name, []).append(kept.result()[part.prompt_index] if expand else kept.result())
        return {name: torch.cat(pieces, dim=1) for name, pieces in found.items()}

    def _forwards(self, part: Rollout, share: bool, watchers: Any | None) -> Iterator[prefix.Predictions]:
        """The forward(s) of a chunk, each watched by the accumulators that `watchers(window)` makes."""
        with self._active():
            if watchers is None:
                yield from prefix.forwards(self.network, part, share)
                return
            if self.eager:
                yield from self._eager_forwards(part, watchers)
                return
            self._verify()

            def around(window: prefix.Window) -> AbstractContextManager[None]:
                return capture.capture(self.network, window.rows, window.columns, watchers(window))

            yield from prefix.forwards(self.network, part, share, around)

    def _eager_forwards(self, part: Rollout, watchers: Any) -> Iterator[prefix.Predictions]:
        windows: list[prefix.Window] = []
        outputs: list[Any] = []

        def around(window: prefix.Window) -> AbstractContextManager[None]:
            windows.append(window)
            return nullcontext()

        handle = self.network.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            yield from prefix.plain_forwards(self.network, part, around, output_attentions=True)
        finally:
            handle.remove()
        window = windows[0]
        capture.capture_eager(outputs[0], self.is_encoder_decoder, window.rows, window.columns, watchers(window))

    @contextmanager
    def _active(self) -> Iterator[None]:
        """The adapter off while this policy is a reference, forwards cast to what they compute in."""
        off = self.model.disable_adapter() if isinstance(self.model, PeftModel) and not self._adapter else nullcontext()
        with off, precision.computing(self.device, self.compute):
            yield
