"""The drawn ids of a record: which, how often, and where they are kept their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import Corrupt
from shards.planes.id_sets import read_sets, set_streams
from shards.planes.numbers import Numbers
from shards.planes.streams import StreamReader, Streams
from shards.planes.tables import Tables

LOGPROB_SCALE = 16
MOST_CODE = (1 << 16) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """N sets of at most K drawn ids by rising rank; what stands beyond a position's size means nothing."""

    classes_N: Numbers
    sizes_N: Numbers
    ranks_NK: NDArray[np.integer]
    counts_NK: Numbers
    codes_NK: Numbers | None
    """-log p in steps of 1/16 nat; None where log-probabilities are not kept."""

    @classmethod
    def of(
        cls,
        ids_NK: NDArray[np.int32],
        counts_NK: NDArray[np.int32],
        logprobs_NK: NDArray[np.float32] | None,
        classes_N: Numbers,
        tables: Tables,
    ) -> Draws:
        """Absent ids are -1 and stand last."""
        there_NK = ids_NK >= 0
        ranks_NK = np.where(there_NK, tables.ranks_CV[classes_N[:, None], ids_NK], 1 << 30)
        order_NK = np.argsort(ranks_NK, axis=1)
        codes_NK = None
        if logprobs_NK is not None:
            finite_NK = np.where(there_NK, logprobs_NK, 0).astype(np.float64)
            rounded_NK = np.rint(-LOGPROB_SCALE * finite_NK).clip(0, MOST_CODE).astype(np.int32)
            codes_NK = np.take_along_axis(rounded_NK, order_NK, axis=1)
        return cls(
            classes_N=classes_N,
            sizes_N=there_NK.sum(axis=1).astype(np.int32),
            ranks_NK=np.take_along_axis(ranks_NK, order_NK, axis=1),
            counts_NK=np.take_along_axis(counts_NK, order_NK, axis=1),
            codes_NK=codes_NK,
        )

    def streams(self) -> Streams:
        """Ids, counts and log-probabilities; classes and sizes are the caller's."""
        yield from set_streams("drawn", self.ranks_NK, self.sizes_N)
        there_NK = np.arange(self.ranks_NK.shape[1]) < self.sizes_N[:, None]
        yield "counts", self.counts_NK[:, 1:][there_NK[:, 1:]] - 1
        if self.codes_NK is not None:
            yield "log-probs", self.codes_NK[there_NK]

    @classmethod
    def read(
        cls, reader: StreamReader, classes_N: Numbers, sizes_N: Numbers, tables: Tables, *, draws: int, logprobs: bool
    ) -> Draws:
        """Raises Corrupt. The first id of a set was drawn as often as the others leave of `draws`."""
        width, total = int(sizes_N.max(initial=0)), int(sizes_N.sum())
        ranks_NK = read_sets(reader, "drawn", sizes_N, width, tables.vocab_size)
        there_NK = np.arange(width) < sizes_N[:, None]
        counts_NK = np.zeros(ranks_NK.shape, np.int32)
        others_NK = there_NK[:, 1:]
        counts_NK[:, 1:][others_NK] = reader.take("counts", int(np.count_nonzero(others_NK))) + 1
        first_N = draws - counts_NK.sum(axis=1, dtype=np.int64)
        if (first_N[sizes_N > 0] < 1).any():
            raise Corrupt(f"a payload counts more than {draws} draws at a position")
        counts_NK[:, :1] = np.where(there_NK, first_N[:, None], 0)[:, :1]
        codes_NK = None
        if logprobs:
            codes_NK = np.zeros(ranks_NK.shape, np.int32)
            codes_NK[there_NK] = reader.take("log-probs", total)
        return cls(classes_N=classes_N, sizes_N=sizes_N, ranks_NK=ranks_NK, counts_NK=counts_NK, codes_NK=codes_NK)

    def entropy_guess_N(self) -> NDArray[np.float64]:
        """Of the whole distribution: that of the counts, which is too small, times 7/5."""
        counts_NK = np.where(np.arange(self.counts_NK.shape[1]) < self.sizes_N[:, None], self.counts_NK, 0)
        shares_NK = counts_NK / counts_NK.sum(axis=1, keepdims=True)
        guess_N: NDArray[np.float64] = -1.4 * (shares_NK * np.log(np.maximum(shares_NK, 1e-9))).sum(axis=1)
        return guess_N

    def entries(self, tables: Tables) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32] | None]:
        """Ids, counts and log-probabilities by falling log-probability, or count, ties by rising id."""
        there_NK = np.arange(self.ranks_NK.shape[1]) < self.sizes_N[:, None]
        ids_NK = tables.orders_CV[self.classes_N[:, None], self.ranks_NK]
        first_NK = -self.counts_NK if self.codes_NK is None else self.codes_NK
        order_NK = np.lexsort((ids_NK, first_NK, ~there_NK), axis=1)
        there_NK = np.take_along_axis(there_NK, order_NK, axis=1)
        logprobs_NK = None
        if self.codes_NK is not None:
            values_NK = -np.take_along_axis(self.codes_NK, order_NK, axis=1) / LOGPROB_SCALE
            logprobs_NK = np.where(there_NK, values_NK, -np.inf).astype(np.float32)
        return (
            np.where(there_NK, np.take_along_axis(ids_NK, order_NK, axis=1), -1).astype(np.int32),
            np.where(there_NK, np.take_along_axis(self.counts_NK, order_NK, axis=1), 0).astype(np.int32),
            logprobs_NK,
        )
