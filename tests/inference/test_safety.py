"""A model folder is data: nothing in it is run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from stages.errors import StageError
from stages.inference.generate import Student


class _Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._path,)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep_weights", [True, False])
def test_S4_a_booby_trapped_model_folder_does_not_run(student_folder: Path, tmp_path: Path, keep_weights: bool) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(student_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(sprung)))
    (folder / "modeling_trap.py").write_text(f"import pathlib; pathlib.Path({str(sprung)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSeq2SeqLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Trap"}
    (folder / "config.json").write_text(json.dumps(config))
    if keep_weights:
        Student.load(folder, device="cpu")
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(StageError):
            Student.load(folder, device="cpu")
    assert not sprung.exists()
