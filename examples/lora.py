"""Low-rank adapters: trained by attention, saved beside the merged model, loaded again on their base.

python examples/lora.py [--model PATH_OR_HUB_ID] [--steps 20] [--output runs/lora]
"""

import argparse
from pathlib import Path

from peft import PeftModel

from adhere import Lora, Policy, train
from adhere.toy import make_rows, model_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(model_path("causal")), help="default: the embedded model")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/lora")
options = parser.parse_args()

stories, run = make_rows("conflict", "train", 200), Path(options.output)
policy = Policy.load(options.model, lora=Lora(rank=8, alpha=16))
train(
    policy, stories, output=run, steps=options.steps, learning_rate=1e-3, max_new_tokens=8,
    on_step=lambda row: print(f"step {row['step']:.0f}: reward {row['reward']:.3f}"),
)  # fmt: skip

# `run / "model"` holds the merged weights, for any tool. `run / "adapter"` is small, and goes onto the base again:
base = Policy.load(options.model)
again = Policy(PeftModel.from_pretrained(base.model, run / "adapter").eval(), base.tokenizer)

prompt = stories[0]["prompt"]
before = again.reference().inspect(prompt, max_new_tokens=8)  # the adapter switched off
after = again.inspect(prompt, max_new_tokens=8)
assert after.response == policy.inspect(prompt, max_new_tokens=8).response
size = sum(file.stat().st_size for file in (run / "adapter").glob("*.safetensors"))
print(f"adapter: {size / 1024:.0f} KiB of {run / 'adapter'}")
print(f"{prompt}\n  before {before.response}\n  after  {after.response}")
