"""A finished model given away: the whole folder copied to a new place with its card, there whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from pipeline.card import CARD, model_card
from pipeline.errors import PipelineError, UsageError
from pipeline.run import RunFolder
from shards.durable import file_sha256, sync

_NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_BYTECODE = "__pycache__"


def export_model(run: RunFolder, target: Path) -> list[str]:
    """Copy the run's final model to `target`, a folder that must not be there yet, and return lines to print.

    Every copied file is compared with its source and on the disk before the folder gets its name. Raises UsageError
    where something is at `target`, PipelineError where the model is not whole or a copy differs.
    """
    card = model_card(run)
    missing = [name for name in _NEEDED if not (run.final_model / name).is_file()]
    if missing:
        raise PipelineError(
            f"{run.final_model} is not a whole model; it lacks {', '.join(missing)}",
            hint="move it away and run make distill: it writes the model again from its last checkpoint",
        )
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} is there already", hint="name a folder that is not there yet, or remove that one")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        left_out = shutil.ignore_patterns(_BYTECODE, CARD)
        # Contents only: what is given away is readable by whom its new place lets read.
        shutil.copytree(run.final_model, staging, ignore=left_out, copy_function=shutil.copyfile)
        (staging / CARD).write_text(card, encoding="utf-8")
        _require_equal(run.final_model, staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        for path in (*files, *(path for path in staging.rglob("*") if path.is_dir()), staging):
            sync(path)
        _give_name(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return [f"exported   {target}: {len(files)} files, {size / 1e6:.1f} MB, {CARD} among them"]


def _require_equal(source: Path, copy: Path) -> None:
    for path in copy.rglob("*"):
        original = source / path.relative_to(copy)
        if path.is_file() and path.name != CARD and file_sha256(path) != file_sha256(original):
            raise PipelineError(f"{path} differs from {original}", hint="check the disk, then run it again")


def _give_name(staging: Path, target: Path) -> None:
    """Rename; the kernel refuses where a folder with content has come to stand there in the meantime."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{target} is there already", hint="name a folder that is not there yet") from error
        raise
    sync(target.parent)
