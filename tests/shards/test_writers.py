"""W3 at the level of files: any number of writers, killed at any moment, leave what one undisturbed writer leaves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.contract import Contract
from shards.manifest import ShardInfo, begin, seal
from shards.reader import ShardSet
from shards.record import Record
from shards.writer import build_shard, write_shard

UNITS = 12


@pytest.fixture
def plan(contract: Contract, make_record: Callable[..., Record]) -> dict[str, list[Record]]:
    """Which records belong to which unit: a function of nothing but the corpus."""
    return {f"train-{unit:05d}": [make_record(contract, 10 * unit + row) for row in range(3)] for unit in range(UNITS)}


def start_writer(folder: Path, contract: Contract, plan: dict[str, list[Record]], seed: int) -> int:
    """A process that writes the units in an order of its own, until all are there. Returns its id."""
    child = os.fork()
    if child == 0:
        try:
            begin(folder, contract)
            for unit in random.Random(seed).sample(sorted(plan), len(plan)):
                write_shard(folder, unit, "train", contract, plan[unit])
        finally:
            os._exit(0)
    return child


def test_W3_writers_killed_at_random_leave_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, contract: Contract, plan: dict[str, list[Record]]
) -> None:
    undisturbed = {unit: build_shard(unit, "train", contract, rows) for unit, rows in plan.items()}
    rng, kills, half_written = random.Random(3), 0, 0
    for round_ in range(60):
        if kills >= 50 and half_written:  # on a fast machine many are done before they are killed
            break
        folder = tmp_path / f"disturbed-{round_}"
        for generation in range(4):
            seeds = [100 * round_ + 10 * generation + n for n in range(rng.randint(1, 4))]
            writers = [start_writer(folder, contract, plan, seed) for seed in seeds]
            time.sleep(rng.uniform(0.002, 0.03))
            for writer in writers:
                os.kill(writer, signal.SIGKILL)
            kills += sum(os.WIFSIGNALED(os.waitpid(writer, 0)[1]) for writer in writers)
            half_written += len(list(folder.glob(".*.tmp")))
            for path in folder.glob("*.arrow"):
                assert path.read_bytes() == undisturbed[path.stem]

        begin(folder, contract)
        infos = [write_shard(folder, unit, "train", contract, rows) for unit, rows in plan.items()]
        seal(folder, contract, infos)
        assert not list(folder.glob(".*.tmp"))
        assert {path.stem: path.read_bytes() for path in folder.glob("*.arrow")} == undisturbed
        train = ShardSet(folder).split("train")
        assert train.sample_ids.tolist() == [record.sample_id for rows in plan.values() for record in rows]
    assert kills >= 50
    assert half_written >= 1, "some died within a publication"


def test_W3_the_first_published_shard_of_a_unit_wins_and_the_manifest_names_its_hash(
    tmp_path: Path, contract: Contract, plan: dict[str, list[Record]]
) -> None:
    begin(tmp_path, contract)
    first, second = (plan[unit] for unit in sorted(plan)[:2])
    info = write_shard(tmp_path, "train-00000", "train", contract, first)
    published = (tmp_path / "train-00000.arrow").read_bytes()
    late = write_shard(tmp_path, "train-00000", "train", contract, second)
    assert late == info
    assert (tmp_path / "train-00000.arrow").read_bytes() == published
    assert isinstance(late, ShardInfo)
    assert seal(tmp_path, contract, [late]).shards == (info,)
