"""What stage two waits for its records: the share of a step, in the training loop of the product.

The demo's student, over SmolLM2's 49,152 ids, trains one epoch from a synthetic set: the top 64 ids of each position,
and lengths like those of the demo's word problems, in global batches of 4. The loop tells the wait of every step; what
is taken is the mean over all but the first two, which start the readers.

    python -m benchmarks.data_wait
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Row, compare, parser, write
from shards.contract import Contract, Selection
from shards.learnt import tables_budget, with_tables
from shards.manifest import begin, seal
from shards.record import Record
from shards.storage import storage_at
from shards.writer import write_shard
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.train import train
from stages.events import Event, Metric
from stages.student.shape import StudentShape

VOCABULARY, K, RECORDS, QUICK_RECORDS = 49_152, 64, 128, 32
WARM_UP = 2
PROMISE = 0.01
CONTRACT = Contract(
    **dict.fromkeys(("teacher_fingerprint", "tokenizer_fingerprint", "corpus_fingerprint", "engine", "dtype"), ""),
    codec="planes/3",
    teacher="synthetic",
    vocab_size=VOCABULARY,
    start_token_id=0,
    end_token_id=2,
    selection=Selection(kind="topk", k=K),
    attention=None,
)
DISTILL = DistillSettings(epochs=1, global_batch=4, bucket_batches=1, checkpoint_every=10_000, answers=0)
OBJECTIVE = ObjectiveSettings(kd="water_filled_kl")


def synthetic_record(number: int) -> Record:
    """Zipf's law with an exponent of its own at each position, over ids drawn at random."""
    rng = np.random.default_rng(number)
    prompt, response = rng.integers(60, 160), rng.integers(80, 240)
    ranks_V = np.log(np.arange(1, VOCABULARY + 1))
    slopes_N1 = rng.uniform(1.2, 3.0, (response, 1))
    log_sums_N1 = np.logaddexp.reduce(-slopes_N1 * ranks_V, axis=1, keepdims=True)
    logprobs_NK = -slopes_N1 * ranks_V[:K] - log_sums_N1
    ids_NK = rng.permuted(rng.integers(1, VOCABULARY // K, (response, K)).cumsum(axis=1) - 1, axis=1)
    return Record(
        sample_id=f"{number:016x}",
        prompt_ids_P=rng.integers(3, VOCABULARY, prompt, np.int32),
        response_ids_R=rng.integers(3, VOCABULARY, response, np.int32),
        first_position=0,
        ids_NK=ids_NK.astype(np.int32),
        logprobs_NK=logprobs_NK.astype(np.float32),
        log_tail_N=np.log1p(-np.exp(logprobs_NK).sum(axis=1)).astype(np.float32),
        entropy_N=np.full(response, 2.0, np.float32),
    )


def write_set(folder: Path, records: int) -> None:
    storage, found = storage_at(folder), [synthetic_record(number) for number in range(records)]
    budget = tables_budget(sum(record.positions for record in found))
    contract, tables = with_tables(storage, CONTRACT, lambda: found, budget=budget)
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
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
