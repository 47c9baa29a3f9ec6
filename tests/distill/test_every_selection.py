"""Sets of every selection, as the codec writes them: what is trained on is what the teacher said, and it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from selections import SELECTIONS, contract_of, record_of

from shards.manifest import begin, seal
from shards.planes.codec import Planes3
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import fingerprint
from shards.reader import ShardSet
from shards.writer import write_shard
from stages.distill.batches import assemble
from stages.distill.losses.table import what_kl_is
from stages.distill.objective import SUMS, DistillModule, Emphasis
from stages.distill.settings import ObjectiveSettings
from stages.events import Metric
from stages.student.model import build_student
from stages.student.shape import StudentShape

WAYS = {
    "topk": ObjectiveSettings(kd="reverse_kl", temperature=1.3),
    "adaptive": ObjectiveSettings(kd="water_filled_kl", temperature_mode="adaptive", temperature=1.3),
    "hybrid": ObjectiveSettings(kd="sampled_kl", temperature_mode="schedule", temperature=1.4),
    "sample": ObjectiveSettings(kd="sampled_kl", temperature_mode="entropy"),
    "counts": ObjectiveSettings(kd="sampled_kl"),
}
TRAIN, DEV = range(24), range(24, 32)


@pytest.fixture(scope="module", params=SELECTIONS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A sealed set with a partition curve and attention of all rows."""
    selection, folder = SELECTIONS[request.param], tmp_path_factory.mktemp("set")
    records = [record_of(index, selection) for index in (*TRAIN, *DEV)]
    contract = dataclasses.replace(contract_of(selection), codec=Planes3.name)
    tables = learn_tables(records, contract)
    contract = dataclasses.replace(contract, tables=fingerprint(tables))
    begin(folder, contract)
    (folder / "teacher").mkdir()
    (folder / "teacher" / "tokenizer.json").write_text("{}", encoding="utf-8")
    parts = {"train": TRAIN, "dev": DEV}
    infos = [
        write_shard(folder, f"{split}-000", split, contract, [records[index] for index in part], tables=tables)
        for split, part in parts.items()
    ]
    seal(folder, contract, infos)
    return request.param, folder


def test_what_was_decoded_costs_what_was_said(written: tuple[str, Path], shape: StudentShape) -> None:
    name, folder = written
    shards, settings = ShardSet(folder), WAYS[name]
    student = build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0).double()
    module = DistillModule(student, settings, shards.contract)
    emphasis = Emphasis.at(settings, 0, 10)
    split = shards.split("train")
    decoded = module(assemble([split[index] for index in TRAIN], 0), emphasis=emphasis).sums
    said = module(assemble([record_of(index, SELECTIONS[name]) for index in TRAIN], 0), emphasis=emphasis).sums
    # A row with one hard negative more or less is no matter of degree: the codec may move a few across that border.
    counted = SUMS.index("hard_share")
    assert abs(decoded[counted] - said[counted]) <= 3
    decoded[counted] = said[counted]
    torch.testing.assert_close(decoded / decoded[-1], said / said[-1], rtol=5e-3, atol=5e-3)
    assert said[SUMS.index("encoder")] > 1


def test_it_trains(written: tuple[str, Path], train_here: Callable[..., Any], tmp_path: Path) -> None:
    name, folder = written
    outcome = train_here(
        tmp_path, shards=folder, objective=WAYS[name], epochs=5, learning_rate=1e-2, validate_every=100
    )
    assert outcome.result.finished
    assert outcome.result.validation.kl < outcome.result.untrained.kl
    steps = [event.values for event in outcome.events if isinstance(event, Metric) and "loss" in event.values]
    assert ("temperature" in steps[0]) == (name != "counts")
    assert ("hard_share" in steps[0]) == (name == "adaptive")
    assert steps[0]["encoder"] > 0


def test_what_the_yardstick_tells_of_each_selection_is_said() -> None:
    said = {name: what_kl_is(selection) for name, selection in SELECTIONS.items()}
    said["imported"] = what_kl_is(dataclasses.replace(SELECTIONS["topk"], tail_known=False))
    for words, told_of in {
        "one bucket for the rest (a lower bound": {"topk", "adaptive", "hybrid", "sample"},
        "it may be negative": {"counts"},
        "no bound of the whole": {"imported"},
        "most probable drawn id": {"sample", "counts"},
    }.items():
        assert {name for name, text in said.items() if words in text} == told_of
