"""Low-rank adapters: trained by attention, saved beside the merged model, loaded again on their base.

python examples/lora.py [--model PATH_OR_HUB_ID] [--steps 20] [--output runs/lora]
"""

import argparse

from peft import PeftModel

from adhere import Lora, Policy, Sampling, TrainConfig, train
from adhere.data import Row, write_jsonl
from adhere.files import new_run_dir
from adhere.toy import make_rows, model_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(model_path("causal")), help="default: the embedded model")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/lora")
options = parser.parse_args()

rows = [Row(row["prompt"]) for row in make_rows("conflict", "train", 200)]
run = new_run_dir(options.output)
write_jsonl(run / "prompts.jsonl", [{"prompt": row.prompt} for row in rows])
config = TrainConfig(
    model=options.model, prompts=str(run / "prompts.jsonl"), output=str(run), lora=Lora(rank=8, alpha=16),
    steps=options.steps, learning_rate=1e-3, sampling=Sampling(max_new_tokens=8),
)  # fmt: skip
policy = Policy.load(options.model, lora=config.lora)
train(config, policy, rows, run, on_step=lambda row: print(f"step {row['step']:.0f}: reward {row['reward']:.3f}"))

# `run / "model"` holds the merged weights, for any tool. `run / "adapter"` is small, and goes onto the base again:
base = Policy.load(options.model)
again = Policy(PeftModel.from_pretrained(base.model, run / "adapter").eval(), base.tokenizer)

prompt = rows[0].prompt
before = again.reference().inspect(prompt, max_new_tokens=8)  # the adapter switched off
after = again.inspect(prompt, max_new_tokens=8)
assert after.response == policy.inspect(prompt, max_new_tokens=8).response
size = sum(file.stat().st_size for file in (run / "adapter").glob("*.safetensors"))
print(f"adapter: {size / 1024:.0f} KiB of {run / 'adapter'}")
print(f"{prompt}\n  before {before.response}\n  after  {after.response}")
