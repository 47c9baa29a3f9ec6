"""Mining of hard records: how hard each has been, and which an epoch therefore holds twice, once or not at all.

- A record's difficulty is its KL over the KL of all records at that time, as a running mean over its visits. What falls
  for all as the student learns is divided out: it matters how hard a record is, not when it came.
- An epoch after the first holds the hardest records twice and leaves as many of the easiest out, but none that was left
  out of the epoch before. So a record weighs 0, 1 or 2, and is seen in one of any two epochs in a row.
- What an epoch holds depends on a snapshot taken at its start. Difficulties are rounded there: another number of ranks
  adds up in another order, and must come to the same records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.contract import Contract
from stages.errors import SettingError

if TYPE_CHECKING:
    from stages.distill.order import Indices

LEVELS = 64
"""Of difficulty that a snapshot tells apart between 0 and the mean."""
_NEWEST_STEP = 0.1
"""Weight of a step in the running mean of KL that its records are compared with."""


def require_minable(contract: Contract) -> None:
    """Raise SettingError for shards whose KL of one record says little."""
    if not contract.selection.logprobs:
        raise SettingError(
            f"distill.mining_share needs log-probabilities; this selection {contract.selection.kind!r} keeps none",
            hint="set distill.mining_share = 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Of R records, as an epoch begins."""

    level_R: Indices
    """Difficulty in steps of 1 / LEVELS."""
    rested_R: NDArray[np.bool_]
    """The epoch before did without it."""


def compose(snapshot: Snapshot, shuffled: Indices, *, repeats: int, places: int) -> tuple[Indices, Indices]:
    """The records that come twice, `repeats` of them, and those that come once, to fill an epoch's places together.

    `shuffled` holds every record; of equals, its last come twice and its first rest.
    """
    rising = shuffled[np.argsort(snapshot.level_R[shuffled], kind="stable")]
    others, twice = np.split(rising, [rising.size - repeats])
    resting = others[~snapshot.rested_R[others]][: rising.size + repeats - places]
    once = others[~np.isin(others, resting)]
    assert 2 * twice.size + once.size == places
    return twice, once


class RecordDifficulty:
    """What a run knows about its records so far, and the snapshot that the epoch under way goes by."""

    def __init__(self, records: int, *, memory: float) -> None:
        self.snapshot: Snapshot | None = None
        """None in the first epoch."""
        self._memory = memory
        self._mean_kl = np.nan
        self._difficulty_R = np.full(records, np.nan)

    @property
    def spread(self) -> float:
        """Standard deviation of difficulty over the records that were seen; its mean is about 1."""
        return float(np.nanstd(self._difficulty_R))

    def observe(self, records: Indices, kl: NDArray[np.float64]) -> None:
        """Learn the mean KL of each record of a step, none of which comes twice in it."""
        mean = float(kl.mean())
        self._mean_kl = mean if np.isnan(self._mean_kl) else self._mean_kl + _NEWEST_STEP * (mean - self._mean_kl)
        found = kl / self._mean_kl
        before = self._difficulty_R[records]
        self._difficulty_R[records] = np.where(
            np.isnan(before), found, self._memory * before + (1 - self._memory) * found
        )

    def begin_epoch(self, rested_R: NDArray[np.bool_]) -> None:
        """Take the snapshot for the next epoch; records never seen count as average."""
        level_R = np.rint(np.nan_to_num(self._difficulty_R, nan=1.0) * LEVELS).astype(np.int64)
        self.snapshot = Snapshot(level_R=level_R, rested_R=rested_R)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        found = {"difficulty": self._difficulty_R.copy(), "mean_kl": np.array([self._mean_kl])}
        if self.snapshot is not None:
            found |= {"level": self.snapshot.level_R, "rested": self.snapshot.rested_R}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._difficulty_R = state["difficulty"].numpy().copy()
        self._mean_kl = float(state["mean_kl"])
        if "level" in state:
            self.snapshot = Snapshot(level_R=state["level"].numpy(), rested_R=state["rested"].numpy())
