"""T3: which checkpoints stay, where some of them are damaged. States are small; no student is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stages.distill.checkpoint import CheckpointFolder, Milestone
from stages.distill.engine import MOMENTS, TrainingState
from stages.errors import StageError
from stages.events import silent


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(path=tmp_path / "checkpoints", identity={"distill.seed": 0})


def save(checkpoints: CheckpointFolder, step: int, *, keep: int, kl: float | None = None) -> None:
    weights, *moments = ({"weight": torch.full((64,), float(step))} for _ in ("weights", *MOMENTS))
    state = TrainingState(
        weights=weights, moments=dict(zip(MOMENTS, moments, strict=True)), updates=step, loss_scale={}
    )
    checkpoints.save(Milestone(step=step, positions=0, seconds=0.0, validation_kl=kl), state, keep=keep)


def newest(checkpoints: CheckpointFolder) -> int:
    found = checkpoints.newest(silent)
    assert found is not None
    milestone, state = found
    assert (state.weights["weight"] == milestone.step).all()
    return milestone.step


def standing(checkpoints: CheckpointFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.path.iterdir())


def flip_the_last_bit(checkpoints: CheckpointFolder, step: int) -> None:
    tensors = checkpoints.path / f"step-{step:08d}" / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)


def cut(checkpoints: CheckpointFolder, step: int) -> None:
    tensors = checkpoints.path / f"step-{step:08d}" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])


def test_the_newest_and_the_best_stay(checkpoints: CheckpointFolder) -> None:
    for step, kl in ((2, 0.9), (4, 0.5), (6, None), (8, 0.7), (10, None)):
        save(checkpoints, step, keep=2, kl=kl)
    assert standing(checkpoints) == [4, 8, 10]


def test_T3_what_is_saved_below_a_damaged_checkpoint_is_the_newest(checkpoints: CheckpointFolder) -> None:
    save(checkpoints, 6, keep=2)
    save(checkpoints, 9, keep=2, kl=0.1)
    flip_the_last_bit(checkpoints, 9)
    assert newest(checkpoints) == 6
    save(checkpoints, 8, keep=1)  # stopped before it came to step 9 again
    assert standing(checkpoints) == [8]
    assert newest(checkpoints) == 8


def test_T3_none_is_removed_for_one_that_has_lost_part_of_its_tensors(checkpoints: CheckpointFolder) -> None:
    for step, kl in ((3, 0.2), (6, 0.1)):
        save(checkpoints, step, keep=2, kl=kl)
    cut(checkpoints, 6)
    assert newest(checkpoints) == 3
    save(checkpoints, 8, keep=2, kl=0.3)
    assert standing(checkpoints) == [3, 8]
    save(checkpoints, 9, keep=1, kl=0.3)
    assert standing(checkpoints) == [3, 9], "the best of those that are whole"


def test_a_checkpoint_that_cannot_be_removed_is_a_stage_error(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    save(checkpoints, 3, keep=1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StageError, match="Permission denied") as refused:
        save(checkpoints, 6, keep=1)
    assert refused.value.hint
    assert newest(checkpoints) == 6
