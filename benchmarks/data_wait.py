"""What stage two waits for its records: the share of a step, in the training loop of the product.

The demo's student, over SmolLM2's 49,152 ids, trains one epoch from a synthetic set: the top 64 ids of each position,
and lengths like those of the demo's word problems, in global batches of 4. The loop tells the wait of every step; what
is taken is the mean over all but the first two, which start the readers.

    python -m benchmarks.data_wait
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Row, compare, parser, write
from benchmarks.synthetic_records import synthetic_contract, synthetic_record
from shards.learnt import tables_budget, with_tables
from shards.manifest import begin, seal
from shards.storage import storage_at
from shards.writer import write_shard
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.train import train
from stages.events import Event, Metric
from stages.student.shape import StudentShape

VOCABULARY, RECORDS, QUICK_RECORDS = 49_152, 128, 32
PROMPTS, RESPONSES = (60, 160), (80, 240)
"""Lengths, in tokens."""
WARM_UP = 2
PROMISE = 0.01
DISTILL = DistillSettings(epochs=1, global_batch=4, bucket_batches=1, checkpoint_every=10_000, answers=0)
OBJECTIVE = ObjectiveSettings(kd="water_filled_kl")


def write_set(folder: Path, records: int) -> None:
    storage, rng = storage_at(folder), np.random.default_rng(0)
    lengths = zip(rng.integers(*PROMPTS, records).tolist(), rng.integers(*RESPONSES, records).tolist(), strict=True)
    found = [
        synthetic_record(rng, VOCABULARY, sample_id=f"{number:012d}", prompt=prompt, response=response)
        for number, (prompt, response) in enumerate(lengths)
    ]
    budget = tables_budget(sum(record.positions for record in found))
    contract, tables = with_tables(storage, synthetic_contract(VOCABULARY), lambda: found, budget=budget)
    begin(storage, contract)
    seal(storage, contract, [write_shard(storage, "train-00000", "train", contract, found, tables=tables)])


def rows(records: int) -> Iterator[Row]:
    steps: list[Metric] = []

    def hear(event: Event) -> None:
        if isinstance(event, Metric) and "data_wait" in event.values:
            steps.append(event)

    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "shards"
        write_set(shards, records)
        train(
            shards=shards,
            run=Path(place),
            settings=DISTILL,
            objective=OBJECTIVE,
            shape=StudentShape(),
            emit=hear,
        )
    waits = [step.values["data_wait"] for step in steps[WARM_UP:]]
    wait = sum(waits) / len(waits)
    case = f"{len(waits)} steps of 4 records"
    yield compare(case, "data wait, share of a step", "", wait, PROMISE, "the promise", bound=1.0)


def main() -> None:
    quick: bool = parser(__doc__).parse_args().quick
    torch.set_num_threads(1)
    write(
        "data_wait",
        list(rows(QUICK_RECORDS if quick else RECORDS)),
        clock="wall, the training loop's own; mean over steps",
        packages=("torch", "deepspeed", "numpy", "zstandard"),
        threads=1,
        quick=quick,
    )


if __name__ == "__main__":
    main()
