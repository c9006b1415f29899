"""A signal of your own: a function of what the model looked at, weighed with adhere's signals, trained on.

python examples/own_signal.py [--model PATH_OR_HUB_ID] [--steps 20] [--output runs/own-signal]

The command line takes the same, from the folder that holds this file: adhere train --config run.yaml, with
`reward: {weights: {coherence: 1.0, "own_signal:peak": 0.5}}`.
"""

import argparse

from adhere import Policy, score, train
from adhere.toy import make_rows, model_path


def peak(evidence):
    """How much attention a response token gives the one prompt token it looks at most; the mean. [B] in [0, 1]."""
    mask = evidence.reading.response_mask  # [B, R], True = a token of the response
    most = evidence.attention.amax(-1)  # [B, R] of [B, R, P], 0 on padding
    return most.sum(-1) / mask.sum(-1).clamp(min=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path("causal")), help="default: the embedded model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/own-signal")
    options = parser.parse_args()

    spec = {"weights": {"coherence": 1.0, "own_signal:peak": 0.5}, "gates": ["ended"]}  # module:function
    policy = Policy.load(options.model)
    stories = make_rows("conflict", "train", 200)
    answers = [{"prompt": stories[0]["prompt"], "response": place} for place in ("garden", "office")]
    for row in score(policy, answers, reward=spec):
        print(f"{row['response']}:", {name: round(value, 3) for name, value in row["signals"].items()})
    train(
        policy, stories, reward=spec, output=options.output, steps=options.steps, learning_rate=2e-4, max_new_tokens=8,
        on_step=lambda row: print(f"step {row['step']:.0f}: peak {row['signals/own_signal:peak']:.3f}"),
    )  # fmt: skip


if __name__ == "__main__":  # adhere imports this file to find `peak`
    main()
