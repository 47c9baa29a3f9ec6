"""Where compiled loops are kept: nowhere, by several at once, on a full disk, torn. Records decode the same always."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shards
from shards.compiled import compiled

PACKAGE = Path(shards.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "planes-3-topk"
PROGRAM = """
import hashlib, resource, sys
import shards
from shards.reader import ShardSet

if "full disk" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
given = ShardSet(sys.argv[1])
digest = hashlib.sha256()
for split in given.splits:
    for record in given.split(split):
        digest.update(record.ids_NK.tobytes() + record.logprobs_NK.tobytes())
print(shards.__file__, "numba" in sys.modules, digest.hexdigest())
"""


def begin(package: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A process that decodes the golden set with the package in a folder."""
    left = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    given = left | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", PROGRAM, str(GOLDEN), *words]
    return subprocess.Popen(command, env=given, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], package: Path = PACKAGE) -> str:
    """The digest of what it decoded."""
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    file, compiled, digest = said.split()
    assert (file, compiled) == (str(package / "__init__.py"), "True")
    return digest


def kept(folder: Path) -> dict[str, int]:
    """When each file of compiled loops was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.nb[ic]")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digest(cache: Path) -> str:
    """Of three processes that start at once with nothing compiled."""
    started = [begin(PACKAGE, NUMBA_CACHE_DIR=str(cache)) for _ in range(3)]
    (found,) = {ended(process) for process in started}
    return found


def test_three_that_start_cold_at_once_decode_the_same_and_keep_it_for_a_fourth(cache: Path, digest: str) -> None:
    before = kept(cache)
    assert before
    assert ended(begin(PACKAGE, NUMBA_CACHE_DIR=str(cache))) == digest
    assert kept(cache) == before


def test_an_installation_and_a_home_that_cannot_be_written_are_enough(tmp_path: Path, digest: str) -> None:
    """Files stand where folders of caches would be made: root, too, is refused."""
    package = Path(shutil.copytree(PACKAGE, tmp_path / "shards", ignore=shutil.ignore_patterns("__pycache__")))
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
        folder.chmod(0o555)
    assert ended(begin(package, HOME="/dev/null"), package) == digest
    assert not kept(tmp_path)


def test_a_full_disk_costs_time_and_nothing_else(tmp_path: Path, digest: str) -> None:
    assert ended(begin(PACKAGE, "full disk", NUMBA_CACHE_DIR=str(tmp_path))) == digest
    assert not any(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_what_is_torn_is_compiled_anew(tmp_path: Path, cache: Path, digest: str, kind: str) -> None:
    torn = Path(shutil.copytree(cache, tmp_path / "torn"))
    for path in torn.rglob(f"*.{kind}"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert ended(begin(PACKAGE, NUMBA_CACHE_DIR=str(torn))) == digest


def test_a_loop_that_cannot_be_kept_anywhere_is_compiled_all_the_same() -> None:
    """numba keeps nothing of a function without a file, as it does not where no folder can be written."""
    space: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", space)
    assert compiled(space["double"])(21) == 42
