"""Rows of logits of one shard of a vocabulary, reduced where they lie: by tensor operations, or on a CPU by loops.

Shape suffixes as in `shards.record`; besides, P is the padded width of the shard, C counts candidates or blocks of a
row, and D draws.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.teacher_cache.draws import BLOCK, block_masses, drawn_columns
from stages.teacher_cache.logit_loops import select_largest, sum_tails
from stages.teacher_cache.signals import mask_kept, tail_sums
from stages.wide_topk import select_topk

_ROWS_A_TURN = 16
"""Rows that a thread takes at once: about a millisecond's."""


class LogitRows(ABC):
    """Logits [N, V]; what is kept of them is taken out once it is known."""

    def __init__(self, logits_NV: Tensor) -> None:
        self._logits_NV = logits_NV

    @abstractmethod
    def largest(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of each row by falling value, and their columns; equal values by rising column."""

    @abstractmethod
    def take_out(
        self, columns_NC: Tensor, kept_NC: Tensor, reference_N: Tensor, curve: Sequence[float], *, masses: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`signals.tail_sums` of what the kept of `columns_NC` leave, and if wanted its `draws.block_masses`."""

    def drawn(self, reference_N: Tensor, masses_NC: Tensor, targets_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The columns [N, D] that draws from the rest fall on, and their logits above the reference."""
        columns_ND = drawn_columns(self._logits_NV, reference_N, masses_NC, targets_ND)
        return columns_ND, self._logits_NV.gather(1, columns_ND) - reference_N[:, None]


def logit_rows(logits_NP: Tensor, width: int) -> LogitRows:
    """The first `width` columns, which are the rows' own from now on."""
    return LoopedRows(logits_NP, width) if logits_NP.device.type == "cpu" else TensorRows(logits_NP[:, :width].float())


class TensorRows(LogitRows):
    """fp32 logits on any device."""

    def largest(self, count: int) -> tuple[Tensor, Tensor]:
        return select_topk(self._logits_NV, count)

    def take_out(
        self, columns_NC: Tensor, kept_NC: Tensor, reference_N: Tensor, curve: Sequence[float], *, masses: bool
    ) -> tuple[Tensor, Tensor | None]:
        mask_kept(self._logits_NV, columns_NC, kept_NC, reference_N)
        sums_NJ2 = tail_sums(self._logits_NV, reference_N, curve)
        return sums_NJ2, block_masses(self._logits_NV, reference_N) if masses else None


class LoopedRows(LogitRows):
    """fp32 or bfloat16 logits on a CPU, as whatever multiplied them left them; rows go over torch's threads.

    A row's results depend on that row alone, so that any number of threads gives the same bits.
    """

    def __init__(self, logits_NP: Tensor, width: int) -> None:
        if logits_NP.dtype != torch.bfloat16:
            logits_NP = logits_NP.float()
        logits_NP = logits_NP.contiguous()
        super().__init__(logits_NP[:, :width])
        bits = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}[logits_NP.dtype]
        self._bits_NP: NDArray[Any] = logits_NP.view(bits).numpy()
        self._shift = 32 - 8 * self._bits_NP.itemsize

    def largest(self, count: int) -> tuple[Tensor, Tensor]:
        rows, width = self._logits_NV.shape
        values_NK, columns_NK = np.empty((rows, count), np.float32), np.empty((rows, count), np.int64)

        def select(turn: slice) -> None:
            select_largest(self._bits_NP[turn], self._shift, width, values_NK[turn], columns_NK[turn])

        _over_threads(select, rows)
        return torch.from_numpy(values_NK), torch.from_numpy(columns_NK)

    def take_out(
        self, columns_NC: Tensor, kept_NC: Tensor, reference_N: Tensor, curve: Sequence[float], *, masses: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, width = self._logits_NV.shape
        nodes = sorted((1.0, *curve))
        doubles = [node == 2 * below for below, node in zip([0.0, *nodes], nodes, strict=False)]
        exponents, squared = np.array(nodes, np.float32), np.array(doubles)
        columns, kept, reference = (each.contiguous().numpy() for each in (columns_NC, kept_NC, reference_N))
        sums_NJ2 = np.empty((rows, len(nodes), 2))
        masses_NC = np.zeros((rows, width // BLOCK + 1 if masses else 0))

        def add_up(turn: slice) -> None:
            given = columns[turn], kept[turn], reference[turn], exponents, squared
            sum_tails(self._bits_NP[turn], self._shift, width, *given, sums_NJ2[turn], masses_NC[turn])

        _over_threads(add_up, rows)
        wanted = [nodes.index(node) for node in (1.0, *curve)]
        return torch.from_numpy(sums_NJ2).float()[:, wanted], torch.from_numpy(masses_NC) if masses else None


def _over_threads(work: Callable[[slice], None], rows: int) -> None:
    turns = [slice(start, start + _ROWS_A_TURN) for start in range(0, rows, _ROWS_A_TURN)]
    if torch.get_num_threads() == 1 or len(turns) == 1:
        for turn in turns:
            work(turn)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=_spread, initargs=(_allowed(),)) as pool:
        for _ in pool.map(work, turns):
            pass


def _allowed() -> set[int]:
    """The cores of all threads of this process: where OpenMP binds its own, a new one would share its maker's core."""
    cores = set[int]()
    for path in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # a thread that ended since it was listed
            cores |= os.sched_getaffinity(int(path.name))
    return cores


def _spread(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
