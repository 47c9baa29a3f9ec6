"""The exact head of a record: the most probable ids of N positions, their probabilities and what they leave.

- The label, the token that followed, stands beside the signal already: where the head has it, only its level is
  stored, and the set holds the other ids.
- Ids are ranks in the order of the position's class, probabilities are levels; both lie place by place.
- The mass outside the head and the entropy are differences from what the head makes likely.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.contract import Selection
from shards.errors import Corrupt
from shards.planes.head_reading import fill_entries, read_keys
from shards.planes.head_writing import take_keys, take_levels, take_outside
from shards.planes.id_sets import LEFT_STEPS, NEXT_STEPS, set_stream
from shards.planes.numbers import Numbers
from shards.planes.rans import Reader, Stream
from shards.planes.tables import Tables
from shards.schema import MAX_ENTRIES

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_KINDS = ("classes", "sizes", "least", "labels", "ids", "levels", "tail", "entropy")
_FAULTS = (
    "",
    "names a class that does not exist",
    "keeps more ids than a record may",
    "names a rank outside the vocabulary",
    "names a level that does not exist",
    "holds the label of a position in its set",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a cell says of N heads of at most K ids."""

    ids_NK: NDArray[np.int32]
    """By falling probability, equal levels by rising id; -1 where absent."""
    logprobs_NK: Float32
    log_tail_N: Float64
    """-inf where nothing is left. Where the tail is not known, what the kept ids leave."""
    entropy_N: Float64 | None
    """None where the tail is not known."""
    classes_N: Numbers
    held: int
    """Ids in all."""


def head_streams(
    ids_NK: NDArray[np.int32],
    logprobs_NK: Float32,
    log_tail_N: Float32,
    entropy_N: Float32,
    labels_N: Numbers,
    classes_N: Numbers,
    tables: Tables,
    *,
    sized: bool,
    tail_known: bool,
) -> tuple[list[Stream], Float64]:
    """The streams of a head but its classes, and the log tail that will be decoded. Absent ids are -1 and stand last.

    `sized` where heads differ in their sizes.
    """
    levels, (count, width) = tables.levels, ids_NK.shape
    roots_NK = np.exp(np.float32(0.5) * logprobs_NK)
    keys_NK = np.empty((count, width), np.uint32)
    sizes_N, least_N, kept_N, tail_N, entropies_N = np.empty((5, count), np.int32)
    decoded_N = np.empty(count)
    take_keys(
        ids_NK,
        roots_NK,
        labels_N,
        tables.ranks_CV,
        classes_N,
        levels.steps,
        levels.borders,
        levels.highest,
        keys_NK,
        sizes_N,
        least_N,
        kept_N,
    )
    keys_NK.sort(axis=1)
    others_N = sizes_N - (kept_N > 0)
    above = np.empty(int(others_N.sum()), np.int32)
    contexts = np.empty(len(above), np.uint16)
    take_levels(keys_NK, others_N, least_N, above, contexts)
    take_outside(
        roots_NK,
        keys_NK,
        sizes_N,
        others_N,
        least_N,
        kept_N,
        log_tail_N,
        entropy_N,
        levels.masses,
        levels.moments,
        levels.logs,
        np.log(tables.vocab_size),
        tail_known,
        tail_N,
        entropies_N,
        decoded_N,
    )
    streams = [
        *([Stream("sizes", sizes_N - 1)] if sized else []),
        Stream("least", least_N),
        Stream("labels", kept_N),
        set_stream("ids", (keys_NK >> 8).view(np.int32), others_N),
        Stream("levels", above, contexts),
        Stream("tail", tail_N),
        *([Stream("entropy", entropies_N)] if tail_known else []),
    ]
    return streams, decoded_N


def read_head(reader: Reader, labels_N: Numbers, tables: Tables, selection: Selection) -> Head:
    """The inverse of `head_streams`, classes first. Raises Corrupt."""
    levels, known = tables.levels, selection.tail_known
    fault, held, classes_N, keys_NK, (log_tail_N, entropy_N, shift_N) = read_keys(
        reader.source,
        reader.rows(_KINDS),
        NEXT_STEPS,
        LEFT_STEPS,
        labels_N,
        tables.orders_CV,
        levels.masses,
        levels.moments,
        levels.logs,
        selection.k,
        MAX_ENTRIES,
        selection.kind == "adaptive",
        known,
    )
    if fault:
        raise Corrupt(f"a payload {_FAULTS[fault]}")
    keys_NK.sort(axis=1)
    ids_NK, logprobs_NK = np.empty(keys_NK.shape, np.int32), np.empty(keys_NK.shape, np.float32)
    fill_entries(keys_NK, levels.logs, shift_N, ids_NK, logprobs_NK)
    return Head(
        classes_N=classes_N,
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        log_tail_N=log_tail_N,
        entropy_N=entropy_N if known else None,
        held=held,
    )
