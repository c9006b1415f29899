"""Makes the two embedded base models: `python -m adhere.toy.models --kind causal --output DIR`.

Three lessons, all supervised. *Bind*: stories of a sentence each for few people, then for more, until a question finds
the right sentence; with many names from the start this takes ten times as long. *Read*: every kind of question. *Lean*:
the answers of a teacher who, when a story contradicts what everybody knows, often says what everybody knows. What
post-training has to improve is that last habit: the model can read, and leans on what it was taught. All is seeded.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from adhere.model.policy import Policy
from adhere.reward.heads import measure_on_answers, save_heads
from adhere.toy.stories import KINDS, Split, bare_rows, make_rows
from adhere.toy.tokenizer import make_tokenizer

log = logging.getLogger("adhere.toy")
Row = dict[str, Any]

SPLITS: tuple[Split, ...] = ("agree", "conflict", "novel")
CURRICULUM = ((4, 2), (10, 2), (20, 2), (20, 3), (20, 4))
"""Bind: people to choose from, and people in a story."""
BOUND = 0.93
"""Share of right answers that ends a step of the curriculum."""
READ = 0.80
"""Exact match on `conflict` stories that ends the second lesson."""
LEAN = 0.6
"""Share of contradicting stories that the teacher of the third lesson answers as if they did not."""
READ_STEPS = 1500
LEAN_STEPS = 400
CHECK_EVERY = 50
CHECK_ROWS = 300
CARD_ROWS = 600
SAMPLES = 8
HEAD_PROMPTS = 64
LONGEST_ANSWER = 6  # tokens, its end included

BATCH = 96
PEAK_RATE = {"causal": 1e-3, "encdec": 2e-3}
WARMUP = 60
INITIAL = 0.083
"""Deviation of Llama's first weights, 1/√width: at the usual 0.02, so narrow a model starts with even attention."""
RATE_OF = {"relative_attention_bias": 25.0, "shared": 5.0, ".q.": 0.2}
"""Share of the rate by part of a weight's name. A step of AdamW is about as large as its rate, whatever the weight, and
T5 starts its weights at very different sizes. At one rate for all, its position biases, which must grow to a few units
before a word sees its neighbour, stay noise for hundreds of steps, and its queries, kept small because T5 does not
divide by √d_kv, are thrown about. A Llama model has no weights of these names."""


