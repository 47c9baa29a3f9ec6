"""What training holds in memory does not grow with the set that it goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shards.contract import Selection
from shards.reader import ShardSet
from shards.record import Record
from stages.events import Metric

RECORDS, POSITIONS, KEPT = 720, 50, 200
SETTLED = 10
"""Steps after which readers, batches and the allocator have all that they need."""


def test_the_memory_of_a_run_does_not_grow_with_the_records_that_it_reads(
    make_shards: Callable[..., Path], record: Callable[..., Record], start_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    short = record(3, 0, attention=False)
    rows = np.arange(POSITIONS) % short.positions
    wide = dataclasses.replace(
        short,
        response_ids_R=short.response_ids_R[rows],
        ids_NK=np.tile(np.arange(KEPT, dtype=np.int32), (POSITIONS, 1)),
        logprobs_NK=np.full((POSITIONS, KEPT), np.log(0.9 / KEPT), np.float32),
        log_tail_N=np.full(POSITIONS, np.log(0.1), np.float32),
        entropy_N=short.entropy_N[rows],
    )

    def of(index: int, seed: int, **_: object) -> Record:
        """The same signal again and again: what it says is not the point, how much there is of it is."""
        return dataclasses.replace(wide, sample_id=f"wide-{seed}-{index:06d}")

    selection = Selection(kind="topk", k=KEPT)
    shards = make_shards(records=RECORDS, dev=2, of=of, attention=None, selection=selection)
    outcome = start_ranks(tmp_path / "run", 1, shards=shards, epochs=1, validate_every=10_000).join()
    told = [event for event in outcome.events if isinstance(event, Metric) and "memory_gib" in event.values]
    peaks = {event.step: event.values["memory_gib"] * 2**30 for event in told}
    read = ShardSet(shards).split("train")[0]
    assert read.logprobs_NK is not None
    decoded = RECORDS * (read.ids_NK.nbytes + read.logprobs_NK.nbytes)
    assert max(peaks) == 6 * SETTLED
    assert peaks[max(peaks)] - peaks[SETTLED] < decoded / 3
