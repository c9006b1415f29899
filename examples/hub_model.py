"""Any model of the Hub, by its id: what it answers, where it looked, what the reward says of other answers.

python examples/hub_model.py [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--prompt TEXT] [--responses A B …]

Without --model the embedded model answers, offline. A folder that holds a model serves as an id does.
"""

import argparse

from adhere import Policy, Reward
from adhere.toy import model_path

STORY = "mary went to the garden . john is in the office . where is mary ? answer :"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(model_path("causal")), help="hub id or folder, causal or encoder–decoder")
parser.add_argument("--prompt", default=STORY)
parser.add_argument("--responses", nargs="+", default=["garden", "office", "kitchen"])
options = parser.parse_args()

policy = Policy.load(options.model)
print(policy.kind)
print(policy.inspect(options.prompt, max_new_tokens=32))

# Not `attention`: it reads copy heads, and a tiny model may have none to be found.
reward = Reward.resolve({"weights": {"coherence": 1.0, "reliance": 0.5, "coverage": 0.0}, "normalise": "none"}, policy)
scores = reward.score([options.prompt] * len(options.responses), options.responses)
for place in scores.reward.argsort(descending=True).tolist():
    signals = "  ".join(f"{name} {float(values[place]):.3f}" for name, values in scores.signals.items())
    print(f"{float(scores.reward[place]):8.3f}  {options.responses[place]}  ({signals})")
