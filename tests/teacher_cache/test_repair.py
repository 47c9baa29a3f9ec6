"""What is damaged or gone is set aside and made again, and nothing else is. The teacher is a recorded one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import cli
from shards.errors import Corrupt
from shards.manifest import read_manifest
from shards.reader import ShardSet
from shards.shard import ShardReader
from shards.verify import quarantine, verify_shards
from tests.teacher_cache.folders import contents


@pytest.fixture
def teacher(recorded_teacher: Path) -> Path:
    return recorded_teacher


def test_what_verification_sets_aside_is_remade_and_nothing_else(
    tmp_path: Path, recorded: ModuleType, teacher: Path, undisturbed: dict[str, bytes]
) -> None:
    recorded.fill(tmp_path, teacher)
    for name in ("train-00001.arrow", "teacher/head_pca.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
    report = verify_shards(tmp_path)
    assert list(report.damage) == ["teacher/head_pca.safetensors", "train-00001.arrow"]
    quarantine(tmp_path, report)
    engines: list = []
    recorded.fill(tmp_path, teacher, engines=engines)
    assert [int(name, 16) for name in engines[0].captured] == [4, 5, 6]
    shutil.rmtree(tmp_path / "quarantine")
    assert contents(tmp_path) == undisturbed


def test_the_hint_of_a_damaged_shard_brings_it_back(
    tmp_path: Path, recorded: ModuleType, teacher: Path, undisturbed: dict[str, bytes]
) -> None:
    """A set that is sealed is repaired through verify-shards; one that is not, by deleting the shard."""
    recorded.fill(tmp_path, teacher)
    flip(tmp_path / "train-00001.arrow")
    with pytest.raises(Corrupt) as caught:
        list(ShardSet(tmp_path).split("train"))
    assert "verify-shards --quarantine and run the command that made the set again" in caught.value.hint
    done = CliRunner().invoke(cli.app, ["verify-shards", str(tmp_path), "--quarantine"])
    assert (done.exit_code, "hint: run the command that made the set again" in done.output) == (1, True)
    engines: list = []
    recorded.fill(tmp_path, teacher, engines=engines)
    assert [int(name, 16) for name in engines[0].captured] == [4, 5, 6]
    shutil.rmtree(tmp_path / "quarantine")
    assert contents(tmp_path) == undisturbed

    (tmp_path / "manifest.json").unlink()
    flip(tmp_path / "train-00001.arrow")
    with pytest.raises(Corrupt) as caught:
        recorded.fill(tmp_path, teacher)
    assert caught.value.hint.startswith("delete it and run the same command again")
    (tmp_path / "train-00001.arrow").unlink()
    recorded.fill(tmp_path, teacher)
    assert contents(tmp_path) == undisturbed


def test_a_set_goes_on_with_the_codec_and_the_tables_that_it_was_begun_with(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    assert recorded.fill(new, teacher).contract.codec == "planes/3"
    tables = (new / "codec.tables").read_bytes()
    (new / "manifest.json").unlink()
    (new / "train-00001.arrow").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("shards.learnt.learn_tables", lambda *_, **__: pytest.fail("they were learnt before"))
        recorded.fill(new, teacher)
    with ShardReader.open(new / "train-00001.arrow") as shard:
        assert shard.tables == tables

    with monkeypatch.context() as patch:
        patch.setattr("stages.teacher_cache.cache.codec_of", lambda _: "topk-planes/1")
        recorded.fill(old, teacher)
    (old / "manifest.json").unlink()
    (old / "train-00001.arrow").unlink()
    assert recorded.fill(old, teacher).contract.codec == "topk-planes/1"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "gone"])
def test_damaged_tables_are_named_and_come_back_from_the_shards(
    tmp_path: Path,
    recorded: ModuleType,
    teacher: Path,
    undisturbed: dict[str, bytes],
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded.fill(tmp_path, teacher)
    named = read_manifest(tmp_path).tables
    assert named is not None
    assert (named.name, named.sha256) == ("codec.tables", read_manifest(tmp_path).contract.tables)
    damage(tmp_path / "codec.tables")
    report = verify_shards(tmp_path)
    assert list(report.damage) == ["codec.tables"]
    quarantine(tmp_path, report)
    monkeypatch.setattr("shards.learnt.learn_tables", lambda *_, **__: pytest.fail("a shard holds them"))
    engines: list = []
    recorded.fill(tmp_path, teacher, engines=engines)
    assert engines[0].captured == []
    shutil.rmtree(tmp_path / "quarantine", ignore_errors=True)
    assert contents(tmp_path) == undisturbed


def test_a_run_that_would_write_with_damaged_tables_takes_them_from_a_shard(
    tmp_path: Path, recorded: ModuleType, teacher: Path, undisturbed: dict[str, bytes]
) -> None:
    recorded.fill(tmp_path, teacher)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-00001.arrow").unlink()
    flip(tmp_path / "codec.tables")
    recorded.fill(tmp_path, teacher)
    shutil.rmtree(tmp_path / "quarantine")
    assert contents(tmp_path) == undisturbed


def test_tables_that_no_shard_has_are_learnt_again_or_the_run_stops(
    tmp_path: Path, recorded: ModuleType, teacher: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of an engine need not say the same to the last bit; what others learnt is never published."""
    (tmp_path / "contract.json").write_bytes(undisturbed["contract.json"])
    with monkeypatch.context() as patch:
        patch.setattr("shards.learnt.learn_tables", lambda *_, **__: b"other")
        with pytest.raises(Corrupt, match=r"codec\.tables is lost") as caught:
            recorded.fill(tmp_path, teacher)
    assert f"delete {tmp_path / 'contract.json'}" in caught.value.hint
    assert not (tmp_path / "codec.tables").exists()
    recorded.fill(tmp_path, teacher)
    assert contents(tmp_path) == undisturbed
