"""The commands: what each takes and does. Each parses nothing itself, calls, and hands the result to the console.

A command returns its exit code: 0 done, 3 an audit that found the reward gameable, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

from adhere.commands.audit import AUDIT
from adhere.commands.bench import BENCH
from adhere.commands.calibrate import CALIBRATE
from adhere.commands.check import CHECK
from adhere.commands.common import Command
from adhere.commands.compare import COMPARE
from adhere.commands.eval import EVAL
from adhere.commands.heads import HEADS
from adhere.commands.inspect import INSPECT
from adhere.commands.preferences import PREFERENCES
from adhere.commands.rank import RANK
from adhere.commands.score import SCORE
from adhere.commands.serve import SERVE
from adhere.commands.train import DEMO, TRAIN

COMMANDS: dict[str, Command] = {
    "demo": DEMO,
    "train": TRAIN,
    "audit": AUDIT,
    "bench": BENCH,
    "score": SCORE,
    "check": CHECK,
    "rank": RANK,
    "inspect": INSPECT,
    "heads": HEADS,
    "eval": EVAL,
    "calibrate": CALIBRATE,
    "preferences": PREFERENCES,
    "compare": COMPARE,
    "serve": SERVE,
}
