"""Set before anything is imported: no network, no more threads than there are cores, the same examples every time."""

from __future__ import annotations

import os
import tempfile

os.environ["ADHERE_CACHE"] = tempfile.mkdtemp(prefix="adhere-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Ray reads it when it is imported, which another library may do before `integrations.ray` sets it.
os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core already: threads of each would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings
from jaxtyping import install_import_hook

# The shapes that the pure core declares are checked at every call, here alone: a run pays nothing for them.
SHAPED = ("adhere.learn.advantages", "adhere.learn.batch", "adhere.learn.losses", "adhere.reward.group")
install_import_hook(SHAPED, "beartype.beartype")

settings.register_profile("adhere", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("adhere")
