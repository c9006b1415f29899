"""The best of n samples by attention, and preference pairs for DPO: no labels, no judge, no training.

python examples/rerank.py [--model PATH_OR_HUB_ID] [--prompts 4] [--samples 8]
"""

import argparse

from adhere import Policy, rank
from adhere.ranking import blank_between
from adhere.toy import make_rows, model_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(model_path("causal")), help="default: the embedded model")
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--samples", type=int, default=8)
options = parser.parse_args()

policy = Policy.load(options.model)
stories = make_rows("conflict", "test", options.prompts)
pairs = []
for ranked in rank(policy, stories, num_samples=options.samples, max_new_tokens=8):
    best, worst = ranked.candidates[0], ranked.candidates[-1]
    print(f"{ranked.row.prompt}\n  answer {' or '.join(ranked.row.answers)}")
    for name, found in (("best", best), ("worst", worst)):
        print(f"  {name:<6} {found['response']}  (reward {found['reward']:.2f})")
    if pair := ranked.pair(margin=0.5, blank=blank_between(policy)):
        pairs.append(pair)
print(f"{len(pairs)} of {len(stories)} prompts give a pair for DPOTrainer:", *pairs[:1])
