"""The finished model: a folder that transformers loads where this project is not. It appears whole or not at all.

Weights, configuration, modelling files (through `auto_map`), generation settings and tokenizer. Its card is written by
`pipeline/card.py`, which knows the whole run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from shards.durable import sync
from shards.manifest import HEAD_PCA_FILE
from shards.reader import ShardSet
from stages.errors import StageError
from stages.student.model import MiniCodformerForConditionalGeneration

FACTS = "training.json"


def export_model(
    folder: Path,
    student: MiniCodformerForConditionalGeneration,
    weights: Mapping[str, Tensor],
    shards: ShardSet,
    facts: Mapping[str, Any],
) -> None:
    """Write `student` with `weights`, by parameter name, next to the teacher's tokenizer and `facts` on its training.

    Raises Corrupt where a tokenizer file is not the one that the shards were sealed with, StageError where the disk
    refuses; `folder` is not there then.
    """
    for name, parameter in student.named_parameters():
        parameter.data.copy_(weights[name])
    try:
        _publish(folder, student, shards, facts)
    except (OSError, SafetensorError) as error:
        raise StageError(
            f"the model {folder} could not be written: {error}",
            hint="make room, then run again: the last checkpoint holds its weights",
        ) from error


def _publish(
    folder: Path, student: MiniCodformerForConditionalGeneration, shards: ShardSet, facts: Mapping[str, Any]
) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    disable_progress_bar()
    student.save_pretrained(temporary)
    for name in shards.manifest.teacher_files:
        if name != HEAD_PCA_FILE:
            (temporary / name).write_bytes(shards.teacher_file(name))
    (temporary / FACTS).write_text(json.dumps(dict(facts), indent=1) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    os.replace(temporary, folder)  # noqa: PTH105
    sync(folder.parent)


def exported_facts(folder: Path) -> dict[str, Any] | None:
    """What `export_model` was told, if it has finished. Raises StageError for a folder that it did not write."""
    if not folder.exists():
        return None
    if not (folder / FACTS).is_file():
        raise StageError(
            f"{folder} was not written by a training run", hint="move it away, or use another run directory"
        )
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts
