"""The Triton kernels beside plain torch: on a GPU where there is one, else by Triton's interpreter.

Triton is no part of the set-up for CPUs, where vLLM would take it for a GPU's; for these tests it is put into a folder
of its own, in the version that the set-up for GPUs installs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "requirements"))
from install import ROOT, uv_program

PACKAGES = ("triton", "fla-core")


def locked(names: tuple[str, ...]) -> str:
    """The lines of requirements/cuda.txt for some packages, with their hashes."""
    blocks = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return "\n".join(line for line in blocks if line.split("==")[0] in names)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """What a process needs to run the kernels."""
    mine = {**os.environ, "PYTHONPATH": str(ROOT)}
    if torch.cuda.is_available():
        yield mine
        return
    folder = tmp_path_factory.mktemp("kernels")
    wanted = folder / "requirements.txt"
    wanted.write_text(locked(PACKAGES), encoding="utf-8")
    install = [*uv_program(), "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python", sys.executable]
    subprocess.run([*install, "--target", str(folder / "packages"), "--requirements", str(wanted)], check=True)
    yield {**mine, "PYTHONPATH": f"{ROOT}:{folder / 'packages'}", "TRITON_INTERPRET": "1"}
    subprocess.run(["rm", "-r", str(folder / "packages")], check=True)  # three quarters of a gigabyte


def errors_of(kernel: str, environment: Mapping[str, str]) -> Mapping[str, float]:
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("errors.py")), kernel]
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Mapping[str, float] = json.loads(done.stdout)
    return found


def test_the_attention_kernel_equals_plain_torch(environment: Mapping[str, str]) -> None:
    errors = errors_of("attention", environment)
    assert len(errors) >= 3 * 3 * 4 * 2
    assert {case: error for case, error in errors.items() if not error < 1e-6} == {}


def test_O9_the_scan_of_flash_linear_attention_equals_the_loop(environment: Mapping[str, str]) -> None:
    errors = errors_of("scan", environment)
    assert len(errors) >= 2 * 7
    tolerance = 5e-3 if torch.cuda.is_available() else 1e-5  # on a GPU products are rounded to TF32
    assert {case: error for case, error in errors.items() if not error < tolerance} == {}
