"""Makes a small causal model of real text: bAbI, FairytaleQA and Self-Instruct rows, from a config and a new tokenizer.

    python benchmarks/real_model.py --data ../shared/data --output runs/real/base [--steps 800]
    python benchmarks/real_model.py --data ../shared/data --output runs/real/babi --sets babi --hold-out --steps 3000

It learns to answer many bAbI questions and little else: enough to post-train and to measure, in minutes on two cores.
With `--hold-out` every second row of bAbI is kept from it, for post-training on prompts that it has not learned by
heart: OUTPUT/held-out.jsonl.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adhere.data import Row, read_rows, write_jsonl

SETS = {"babi": 6, "fairytaleqa": 1, "self_instruct": 1}
"""Data set → how often its training rows are seen, relative to their number."""
VOCAB = 4096
LONGEST = 400
"""Tokens of a training row; longer ones are left out."""
TOKENS = 3000
"""Tokens of a batch."""
PEAK_RATE = 2e-3
PROMPT_WEIGHT = 0.1


def training_rows(data: Path, names: Sequence[str], hold_out: bool) -> tuple[list[tuple[str, str]], list[Row]]:
    """(prompt, response) of every training row, repeated as `SETS` says; and the rows of bAbI that are held out."""
    found, held = [], []
    for name in names:
        rows = read_rows(data / name / "train.jsonl")
        if hold_out and name == "babi":
            rows, held = rows[::2], rows[1::2]
        found += [
            (row.prompt, said) for row in rows if (said := response_of(row)) and isinstance(row.prompt, str)
        ] * SETS[name]
    return found, held


def response_of(row: Row) -> str | None:
    """The right response that a row gives: its first answer, or its response."""
    return row.answers[0] if row.answers else row.response


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown to it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def train(rows: Sequence[tuple[str, str]], steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Supervised training on `steps` batches of about `TOKENS` tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([f"{prompt} {said}" for prompt, said in dict.fromkeys(rows)])
    ids = [
        (prompt, [*said, tokenizer.eos_token_id])
        for prompt, said in zip(
            tokenizer([prompt for prompt, _ in rows])["input_ids"],
            tokenizer([said for _, said in rows])["input_ids"],
            strict=True,
        )
        if len(prompt) + len(said) < LONGEST
    ]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, start = random.Random(0), time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, step / 100) * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps))
        loss = loss_of(model, draw(ids, rng))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return model.eval(), tokenizer


def draw(rows: Sequence[tuple[list[int], list[int]]], rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Rows of like length, about `TOKENS` tokens with their padding."""
    pool = sorted(rng.sample(rows, 512), key=lambda row: len(row[0]) + len(row[1]))
    first = rng.randrange(len(pool))
    count = max(1, TOKENS // (len(pool[first][0]) + len(pool[first][1])))
    return list(pool[max(0, first - count + 1) : first + 1])


def loss_of(model: LlamaForCausalLM, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean negative log-likelihood, the tokens of the prompt weighted by `PROMPT_WEIGHT`."""
    width = max(len(prompt) + len(said) for prompt, said in batch)
    ids, weight = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width)
    for i, (prompt, said) in enumerate(batch):
        both = len(prompt) + len(said)
        ids[i, :both] = torch.tensor(prompt + said)
        weight[i, : len(prompt)], weight[i, len(prompt) : both] = PROMPT_WEIGHT, 1.0
    logits = model(input_ids=ids, attention_mask=(weight > 0).long(), use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weight[:, 1:]).sum() / weight[:, 1:].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--hold-out", action="store_true", help="keep every second row of bAbI from the model")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    if missing := [name for name in options.sets if not (options.data / name / "train.jsonl").exists()]:
        print(f"error: {options.data}: no {', '.join(missing)} there; give the folder with --data", file=sys.stderr)
        raise SystemExit(2)
    rows, held = training_rows(options.data, options.sets, options.hold_out)
    model, tokenizer = train(rows, options.steps)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    if held:
        write_jsonl(options.output / "held-out.jsonl", [row.fields for row in held])


if __name__ == "__main__":
    main()
