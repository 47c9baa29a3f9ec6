"""Facts about shards for people: what one holds, and whether a set is intact. Nothing here is formatted or printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.errors import ShardError
from shards.reader import ShardSet
from shards.record import Record
from shards.schema import cell_names
from shards.shard import ShardReader

Decode = Callable[[Sequence[int]], str]

ALTERNATIVES = 5
"""How many of the teacher's candidates are shown a position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Quantiles of a number over a shard's records."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float

    @classmethod
    def of(cls, values: NDArray[np.int32] | NDArray[np.float32]) -> Spread:
        minimum, lower, median, upper, maximum = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return cls(minimum=minimum, lower_quartile=lower, median=median, upper_quartile=upper, maximum=maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedPosition:
    """One predicted token and what the teacher thought there."""

    token_id: int
    token: str | None
    coverage: float
    """Probability mass of the kept ids."""
    entropy: float
    alternatives: tuple[tuple[int, str | None, float], ...]
    """(id, text, probability) of the most probable ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedRecord:
    """One record in words; the texts are None where no `decode` was given."""

    row: int
    sample_id: str
    prompt: str | None
    response: str | None
    positions: tuple[InspectedPosition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one shard holds."""

    path: Path
    contract: Contract
    unit: str
    split: str
    records: int
    positions: int
    entries: int
    """Kept ids over all positions."""
    bytes: int
    bytes_per_position: Mapping[str, float]
    """Bytes of the file by part, divided by its positions; "all" is their sum."""
    coverage: Spread
    """Of the records' mean kept mass."""
    entropy: Spread
    """Of the records' mean entropy, in nats."""
    damage: str | None
    """What the checksums found; None where every byte is as it was written."""
    record: InspectedRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The verdict on a set: `damage` maps the name of each damaged file to what is wrong with it."""

    folder: Path
    shards: int
    teacher_files: int
    bytes: int
    damage: Mapping[str, str]

    @property
    def intact(self) -> bool:
        return not self.damage


def inspect_shard(path: Path, *, record: int | None = None, decode: Decode | None = None) -> Inspection:
    """Describe a shard, and one of its records where asked for.

    `decode` turns ids into text. Raises ShardError where the shard cannot be opened; damage that leaves it readable is
    reported, not raised. Raises ValueError where there is no such record.
    """
    with ShardReader.open(path) as shard:
        if record is not None and not 0 <= record < len(shard):
            raise ValueError(f"{path} has records 0 to {len(shard) - 1}, not {record}")
        positions = int(shard.numbers("positions").sum(dtype=np.int64))
        return Inspection(
            path=path,
            contract=shard.contract,
            unit=shard.unit,
            split=shard.split,
            records=len(shard),
            positions=positions,
            entries=int(shard.numbers("entries").sum(dtype=np.int64)),
            bytes=shard.size,
            bytes_per_position=_bytes_per_position(shard, positions),
            coverage=Spread.of(shard.numbers("mean_coverage")),
            entropy=Spread.of(shard.numbers("mean_entropy")),
            damage=_damage(shard.verify),
            record=None if record is None else _inspected(shard[record], record, decode),
        )


def verify_shards(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every byte of a set against its manifest and report all damage, not only the first.

    `progress` is told how many bytes of how many are done. Raises ShardError only where the manifest cannot be read.
    """
    shards = ShardSet(folder)
    manifest = shards.manifest
    damage: dict[str, str] = {}
    for name in manifest.teacher_files:
        _note(damage, f"teacher/{name}", _damage(partial(shards.verify_teacher_file, name)))
    total, done = manifest.totals()["bytes"], 0
    for info in manifest.shards:
        _note(damage, info.name, _damage(partial(shards.verify_shard, info)))
        done += info.bytes
        if progress is not None:
            progress(done, total)
    return VerifyReport(
        folder=folder,
        shards=len(manifest.shards),
        teacher_files=len(manifest.teacher_files),
        bytes=total,
        damage=damage,
    )


def _damage(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ShardError as error:
        return str(error)
    return None


def _note(damage: dict[str, str], name: str, found: str | None) -> None:
    if found is not None:
        damage[name] = found


def _bytes_per_position(shard: ShardReader, positions: int) -> dict[str, float]:
    """By part: `signal` is selection, tail and entropy; `columns` is all that is neither a payload nor a token."""
    cells = {name: int(shard.cell_sizes(name).sum()) for name in cell_names(shard.contract)}
    tokens = cells.pop("prompt_ids") + cells.pop("response_ids")
    parts = {**cells, "tokens": tokens, "columns": shard.size - tokens - sum(cells.values()), "all": shard.size}
    return {name: size / positions for name, size in parts.items()}


def _inspected(record: Record, row: int, decode: Decode | None) -> InspectedRecord:
    def text(ids: Sequence[int]) -> str | None:
        return None if decode is None else decode(ids)

    assert record.logprobs_NK is not None, "the one codec there is keeps log-probabilities"
    probabilities_NK, coverage_N = np.exp(record.logprobs_NK), record.coverage_N
    positions = []
    for position in range(record.positions):
        token = int(record.response_ids_R[record.first_position + position])
        best = zip(record.ids_NK[position].tolist(), probabilities_NK[position].tolist(), strict=True)
        positions.append(
            InspectedPosition(
                token_id=token,
                token=text([token]),
                coverage=float(coverage_N[position]),
                entropy=float(record.entropy_N[position]),
                alternatives=tuple((id_, text([id_]), probability) for id_, probability in islice(best, ALTERNATIVES)),
            )
        )
    return InspectedRecord(
        row=row,
        sample_id=record.sample_id,
        prompt=text(record.prompt_ids_P.tolist()),
        response=text(record.response_ids_R.tolist()),
        positions=tuple(positions),
    )
