"""A model folder to a model: what is missing, damaged or no student is refused, and nothing in it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stages.errors import StageError
from stages.student.config import MiniCodformerConfig
from stages.student.model import MiniCodformerForConditionalGeneration


def newest_model(runs: Path = Path("runs")) -> Path:
    """The `runs/*/final_model` whose weights are the newest. Raises StageError where there is none."""
    weights = sorted(runs.glob("*/final_model/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise StageError(
            f"no finished run under {runs.resolve()}", hint="run make demo, or name a run or a model's folder"
        )
    return weights[-1].parent


def load_model(folder: Path) -> MiniCodformerForConditionalGeneration:
    """Read the weights in fp32 onto the CPU. Raises StageError."""
    read_config(folder)
    hint = "copy it again, or move it away and run make distill: it writes the model again from its last checkpoint"
    try:
        model, loaded = MiniCodformerForConditionalGeneration.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors and transformers raise bare Exception for damaged files
        raise StageError(f"the student in {folder} cannot be read: {error}", hint=hint) from error
    wrong = sorted(
        {str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loaded[kind]}
    )
    if wrong:
        raise StageError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong[:3])} …", hint=hint)
    student: MiniCodformerForConditionalGeneration = model.eval()
    return student


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a student. Raises StageError where there is none, or where it is another model's."""
    hint = "name the final_model folder of a finished run"
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except FileNotFoundError as error:
        raise StageError(f"no model in {folder}: there is no config.json", hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder / 'config.json'} cannot be read: {error!r}", hint=hint) from error
    if model_type != MiniCodformerConfig.model_type:
        raise StageError(f"{folder} holds a {model_type!r} model, not a student", hint=hint)
    return config