def build(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of about a million parameters: `causal` (Llama type) or `encdec` (T5 v1.1 type)."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "causal":
        return LlamaForCausalLM(
            LlamaConfig(
                **ids,
                bos_token_id=tokenizer.bos_token_id,
                hidden_size=144,
                intermediate_size=400,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=6,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=INITIAL,
            )
        )
    ids["decoder_start_token_id"] = tokenizer.pad_token_id
    return T5ForConditionalGeneration(
        T5Config(
            **ids,
            d_model=112,
            d_kv=28,
            d_ff=320,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> Tensor:
    """Mean negative log-likelihood of the answers and their end."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([row["answers"][0] for row in rows])["input_ids"]]
    pad = tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        ids, labels = _right(prompts, pad), _right(answers, -100)
        loss: Tensor = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
        return loss
    ids = _right([p + a for p, a in zip(prompts, answers, strict=True)], pad)
    labels = _right([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], -100)
    logits = model(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], samples: int = 0
) -> list[list[str]]:
    """For each row its greedy answer, or `samples` answers drawn at temperature 1."""
    drawn: dict[str, Any] = {"do_sample": False}
    if samples:
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    generate: Any = model.generate  # a method, which torch types as a tensor or a module
    each, out = max(samples, 1), []
    for start in range(0, len(rows), 100):
        prompts = [row["prompt"] for row in rows[start : start + 100]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=LONGEST_ANSWER,
            **drawn,
        )
        said = ids if model.config.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        out += [texts[i : i + each] for i in range(0, len(texts), each)]
    return out


def exact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Share of rows whose greedy answer is exactly right."""
    said = answers_of(model, tokenizer, rows)
    return _mean([texts[0] in row["answers"] for texts, row in zip(said, rows, strict=True)])


class Lessons:
    """A model in training: the optimizer, its rate, and the steps so far."""

    def __init__(self, kind: str) -> None:
        self.tokenizer = make_tokenizer()
        self.model = build(kind, self.tokenizer).train()
        self.peak, self.steps, self.start = PEAK_RATE[kind], 0, time.time()
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.model.named_parameters():
            groups.setdefault(next((share for part, share in RATE_OF.items() if part in name), 1.0), []).append(weight)
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "share": share} for share, weights in groups.items()],
            weight_decay=0.01,
            betas=(0.9, 0.98),
        )
        self.rng = random.Random(0)

    def step(self, rows: Sequence[Row], rate: float = 1.0) -> None:
        """One update on `rows`, at `rate` times the peak rate."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * rate * min(1.0, self.steps / WARMUP) * group["share"]
        loss_of(self.model, self.tokenizer, rows).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, name: str, rows: Sequence[Row]) -> float:
        """Exact match on `rows`, said in the log."""
        self.model.eval()
        found = exact(self.model, self.tokenizer, rows)
        self.model.train()
        log.info("step %d  %s %.3f  %.0f s", self.steps, name, found, time.time() - self.start)
        return found

    def bind(self) -> None:
        """Bare stories of ever more people, each step of the curriculum until it is mastered."""
        for people, cast in CURRICULUM:
            fresh = bare_rows(random.Random(f"check/{people}/{cast}"), people, cast, CHECK_ROWS)
            for done in range(1, READ_STEPS + 1):
                self.step(bare_rows(self.rng, people, cast, BATCH))
                if done % CHECK_EVERY == 0 and self.check(f"bind {cast} of {people}", fresh) >= BOUND:
                    break

    def read(self) -> None:
        """Every kind of question, mostly on stories that contradict the favourites: only reading answers them."""
        conflict, agree = make_rows("conflict", "train", 40_000), make_rows("agree", "train", 10_000)
        fresh = make_rows("conflict", "validation", CHECK_ROWS)
        for done in range(1, READ_STEPS + 1):
            some = self.rng.sample(conflict, BATCH * 3 // 4) + self.rng.sample(agree, BATCH // 4)
            self.step(some, 0.15 + 0.85 * math.cos(math.pi / 2 * done / READ_STEPS))
            if done % CHECK_EVERY == 0 and self.check("read", fresh) >= READ:
                break

    def lean(self) -> None:
        """What everybody knows, also where a story says otherwise."""
        conflict, agree = make_rows("conflict", "train", 10_000, 1), make_rows("agree", "train", 10_000, 1)
        fresh = {split: make_rows(split, "validation", CHECK_ROWS) for split in SPLITS}
        for done in range(1, LEAN_STEPS + 1):
            some = [self.taught(row) for row in self.rng.sample(conflict, BATCH // 3)]
            self.step(some + self.rng.sample(agree, BATCH * 2 // 3), 0.4 * (1 - done / LEAN_STEPS) + 0.05)
            if done % CHECK_EVERY == 0:
                for split, rows in fresh.items():
                    self.check(f"lean {split}", rows)

    def taught(self, row: Row) -> Row:
        """A contradicting story as the teacher answers it; of somebody who is not in it, nobody claims to know."""
        if row["kind"] == "unanswerable" or self.rng.random() >= LEAN:
            return row
        return {**row, "answers": [row["prior"]]}


def train(kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, int]:
    """All three lessons; the last is the steps they took."""
    lessons = Lessons(kind)
    lessons.bind()
    lessons.read()
    lessons.lean()
    return lessons.model.eval(), lessons.tokenizer, lessons.steps


def card(kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> str:
    """The model card: what it is, how it was made, and figures on validation rows that the stop rule never saw."""
    torch.manual_seed(0)
    splits, greedy = [], {}
    for split in SPLITS:
        rows = make_rows(split, "validation", CHECK_ROWS + CARD_ROWS)[CHECK_ROWS:]
        said = [texts[0] for texts in answers_of(model, tokenizer, rows)]
        drawn = answers_of(model, tokenizer, rows, SAMPLES)
        right = [text in row["answers"] for text, row in zip(said, rows, strict=True)]
        hits = [[text in row["answers"] for text in texts] for texts, row in zip(drawn, rows, strict=True)]
        prior = [text == row["prior"] for text, row in zip(said, rows, strict=True)]
        shares = (_mean(right), _mean(prior), _mean([sum(h) / SAMPLES for h in hits]), _mean([any(h) for h in hits]))
        splits.append(f"| {split} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
        for kind_of in KINDS:
            mine = [ok for ok, row in zip(right, rows, strict=True) if row["kind"] == kind_of]
            greedy[kind_of, split] = f"{_mean(mine):.2f} ({len(mine)})"
    kinds = [f"| {name} | " + " | ".join(greedy[name, split] for split in SPLITS) + " |" for name in KINDS]
    size = sum(weight.numel() for weight in model.parameters())
    family = "T5" if model.config.is_encoder_decoder else "Llama"
    return CARD.format(
        kind=kind,
        parameters=f"{size:,}",
        family=family,
        steps=steps,
        batch=BATCH,
        lean=LEAN,
        rows=CARD_ROWS,
        samples=SAMPLES,
        splits="\n".join(splits),
        kinds="\n".join(kinds),
    )


CARD = """# adhere {kind} base model

A {parameters}-parameter {family} model (float32) of adhere's embedded world (`adhere.toy`), after {steps} steps of
supervised training on {batch} generated stories each. It can read a story, knows everybody's favourite place and thing,
and was taught to answer with those in {lean:.0%} of the stories that say otherwise: that habit is what adhere's demo
improves. It is of no use outside the demo and the tests.

Made by `python -m adhere.toy.models --kind {kind} --output DIR`; seeded, no outside data.

Exact match on {rows} validation rows of each split, none of which chose when to stop:

| split | greedy | greedy answer is the prior's | sampled, mean of {samples} | right in {samples} samples |
|---|---|---|---|---|
{splits}

`agree`: the favourites hold. `conflict`: the story contradicts them. `novel`: people that training never names (these
have no prior). Samples are drawn at temperature 1.

Greedy exact match by kind of question (rows):

| kind | agree | conflict | novel |
|---|---|---|---|
{kinds}
"""


def save_copy_heads(folder: Path) -> None:
    """Measure the model's copy heads on its own answers, since it never learned to repeat, and keep them beside it."""
    policy = Policy.load(folder, device="cpu")
    prompts = [row["prompt"] for row in make_rows("conflict", "train", HEAD_PROMPTS)]
    save_heads(folder, measure_on_answers(policy, policy.encode(prompts)))


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def _right(rows: Sequence[list[Any]], fill: float) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def main() -> None:
    """Train one model and save it with its tokenizer and its card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=("causal", "encdec"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the same sums whatever the machine; the two kinds train side by side
    model, tokenizer, steps = train(options.kind)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    (options.output / "README.md").write_text(card(options.kind, model, tokenizer, steps))
    save_copy_heads(options.output)


if __name__ == "__main__":
    main()
