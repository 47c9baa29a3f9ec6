"""Where shards lie: the kind of a place is looked at where it is named, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import inspection, shard_tools, steps
from pipeline.errors import PipelineError, UsageError
from pipeline.estimate import estimate
from pipeline.explanation import explained
from pipeline.locations import local_set, new_set, set_or_shard, standing_set
from pipeline.run import RunFolder
from pipeline.share import share


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "train-00000.arrow"
    path.touch()
    return str(path)


def test_each_kind_of_place_is_taken_where_it_can_be_used(file: str, tmp_path: Path) -> None:
    assert set_or_shard(file) == Path(file)
    for kind in (set_or_shard, standing_set, new_set, local_set):
        assert kind(str(tmp_path)) == tmp_path
    for kind in (set_or_shard, standing_set, new_set):
        assert kind("gs://bucket/set") == "gs://bucket/set"
    assert new_set(str(tmp_path / "new")) == tmp_path / "new"


@pytest.mark.parametrize("kind", [set_or_shard, standing_set, new_set, local_set])
def test_a_url_of_another_kind_is_none(kind: Callable[[str], Any]) -> None:
    with pytest.raises(UsageError, match="no shard set can lie at ftp://x/y") as caught:
        kind("ftp://x/y")
    assert "s3:// or gs://" in caught.value.hint


VERBS: dict[str, Callable[[str], Any]] = {
    "verify-shards": lambda place: inspection.verify(place, set_aside=False, as_json=False),
    "estimate": lambda place: estimate(place, 5, rate=None, machines=1, price=None, as_json=False),
    "export-shards": lambda place: shard_tools.export(place, "out", kind="parquet"),
    "copy-shards": lambda place: shard_tools.copy(place, "out"),
    "merge": lambda place: shard_tools.merge([place, place], "out"),
    "reselect": lambda place: shard_tools.reselect(place, "out", k=1, mass=None, floor=None),
    "share": share,
    "distill": lambda place: steps.shards_of(RunFolder(Path("runs/r")), place),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_for_sets_refuses_a_file_and_a_place_where_nothing_is(verb: str, file: str) -> None:
    with pytest.raises(UsageError, match="is a file, not a shard set"):
        VERBS[verb](file)
    with pytest.raises(PipelineError, match="no shards at "):
        VERBS[verb](f"{file}/absent")


def test_a_set_is_made_in_no_file(file: str, finished_run: Path) -> None:
    shards = str(finished_run / "shards")
    for make in (
        lambda: shard_tools.copy(shards, file),
        lambda: shard_tools.merge([shards], file),
        lambda: shard_tools.export(shards, file, kind="parquet"),
        lambda: shard_tools.reselect(shards, file, k=1, mass=None, floor=None),
        lambda: steps.place_of(RunFolder(finished_run), file),
    ):
        with pytest.raises(UsageError, match=r"nothing can be made at .*: it is a file"):
            make()


def test_a_card_is_written_into_a_folder_only() -> None:
    with pytest.raises(UsageError, match="s3://a/b is no folder") as caught:
        share("s3://a/b")
    assert "copy-shards" in caught.value.hint


def test_an_export_is_written_into_a_folder_only(finished_run: Path) -> None:
    with pytest.raises(UsageError, match="s3://a/b is no folder"):
        shard_tools.export(str(finished_run / "shards"), "s3://a/b", kind="parquet")


def test_what_the_system_refuses_comes_with_what_to_do(file: str) -> None:
    """Of every kind of path that cannot be what it is named as."""
    for refused in (
        lambda: Path(file, "below").read_bytes(),
        lambda: Path(file).parent.joinpath("absent").read_bytes(),
        lambda: Path(file).parent.read_bytes(),
        lambda: Path(file).mkdir(),
    ):
        with pytest.raises(OSError) as caught:
            refused()
        assert len(explained(caught.value)) == 2
