"""Makes the two embedded base models: `python -m attune.world.models --kind causal --output DIR`.

Plain supervised training on `mix` stories, stopped while the model still leans on what it knows of people when a story
says otherwise: that is the room that post-training has to improve. Everything is seeded.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
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

from attune.world.stories import facts, make_rows
from attune.world.tokenizer import make_tokenizer

log = logging.getLogger("attune.world")
CONFLICT_FLOOR = 0.42
AGREE_FLOOR = 0.92
BATCH = 96
# A causal model learns who belongs where from reading stories; an encoder–decoder reads them without predicting them, so
# it is asked without a story this often in a batch.
FACTS = {"causal": 0, "encdec": 24}
# T5 scales its embeddings instead of its logits, so AdamW has further to go.
PEAK_RATE = {"causal": 2e-3, "encdec": 3e-3}
WARMUP = 150


def build(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of about a million parameters."""
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
            )
        )
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
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> Tensor:
    """Mean negative log-likelihood of the answers and their end; a causal model also learns a little from the stories,
    which is where it picks up who belongs where."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [[*tokenizer(row["answers"][0])["input_ids"], tokenizer.eos_token_id] for row in rows]
    pad = tokenizer.pad_token_id
    if isinstance(model, T5ForConditionalGeneration):
        ids, labels = _right(prompts, pad), _right(answers, -100)
        return model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
    ids = _right([p + a for p, a in zip(prompts, answers, strict=True)], pad)
    weight = _right([[0.05] * len(p) + [1.0] * len(a) for p, a in zip(prompts, answers, strict=True)], 0.0)[:, 1:]
    logits = model(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[bool]:
    """Whether the greedy answer to each row is exactly right."""
    right = []
    causal = not model.config.is_encoder_decoder
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        batch = tokenizer([r["prompt"] for r in part], return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
        )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] if causal else 0 :], skip_special_tokens=True)
        right += [text == row["answers"][0] for text, row in zip(texts, part, strict=True)]
    return right


def train(kind: str, steps: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Train until `agree` is learned and `conflict` is inside its band, or `steps` are over."""
    tokenizer = make_tokenizer()
    model = build(kind, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE[kind], weight_decay=0.01, betas=(0.9, 0.98))
    pool = make_rows("mix", "train", 60_000)
    known = facts()
    checks = {split: make_rows(split, "validation", 300) for split in ("agree", "conflict", "novel")}
    rng, start, figures = random.Random(0), time.time(), {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE[kind] * min(1.0, (step + 1) / WARMUP) * (0.1 + 0.9 * math.cos(math.pi / 2 * step / steps))
        asked = rng.sample(known, FACTS[kind])
        loss = loss_of(model, tokenizer, rng.sample(pool, BATCH - len(asked)) + asked)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            model.eval()
            figures = {split: _mean(greedy(model, tokenizer, rows)) for split, rows in checks.items()}
            model.train()
            log.info("step %d loss %.3f %s %.0f s", step + 1, loss.item(), figures, time.time() - start)
            if figures["agree"] >= AGREE_FLOOR and figures["conflict"] >= CONFLICT_FLOOR:
                break
    return model.eval(), tokenizer, {**figures, "steps": step + 1}


def _mean(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


def _right(rows: list[list[Any]], fill: Any) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


CARD = """# attune {kind} base model

A {parameters:,}-parameter {family} model of attune's embedded world (`attune.world`), {steps} steps of supervised
training on generated stories. It knows everybody's favourite place and thing, and leans on them when a story says
otherwise: that is what attune's demo improves. It knows nothing else and is of no use outside the demo and the tests.

Made by `python -m attune.world.models --kind {kind} --output DIR`; no outside data.

| greedy exact match, 300 validation rows each | |
|---|---|
| agree: favourites hold | {agree:.3f} |
| conflict: the story contradicts them | {conflict:.3f} |
| novel: people never met | {novel:.3f} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=("causal", "encdec"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # bit-equal whatever the machine; the two kinds train side by side
    model, tokenizer, figures = train(options.kind, options.steps)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    size = sum(p.numel() for p in model.parameters())
    family = "Llama" if options.kind == "causal" else "T5"
    card = CARD.format(kind=options.kind, parameters=size, family=family, **figures)
    (options.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
