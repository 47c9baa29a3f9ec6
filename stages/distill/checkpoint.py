"""Checkpoints: whole tensors by name in one safetensors file, and a manifest that makes it count.

    checkpoints/step-00000040/{state.safetensors, manifest.json}

- Rank 0 writes the tensors and flushes them to disk, then publishes the manifest by one rename: only then it counts.
- A manifest carries the sha256 of the tensors and of itself. What does not match is passed over, and that is said.
- It also carries the identity of the run: shards, tokenizer, recipe, precision. Another identity is refused by name.
- No pickle. Whole tensors know no ranks: any world size, ZeRO stage or micro-batch goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shards.durable import file_sha256, sync
from stages.distill.engine import MOMENTS, TrainingState
from stages.errors import StageError
from stages.events import Emit, Note

_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _MANIFEST = "state.safetensors", "manifest.json"


class _DamagedError(Exception):
    """This checkpoint does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestone:
    """Where a run stood when it was saved."""

    step: int
    """Steps done."""
    positions: int
    """Positions trained on so far."""
    seconds: float
    """Spent training so far."""
    validation_kl: float | None
    """Measured at this very step, or not at all."""
    untrained: Mapping[str, Any] | None = None
    """The validation report of the student before its first step."""
    difficulty: Mapping[str, float] | None = None
    """Fields of the `Difficulty` of the step before, where temperatures depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFolder:
    """The checkpoints of one run."""

    path: Path
    identity: Mapping[str, Any]
    """Flat names and JSON values of all that a resumed run must share with the one that saved."""

    def save(self, milestone: Milestone, state: TrainingState, *, keep: int) -> None:
        """Publish a checkpoint, then remove all but the newest `keep` and the best by validation. Rank 0 only.

        Raises StageError where the disk refuses; the checkpoints before stay as they are.
        """
        folder = self.path / f"step-{milestone.step:08d}"
        try:
            self._publish(folder, milestone, state)
            self._remove_old(folder, keep)
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"checkpoint {folder} could not be written, or those before it not removed: {error}",
                hint="make room, then run again: training goes on from the newest checkpoint that is whole",
            ) from error

    def newest(self, emit: Emit) -> tuple[Milestone, TrainingState] | None:
        """The newest checkpoint that is whole; None where there is none.

        Damaged ones are named in a warning and passed over. Raises StageError where the newest whole one was written
        by a run of another identity, naming what differs.
        """
        for folder in reversed(self._folders()):
            try:
                manifest = _read_manifest(folder)
                self.require_same_identity(folder, manifest["identity"])
                return Milestone(**manifest["milestone"]), _read_state(folder, manifest)
            except _DamagedError as error:
                text = f"checkpoint {folder.name} is damaged ({error}); going on from the one before it"
                emit(Note(stage="distill", text=text, level="warning"))
        return None

    def _publish(self, folder: Path, milestone: Milestone, state: TrainingState) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).unlink(missing_ok=True)  # a damaged one that training has now come back to
        sync(folder)
        parts = {"weights": state.weights, **state.moments, "records": state.records}
        tensors = {f"{part}/{name}": tensor for part, by_name in parts.items() for name, tensor in by_name.items()}
        save_file(tensors, folder / _TENSORS)
        sync(folder / _TENSORS)
        manifest = {
            "identity": dict(self.identity),
            "loss_scale": dict(state.loss_scale),
            "milestone": {name: getattr(milestone, name) for name in milestone.__slots__},
            "sha256": file_sha256(folder / _TENSORS),
            "updates": state.updates,
        }
        temporary = folder / f"{_MANIFEST}.tmp"
        temporary.write_text(json.dumps({**manifest, "seal": _seal(manifest)}, indent=1), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, folder / _MANIFEST)  # noqa: PTH105
        sync(folder)
        sync(self.path)

    def _folders(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(
            path for path in self.path.iterdir() if _NAME.fullmatch(path.name) and (path / _MANIFEST).is_file()
        )

    def _remove_old(self, saved: Path, keep: int) -> None:
        """What stands above the one just saved was passed over as damaged: it is neither new nor the best."""
        folders = [folder for folder in self._folders() if folder <= saved and _seems_whole(folder)]
        kept = {*folders[-keep:], *_best(folders)}
        for folder in self.path.iterdir():
            if _NAME.fullmatch(folder.name) and folder not in kept:
                (folder / _MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def require_same_identity(self, folder: Path, theirs: Mapping[str, Any]) -> None:
        """Raise StageError naming the first thing in which `folder` was made by another run."""
        ours = json.loads(json.dumps(dict(self.identity)))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise StageError(
                    f"{folder} was made with {name} = {theirs.get(name)!r}; now it is {ours.get(name)!r}",
                    hint="use another run directory, or the shards and settings that this one was started with",
                )


def _best(folders: Iterable[Path]) -> list[Path]:
    """The checkpoint with the lowest validation KL, if any was measured."""
    found = [(_read_manifest(folder)["milestone"]["validation_kl"], folder) for folder in folders]
    measured = [(kl, folder) for kl, folder in found if kl is not None]
    return [min(measured)[1]] if measured else []


def _seems_whole(folder: Path) -> bool:
    """Whether the manifest is whole and the tensors have their length: what is known without reading them all."""
    try:
        _read_manifest(folder)
        with safe_open(folder / _TENSORS, "pt"):
            return True
    except (_DamagedError, OSError, SafetensorError):
        return False


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("seal") != _seal(manifest):
            raise _DamagedError("its manifest differs from its seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _DamagedError(f"its manifest cannot be read: {error}") from error
    return manifest


def _read_state(folder: Path, manifest: Mapping[str, Any]) -> TrainingState:
    try:
        if file_sha256(folder / _TENSORS) != manifest["sha256"]:
            raise _DamagedError("its tensors differ from their checksum")
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise _DamagedError(f"its tensors cannot be read: {error}") from error
    parts: dict[str, dict[str, Any]] = {part: {} for part in ("weights", *MOMENTS, "records")}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return TrainingState(
        weights=parts["weights"],
        moments={moment: parts[moment] for moment in MOMENTS},
        updates=manifest["updates"],
        loss_scale=manifest["loss_scale"],
        records=parts["records"],
    )


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
