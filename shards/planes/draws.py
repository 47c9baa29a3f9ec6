"""The drawn ids of a record: which, how often, and where they are kept their log-probabilities.

- Whether the label was drawn is stored; the set holds the other ids.
- One id of a position has the draws that the others leave: the label where it was drawn, else the first of the set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import Corrupt
from shards.planes.id_sets import ABSENT_RANK, by_place, from_places, read_sets, set_stream
from shards.planes.numbers import Numbers
from shards.planes.rans import Reader, Stream
from shards.planes.tables import Tables

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LOGPROB_SCALE = 16
MOST_CODE = (1 << 16) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """N positions of at most K drawn ids, by falling log-probability, or count, ties by rising id."""

    ids_NK: Int32
    counts_NK: Int32
    logprobs_NK: Float32 | None
    """None where log-probabilities are not kept."""


def draw_streams(
    ids_NK: Int32, counts_NK: Int32, logprobs_NK: Float32 | None, labels_N: Numbers, classes_N: Numbers, tables: Tables
) -> list[Stream]:
    """The streams of drawn ids but their classes. Absent ids are -1 and stand last."""
    there_NK, label_NK = ids_NK >= 0, ids_NK == labels_N[:, None]
    ranks_NK = np.where(there_NK, tables.ranks_CV[classes_N[:, None], ids_NK], 2 * ABSENT_RANK)
    ranks_NK = np.where(label_NK & there_NK, ABSENT_RANK, ranks_NK)  # after the set, before what is absent
    order_NK = np.argsort(ranks_NK, axis=1)
    sizes_N, drawn_N = there_NK.sum(axis=1), label_NK.any(axis=1)
    counted_NK = np.take_along_axis(counts_NK, order_NK, axis=1)
    others_N = sizes_N - drawn_N
    streams = [
        Stream("sizes", sizes_N),
        Stream("drawn-labels", drawn_N),
        set_stream("drawn", np.take_along_axis(ranks_NK, order_NK, axis=1).astype(np.int32), others_N.astype(np.int32)),
        Stream("counts", by_place(counted_NK, others_N)[_told(others_N, drawn_N)] - 1),
    ]
    if logprobs_NK is not None:
        finite_NK = np.where(there_NK, logprobs_NK, 0).astype(np.float64)
        codes_NK = np.rint(-LOGPROB_SCALE * finite_NK).clip(0, MOST_CODE).astype(np.int32)
        streams.append(Stream("log-probs", by_place(np.take_along_axis(codes_NK, order_NK, axis=1), sizes_N)))
    return streams


def read_draws(
    reader: Reader,
    classes_N: Numbers,
    sizes_N: Numbers,
    labels_N: Numbers,
    tables: Tables,
    *,
    draws: int,
    logprobs: bool,
) -> Draws:
    """The inverse of `draw_streams` but for sizes. Raises Corrupt."""
    drawn_N, width = reader.take("drawn-labels", len(sizes_N)), int(sizes_N.max(initial=0))
    if (drawn_N > (sizes_N > 0)).any():
        raise Corrupt("a payload draws a label more than once, or where nothing is drawn")
    others_N = sizes_N - drawn_N
    ids_NK = np.full((len(sizes_N), width), -1, np.int32)
    ranks_NK = read_sets(reader, "drawn", others_N, tables.vocab_size).T
    in_set_NK = _there(others_N, ranks_NK.shape[1])
    ids_NK[:, : ranks_NK.shape[1]] = np.where(in_set_NK, tables.orders_CV[classes_N[:, None], ranks_NK], -1)
    if (ids_NK == labels_N[:, None]).any():
        raise Corrupt("a payload's set holds the label of its position")
    ids_NK[_there(sizes_N, width) & (ids_NK < 0)] = labels_N[drawn_N > 0]
    counts_NK = _read_counts(reader, sizes_N, drawn_N, draws)
    codes_NK = from_places(reader.take("log-probs", int(sizes_N.sum())), sizes_N, width).T if logprobs else None
    order_NK = np.lexsort((ids_NK, -counts_NK if codes_NK is None else codes_NK, ids_NK < 0), axis=1)
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
    logprobs_NK = None
    if codes_NK is not None:
        values_NK = -np.take_along_axis(codes_NK, order_NK, axis=1) / LOGPROB_SCALE
        logprobs_NK = np.where(ids_NK >= 0, values_NK, -np.inf).astype(np.float32)
    counts_NK = np.take_along_axis(counts_NK, order_NK, axis=1)
    return Draws(ids_NK=ids_NK, counts_NK=counts_NK, logprobs_NK=logprobs_NK)


def entropy_of_draws(counts_NK: NDArray[np.integer]) -> Float64:
    """What the entropy of the distribution is likely to be: that of the counts, which is too small, times 7/5."""
    shares_NK = counts_NK / counts_NK.sum(axis=1, keepdims=True)
    likely_N: Float64 = -1.4 * (shares_NK * np.log(np.maximum(shares_NK, 1e-9))).sum(axis=1)
    return likely_N


def _told(others_N: NDArray[np.integer], drawn_N: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which ids of the sets, place by place, have their counts stored: all but one of a position."""
    told = np.ones(int(others_N.sum()), bool)
    first_N = others_N > 0
    told[: np.count_nonzero(first_N)] = drawn_N[first_N]
    return told


def _read_counts(reader: Reader, sizes_N: Numbers, drawn_N: Numbers, draws: int) -> Int32:
    """Counts of the ids of each set, then of its label; 0 where there is none. Raises Corrupt."""
    others_N, width = sizes_N - drawn_N, int(sizes_N.max(initial=0))
    told = _told(others_N, drawn_N)
    counts = np.zeros(len(told), np.int32)
    counts[told] = reader.take("counts", int(np.count_nonzero(told))) + 1
    counts_NK = from_places(counts, others_N, width).T
    left_N = draws - counts_NK.sum(axis=1, dtype=np.int64)
    some_N = sizes_N > 0
    if (left_N[some_N] < 1).any():
        raise Corrupt(f"a payload counts more than {draws} draws at a position")
    place_N = np.where(drawn_N > 0, others_N, 0)
    counts_NK[some_N, place_N[some_N]] = left_N[some_N]
    return counts_NK


def _there(sizes_N: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    return np.arange(width) < sizes_N[:, None]
