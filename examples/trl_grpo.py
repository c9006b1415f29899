"""TRL's GRPOTrainer on adhere's attention reward: no labels, no reward model.

python examples/trl_grpo.py [--model PATH] [--steps 20] [--output runs/trl]      (needs adhere[trl])
"""

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from adhere import Policy
from adhere.integrations.trl import AttentionReward
from adhere.toy import make_rows, model_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(model_path("causal")), help="default: the embedded model")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/trl")
options = parser.parse_args()

policy = Policy.load(options.model)
config = GRPOConfig(
    output_dir=options.output, max_steps=options.steps, learning_rate=1e-4, per_device_train_batch_size=32,
    num_generations=8, max_completion_length=8, beta=0.02, logging_steps=1, save_strategy="no", report_to=[],
    bf16=policy.device.type == "cuda", use_cpu=policy.device.type == "cpu",
)  # fmt: skip
trainer = GRPOTrainer(
    model=policy.model,
    processing_class=policy.tokenizer,
    reward_funcs=AttentionReward(policy),  # a frozen copy of the policy as it is now reads the responses
    args=config,
    train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in make_rows("conflict", "train", 500)]),
)
trainer.train()
trainer.save_model()
