"""Every example runs as a user runs it, on the embedded or a tiny model. `trl_grpo.py` runs in `test_trl.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

from adhere import Policy
from tests.families import save

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(example, folder, *options):
    """What the example prints, run from an empty folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *options],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_reranking_tells_the_best_from_the_worst_and_makes_pairs(tmp_path):
    said = run("rerank.py", tmp_path, "--prompts", "3", "--samples", "4")
    rewards = [float(value) for value in re.findall(r"\(reward (-?[\d.]+)\)", said)]
    assert len(rewards) == 6 and all(best >= worst for best, worst in zip(rewards[::2], rewards[1::2], strict=True))
    assert "of 3 prompts give a pair" in said and "'rejected'" in said


def test_a_signal_of_ones_own_is_scored_and_trained_on(tmp_path):
    said = run("own_signal.py", tmp_path, "--steps", "2", "--output", "run")
    peaks = [float(value) for value in re.findall(r"peak (\d\.\d+)", said)]
    assert len(peaks) == 2 and all(0 < peak < 1 for peak in peaks)
    assert "own_signal:peak" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_adapter_is_trained_saved_and_loaded_again(tmp_path):
    said = run("lora.py", tmp_path, "--steps", "2", "--output", "run")
    assert "step 2: reward" in said and "after" in said
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        raised = [adapter.get_tensor(name) for name in adapter.keys() if "lora_B" in name]  # noqa: SIM118
    assert raised and any(weight.abs().max() > 0 for weight in raised)  # zero before training
    assert Policy.load(tmp_path / "run" / "model", device="cpu").network.num_parameters() > 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_by_its_id_is_inspected_and_scores_answers(family, tmp_path):
    model = save(family, tmp_path / "model")
    said = run("hub_model.py", tmp_path, "--model", str(model), "--prompt", "w1 is in w2 . where is w1 ?",
               "--responses", "w2", "w3")  # fmt: skip
    assert "looked at, all heads:" in said
    rewards = [float(line.split()[0]) for line in said.splitlines() if "(coherence" in line]
    assert len(rewards) == 2 and rewards[0] >= rewards[1]


def test_the_notebook_runs_and_shows_its_views(tmp_path, monkeypatch):
    own = {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    for name, value in {**ENVIRONMENT, **own}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # kept without outputs, which would go stale
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.data for cell in code for output in cell.outputs if output.output_type == "execute_result"]
    views = [data["text/html"] for data in shown if "text/html" in data]
    assert len(views) == 2 and all("mary" in view and "</script></div>" in view for view in views)
    assert "looked at" in next(data["text/plain"] for data in shown if "text/html" in data)
    printed = [output.text for output in code[-1].outputs if output.output_type == "stream"]
    assert "".join(printed).count("best") == 4


def test_every_example_stands_in_the_list():
    listed = (EXAMPLES / "README.md").read_text()
    missing = [file.name for file in EXAMPLES.iterdir() if file.is_file() and file.name not in listed]
    assert missing == ["README.md"]
