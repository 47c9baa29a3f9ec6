"""Stage one straight into an object store: the set is that of a folder, and a death at any request loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from shards.manifest import is_sealed, read_manifest
from shards.reader import ShardSet
from shards.verify import quarantine, verify_shards
from tests.shards.object_store import CREDENTIALS, AnyStore, serving, serving_google
from tests.teacher_cache.killings import told

SERVERS = {"s3": serving, "gs": serving_google}


@pytest.fixture(scope="module", params=SERVERS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyStore]:
    with pytest.MonkeyPatch.context() as environment, SERVERS[request.param]() as store:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        environment.setenv("MINICODFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield store


def test_a_set_made_in_a_store_is_the_set_made_in_a_folder(
    tmp_path: Path, store: AnyStore, recorded: ModuleType, recorded_teacher: Path
) -> None:
    url = store.new_url()
    here, there = recorded.fill(tmp_path, recorded_teacher), recorded.fill(url, recorded_teacher)
    assert [shard.sha256 for shard in there.shards] == [shard.sha256 for shard in here.shards]
    assert (there.contract, there.teacher_files, there.tables) == (here.contract, here.teacher_files, here.tables)
    assert ShardSet(url).fidelity() == ShardSet(tmp_path).fidelity() != {}
    assert verify_shards(url).intact
    assert [record.sample_id for record in ShardSet(url).split("dev")] == [
        sample.sample_id for sample in recorded.make_corpus(recorded_teacher).dev
    ]
    engines: list = []
    assert recorded.fill(url, recorded_teacher, engines=engines) == there
    assert engines[0].captured == []


def test_what_is_set_aside_in_a_store_is_remade_and_nothing_else(
    store: AnyStore, recorded: ModuleType, recorded_teacher: Path
) -> None:
    url = store.new_url()
    made = recorded.fill(url, recorded_teacher)
    for name in (made.shards[2].name, f"{made.teacher_folder}/chat.json", "codec.tables"):
        store.overwrite(url, name, store.files(url)[name][:-1] + b"?")
    report = verify_shards(url)
    assert len(report.damage) == 3
    quarantine(url, report)
    assert not is_sealed(url)
    engines: list = []
    assert recorded.fill(url, recorded_teacher, engines=engines) == made
    assert [int(name, 16) for name in engines[0].captured] == [4, 5, 6]
    assert verify_shards(url).intact


def test_W3_several_that_fill_one_place_at_once_make_the_set_of_one(
    store: AnyStore, recorded: ModuleType, recorded_teacher: Path
) -> None:
    alone, shared = store.new_url(), store.new_url()
    recorded.fill(alone, recorded_teacher)
    assert told("together", shared, recorded_teacher, "same") == 3
    assert store.files(shared) == store.files(alone)


def test_W3_several_whose_signals_differ_make_one_whole_set_or_are_refused(
    store: AnyStore, recorded: ModuleType, recorded_teacher: Path
) -> None:
    """A store refuses no second writer: who comes at the same moment may be told that another's claim stands."""
    url = store.new_url()
    told("together", url, recorded_teacher, "own")
    made = recorded.fill(url, recorded_teacher)
    assert verify_shards(url).intact
    assert made.totals()["records"] == 9
    assert recorded.fill(url, recorded_teacher) == made


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.long)])
def test_W3_killed_at_requests_to_a_store_then_resumed_gives_the_same_objects(
    store: AnyStore, recorded_teacher: Path, every: int
) -> None:
    url = store.new_url()
    died = told("stored", url, recorded_teacher, every)
    base, options = url.split("?")
    undisturbed, *disturbed = (f"{base}/{1 + every * death:03d}?{options}" for death in reversed(range(died + 1)))
    assert died >= 40 // every
    expected = store.files(undisturbed)
    assert read_manifest(undisturbed).totals()["records"] == 9
    for place in disturbed:
        assert store.files(place) == expected, place
