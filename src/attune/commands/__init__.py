"""The commands: what each takes and does. Each parses nothing itself, calls, and hands the result to the console.

A command returns its exit code: 0 done, 3 an audit that found the reward gameable, 130 interrupted with a checkpoint.
"""

from __future__ import annotations

from attune.commands.calibrate import CALIBRATE
from attune.commands.common import Command
from attune.commands.compare import COMPARE
from attune.commands.inspect import INSPECT
from attune.commands.judge import AUDIT, EVAL
from attune.commands.preferences import PREFERENCES
from attune.commands.rank import RANK
from attune.commands.score import SCORE
from attune.commands.serve import SERVE
from attune.commands.train import DEMO, TRAIN

COMMANDS: dict[str, Command] = {
    "demo": DEMO,
    "train": TRAIN,
    "audit": AUDIT,
    "score": SCORE,
    "rank": RANK,
    "inspect": INSPECT,
    "eval": EVAL,
    "calibrate": CALIBRATE,
    "preferences": PREFERENCES,
    "compare": COMPARE,
    "serve": SERVE,
}
