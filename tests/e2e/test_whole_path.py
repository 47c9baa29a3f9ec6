"""The whole path by the command line alone: rows, a real teacher through vLLM, shards, two ranks, a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"
RECIPE = """
[corpus]
train_size = 12
val_size = 4

[teacher]
model = "demo:smollm2-135m-instruct"
max_model_len = 512

[cache]
records_per_shard = 6

[student]
hidden_size = 64
encoder_layers = 1
decoder_layers = 1
intermediate_size = 128

[distill]
epochs = 2
global_batch = 4

[generation]
prompts = 1
max_new_tokens = 8
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A user's folder with a recipe and rows, one of them broken."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.toml").write_text(RECIPE)
    rows = [
        {
            "input": f"What is {n} plus {n + 1}?",
            "reasoning_content": f"{n} + {n} is {n + n}, and one more is {n + n + 1}.",
            "content": str(n + n + 1),
            "repo_name": "sums",
            "score": 1.0,
        }
        for n in range(20, 40)
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines[:10], "{broken", *lines[10:]]))
    return folder


def cli(place: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, str(CLI), *words], cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rows_become_a_student_that_answers(place: Path) -> None:
    recipe = ("--recipe", "mine.toml", "--data", "rows.jsonl")
    assert "12 train and 4 validation samples" in cli(place, "prepare", *recipe)
    assert json.loads((place / "data/processed/rejects.jsonl").read_text().splitlines()[0])["line"] == 11

    run = place / "runs/mine"
    assert "3 files, 16 records" in cli(place, "teacher-cache", *recipe)
    shards = {path.name: path.read_bytes() for path in (run / "shards").glob("*.arrow")}
    assert "all intact" in cli(place, "verify-shards", str(run / "shards"))
    inspected = cli(place, "inspect-shard", str(run / "shards/train-00000.arrow"), "--sample", "0")
    assert "vllm" in inspected
    assert "What is" in inspected

    assert "on 2 ranks" in cli(place, "distill", *recipe, "--gpus", "2")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["distill"]["finished"]
    assert summary["distill"]["steps"] == 6
    assert summary["distill"]["validation"]["kl"] < summary["distill"]["untrained"]["kl"]

    cli(place, "evaluate", "--name", "mine")
    report = json.loads((run / "summary.json").read_text())["evaluate"]
    rounding = 1e-4 if summary["distill"]["precision"] == "fp32" else 5e-3  # training validates in its own precision
    assert report["validation"]["kl"] == pytest.approx(summary["distill"]["validation"]["kl"], abs=rounding)
    assert len(report["samples"]) == 1
    cli(place, "generate", "What is 20 plus 21?", "--name", "mine", "--max-new-tokens", "4")

    model = (run / "final_model/model.safetensors").read_bytes()
    cli(place, "prepare", *recipe)
    cli(place, "teacher-cache", *recipe)
    assert "finished already" in cli(place, "distill", *recipe, "--gpus", "2")
    assert "up to date" in cli(place, "evaluate", "--name", "mine")
    assert {path.name: path.read_bytes() for path in (run / "shards").glob("*.arrow")} == shards
    assert (run / "final_model/model.safetensors").read_bytes() == model
