"""The policy: a network and its tokenizer behind encode, sample and reading, causal or encoder–decoder alike."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adhere.errors import UserError
from adhere.inspection.inspection import Inspection
from adhere.model import adapters, precision, rope
from adhere.model.compose import takes_chat, turns_of
from adhere.model.constraints import Constraints
from adhere.model.context import require_fit, require_room, response_room
from adhere.model.embedded import located
from adhere.model.encode import Prompt, encode_prompts
from adhere.model.endings import Endings
from adhere.model.families import attention_layers, refuse_dropped_soft_cap
from adhere.model.fingerprint import fingerprint
from adhere.model.load import in_place_of_bars, load
from adhere.model.logits import SPREAD
from adhere.model.memory import TokenBudget
from adhere.model.observe import DrawReader
from adhere.model.read import Reader
from adhere.model.responses import given_rollout
from adhere.model.sampling import cached_tokens, draw
from adhere.model.settings import CHAT, ChatMode, ChatOptions, Lora, Sampling
from adhere.progress import Progress, silent
from adhere.prompt import prompt_key
from adhere.types import Prompts, Reading, Rollout


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
        progress: Progress = silent,
    ) -> None:
        takes_chat(tokenizer, chat)  # at once, not at the first prompt
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.chat = chat
        network = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(network, PreTrainedModel)
        refuse_dropped_soft_cap(network)
        self.network = network
        self.eager = eager
        self.compute = compute
        """What forwards are cast to; None where they compute in the dtype of the weights."""
        self.progress = progress
        """Shows how far sampling, reading and every loop over prompts are. Assign another whenever you like."""
        self._adapter = adapter
        self.reader = Reader(network, eager, self._active)
        self.drawing = TokenBudget(cached_tokens(network))

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
        progress: Progress = silent,
    ) -> Policy:
        """Load a folder or hub id. `attention="eager"` reads attention from `output_attentions`, for families that
        bypass transformers' attention interface; `train`: its weights are to be trained, in float32 whatever `dtype`
        it computes in; `chat`, `system`, `stop`: see `ChatOptions`; `progress` shows how far loading is, and later what
        the policy does (`adhere.progress_bars`). Raises `UnsupportedModel` (see
        `adhere.model.load`), also for decoding constraints that sampling does not obey."""
        options = ChatOptions(chat, system, tuple(stop))
        model, tokenizer = load(
            str(path),
            dtype=precision.loading_dtype(dtype, lora is not None) if train else dtype,
            device=device,
            attention=attention,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        Constraints.of(model, ())  # one that is refused, at once
        folder = Path(located(str(path)))
        policy = cls(
            adapters.add(model, lora) if lora else model,
            tokenizer,
            chat=options,
            eager=attention == "eager",
            folder=folder if folder.is_dir() else None,
            progress=progress,
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
        return self.reader.shares_prefixes

    @property
    def constraints(self) -> Constraints | None:
        """The decoding constraints of the model's generation configuration; None where it has none.

        Raises `UnsupportedModel` for one that sampling does not obey."""
        return Constraints.of(self.network, sorted(self.endings.tokens))

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
            progress=self.progress,
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

    def turns_of(self, prompt: Prompt) -> list[dict[str, str]] | None:
        """The chat that a prompt is put to the model as; None where it is read as plain text."""
        return turns_of(self.tokenizer, prompt, self.chat)

    def encode_texts(self, texts: Sequence[str]) -> Prompts:
        """Tokenise bare texts, without any chat template."""
        plain = ChatOptions(chat="off")
        return encode_prompts(self.tokenizer, self.network, texts, options=plain).to(self.device)

    def response_room(self, prompts: Prompts) -> Tensor | None:
        """[N] int64: tokens that a response to each prompt may have before the context is full; None = no limit."""
        return response_room(self.network, prompts)

    def check_room(self, prompts: Prompts, max_new_tokens: int, names: Sequence[str]) -> None:
        """Raise `UserError` where a prompt and `max_new_tokens` do not fit the context; `names` says where each is."""
        require_room(self.network, prompts, max_new_tokens, names)

    def respond(
        self,
        prompts: Prompts,
        responses: Sequence[str | Sequence[int]],
        prompt_index: Tensor,
        ended: Sequence[bool] | None = None,
        names: Sequence[str] | None = None,
    ) -> Rollout:
        """A rollout of given responses: `responses[b]` answers prompt `prompt_index[b]` ([B] int64, non-decreasing);
        `names[b]` says where it comes from.

        Responses are texts, which `ended` by themselves unless it says otherwise, or token ids as they were sampled,
        which did if they close with what ends a response. A text is encoded as the model would write it after its
        prompt, and closed (see `encode_responses`); it gets the token that the model forces at the beginning, where
        there is one. Raises `TooLong` for one that does not fit the model's context with its prompt: beyond it the
        network computes numbers all the same, which mean nothing.
        """
        whole = [True] * len(responses) if ended is None else ended
        opening = self.constraints.opening if self.constraints is not None else ()
        alone = self.is_encoder_decoder
        found = given_rollout(self.endings, prompts, responses, prompt_index, whole, alone=alone, opening=opening)
        require_fit(self.network, found, names)
        return found

    def sample(
        self, prompts: Prompts, num_samples: int = 1, *, sampling: Sampling | None = None, seed: int = 0
    ) -> Rollout:
        """`num_samples` responses to each prompt, drawn with `seed`; log-probs of the drawn tokens come along."""
        return self._draw(prompts, num_samples, sampling or Sampling(), seed)

    def sample_and_read(
        self,
        prompts: Prompts,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        maps: Mapping[str, Tensor | None],
        *,
        spread: Collection[str] = SPREAD,
    ) -> Reading:
        """The rollout that `sample` draws and its `reading` in one: read from the very forwards that draw it, where the
        family lets us. `maps`: `attention` and `copy_attention`, as far as they are wanted, → weights of the heads;
        `spread` as in `read`."""
        if not self.shares_prefixes or not rope.drawn_as_read(self.network, prompts, sampling.max_new_tokens):
            rollout = self.sample(prompts, num_samples, sampling=sampling, seed=seed)
            copy_weights = maps.get("copy_attention")
            return self.read(rollout, attention="attention" in maps, copy_weights=copy_weights, spread=spread)
        if maps:
            self.reader.verify()
        watch = DrawReader(self.network, maps, sampling.temperature or 1.0, spread)
        return watch.reading(self._draw(prompts, num_samples, sampling, seed, watch))

    def read(
        self,
        rollout: Rollout | Sequence[Prompt],
        responses: Sequence[str] | None = None,
        *,
        attention: bool = True,
        copy_weights: Tensor | None = None,
        spread: Collection[str] = SPREAD,
        question: Tensor | None = None,
    ) -> Reading:
        """One teacher-forced forward: log-probs, `spread` (entropy, certainty) and (where asked) attention together.

        Give a rollout, or as many prompts as responses. `copy_weights` [L, H] asks for `copy_attention` too, and with
        it `question` [N, P] bool, the prompt tokens that ask, for `question_attention`. Leave out of `spread` what
        nobody reads: each costs a pass over the vocabulary.
        """
        if not isinstance(rollout, Rollout):
            if responses is None or len(responses) != len(rollout):
                raise UserError("reading needs one response to each prompt", fix="pass read(prompts, responses)")
            rollout = self.paired(rollout, responses)
        maps: dict[str, Tensor | None] = {"attention": None} if attention else {}
        if copy_weights is not None:
            maps["copy_attention"] = copy_weights
        assert question is None or copy_weights is not None, "the question is read with the copy heads"
        return self.reader.read(rollout, self.constraints, maps, spread, self.progress, question)

    def read_without(self, rollout: Rollout, parts: Tensor) -> Tensor:
        """[B, S, R] float32 log-probs of the responses without part s of their prompt (`adhere.model.leave_out`), 0
        where it has none such. `parts` [N, P] int64: the part, 0 … S − 1, of each prompt token; -1 = always there."""
        return self.reader.read_without(rollout, parts, self.constraints, self.progress)

    def inspect(
        self, prompt: Prompt, response: str | None = None, *, max_new_tokens: int = 64, name: str = ""
    ) -> Inspection:
        """Where each response token looked in the prompt: a view in a notebook, a table in a terminal.

        Without a response the greedy one is inspected, of at most `max_new_tokens`. Raises `UserError` where both do
        not fit the context; `name` says where they come from."""
        return Inspection.of(self.read(self.answered(prompt, response, max_new_tokens, name)), self.tokenizer)

    def answered(self, prompt: Prompt, response: str | None, max_new_tokens: int, name: str = "") -> Rollout:
        """One prompt with one response: the given one, or the greedy one where there is none."""
        prompts = self.encode([prompt], names=[name])
        if response is None:
            self.check_room(prompts, max_new_tokens, [name])
            return self.sample(prompts, sampling=Sampling(temperature=0.0, max_new_tokens=max_new_tokens))
        return self.respond(prompts, [response], torch.zeros(1, dtype=torch.long), names=[name])

    def paired(
        self, prompts: Sequence[Prompt], responses: Sequence[str], names: Sequence[str] | None = None
    ) -> Rollout:
        """The rollout of given pairs; neighbours with the same prompt form a group. `names` says where each is from."""
        keys = [prompt_key(prompt) for prompt in prompts]
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        index = torch.zeros(len(prompts), dtype=torch.long)
        index[starts[1:]] = 1
        encoded = self.encode([prompts[i] for i in starts], names=names and [names[i] for i in starts])
        return self.respond(encoded, responses, index.cumsum(0), names=names)

    def copy_hits(self, rollout: Rollout, counted: Tensor, copied: Tensor) -> tuple[Tensor, float]:
        """In how many of the `counted` response places ([B, R] bool) the prompt position that head (l, h) attends to
        most is one `copied` there ([B, R, P] bool): [L, H] int64. And the mean log-prob of the tokens at those places,
        nats."""
        return self.reader.copy_hits(rollout, counted, copied)

    def head_mass(self, rollout: Rollout, salience: Tensor) -> Tensor:
        """[B, L, H] float32: attention of each head to the salient prompt, Σ_i s_i a[t, i], the mean over response
        tokens. `salience` is [B, P]."""
        return self.reader.head_mass(rollout, salience, self.progress)

    def save(self, folder: Path) -> None:
        """Write weights (adapters merged, in float32) and tokenizer so that AutoModel loads them without adhere.

        Raises `RunFailed` where a weight is not finite."""
        precision.require_finite(self.model.named_parameters())
        network = adapters.merged(self.model) if isinstance(self.model, PeftModel) else self.network
        with in_place_of_bars(self.progress):
            network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _draw(
        self, prompts: Prompts, count: int, sampling: Sampling, seed: int, watch: DrawReader | None = None
    ) -> Rollout:
        endings = self.endings
        self.check_room(prompts, sampling.max_new_tokens, [""] * len(prompts))
        with self._active():
            ids, mask, ended, logprobs = draw(
                self.network,
                prompts,
                count,
                sampling,
                endings,
                int(self.tokenizer.pad_token_id),
                seed,
                self.drawing,
                watch,
                self.constraints,
                self.progress,
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
        return replace(rollout, logprobs=self.read(rollout, attention=False, spread=()).logprobs)

    @contextmanager
    def _active(self) -> Iterator[None]:
        """The adapter off while this policy is a reference, forwards cast to what they compute in."""
        off = self.model.disable_adapter() if isinstance(self.model, PeftModel) and not self._adapter else nullcontext()
        with off, precision.computing(self.device, self.compute):
            yield
