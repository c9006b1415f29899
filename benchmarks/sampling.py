"""Seconds a token of sampling K responses to one long prompt: adhere beside transformers' `generate`, in turns.

    python benchmarks/sampling.py --model MODEL [--prompts 256 1024 2048] [--samples 8] [--tokens 24] [--threads 2]

Both draw as many tokens from the same model, in float32. Seconds a token are those of a draw less those of a draw of
one token, divided by the tokens between; the ratio is the median of neighbouring draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import torch
from step import Step, in_turns, ratio

from adhere.model.policy import Policy
from adhere.model.settings import Sampling


def draws(policy: Policy, length: int, samples: int, tokens: int) -> dict[str, Step]:
    """A draw of one token and of `tokens`, by adhere and by `generate`."""
    prompts = policy.encode_texts([" ".join(["word"] * length)])

    def ours(count: int) -> None:
        policy.network.generation_config.min_new_tokens = count
        policy.sample(prompts, samples, sampling=Sampling(max_new_tokens=count))

    def theirs(count: int) -> None:
        policy.network.generation_config.min_new_tokens = count
        policy.network.generate(
            prompts.ids, attention_mask=prompts.mask.long(), do_sample=True, top_k=0, num_return_sequences=samples,
            max_new_tokens=count,
        )  # fmt: skip

    return {
        f"{name} {n}": partial(way, n) for name, way in (("adhere", ours), ("generate", theirs)) for n in (1, tokens)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal model: folder or hub id")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024, 2048], help="tokens of the prompt")
    for name, default in (("samples", 8), ("tokens", 24), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = Policy.load(options.model, dtype="float32", device="cpu")
    for length in options.prompts:
        taken = in_turns(draws(policy, length, options.samples, options.tokens), options.rounds)
        told: dict[str, object] = {"prompt": length, "samples": options.samples}
        each = {}
        for name in ("adhere", "generate"):
            pairs = zip(taken[f"{name} {options.tokens}"], taken[f"{name} 1"], strict=True)
            each[name] = [(long - one) / (options.tokens - 1) for long, one in pairs]
            told[f"{name}_seconds_a_token"] = round(statistics.median(each[name]), 4)
            told[f"{name}_seconds"] = round(statistics.median(taken[f"{name} {options.tokens}"]), 2)
        told["generate_over_adhere_a_token"] = ratio(each["generate"], each["adhere"])
        told["generate_over_adhere"] = ratio(taken[f"generate {options.tokens}"], taken[f"adhere {options.tokens}"])
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
