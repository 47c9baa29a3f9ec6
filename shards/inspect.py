"""Facts about a shard or a set for people: contract, sizes, quantiles, checksums. Nothing here is formatted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.errors import InvalidRequest, ShardError
from shards.reader import ShardSet
from shards.sample_view import Decode, SampleView, view_sample
from shards.schema import cell_names
from shards.shard import ShardReader
from shards.storage import Location, Storage, storage_at
from shards.verify import damage_of

Numbers = NDArray[np.int32] | NDArray[np.float32]

_REMOTE_SHARD = re.compile(r"(?P<folder>.+)/(?P<name>[^/?]+-(?P<sha256>[0-9a-f]{64})\.arrow)(?P<options>\?.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Quantiles of a number over records; NaN where a record does not state it."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float

    @classmethod
    def of(cls, values: Numbers) -> Spread:
        minimum, lower, median, upper, maximum = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return cls(minimum=minimum, lower_quartile=lower, median=median, upper_quartile=upper, maximum=maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """The verdict on every byte of the shards that were looked into."""

    intact: bool
    damage: Mapping[str, str]
    """What is wrong, by shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a shard or a set holds."""

    contract: Contract
    where: str
    shards: int
    records: int
    positions: int
    entries: int
    """Kept ids over all positions."""
    bytes: int
    """Of all shards."""
    looked_into: tuple[str, ...]
    """The shards that the sizes by part and the checksum speak of: of a set, the first of each split."""
    bytes_by_column: Mapping[str, int]
    """"framing" is all that is no column: schema, footer, padding."""
    bytes_per_position: Mapping[str, float]
    """By part: each payload of the codec, its tables, the tokens, and "columns" for the rest; "all" is their sum."""
    coverage: Spread
    """Of the records' mean kept mass."""
    entropy: Spread
    """Of the records' mean entropy, in nats."""
    checksum: Checksum
    fidelity: Mapping[str, float]
    """What stage one measured against the teacher itself, by name; empty where it did not, and for a shard alone."""
    sample: SampleView | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which sample of a shard or set to show, and how."""

    sample: int
    """Its number, in the order of the manifest."""
    positions: Sequence[int] | None = None
    """Response tokens to show; by default those where the teacher was least certain."""
    decoder: Callable[[Path], Decode | None] = lambda _: None
    """Makes what turns ids into text from the teacher's folder."""


def inspect(location: Location, *, show: Request | None = None) -> Inspection:
    """Describe a shard, by path or URL, or a set, and one of its samples where asked for.

    Of a set only the manifest, the plain columns and the first shard of each split are read. Raises ShardError where
    nothing can be opened, InvalidRequest where there is no such sample or position; damage that leaves a shard readable
    is reported, not raised.
    """
    if isinstance(location, Path) and location.is_file():
        return _inspect_shard(location, storage_at(location.parent), str(location), show)
    if isinstance(location, str) and (remote := _REMOTE_SHARD.fullmatch(location)):
        storage = storage_at(remote["folder"] + (remote["options"] or ""))
        path = storage.local(remote["name"], sha256=remote["sha256"])
        return _inspect_shard(path, storage, storage.where(remote["name"]), show)
    return _inspect_set(ShardSet(location), show)


def _inspect_shard(path: Path, around: Storage, called: str, show: Request | None) -> Inspection:
    with ShardReader.open(path, called=called) as shard:
        view = None
        if show is not None:
            _require_sample(called, show.sample, len(shard))
            decode = _decode_beside(around, show)
            view = view_sample(shard, show.sample, decode=decode, positions=show.positions)
        return _inspection(called, [shard], shard.numbers, shards=1, size=shard.size, fidelity={}, sample=view)


def _inspect_set(shards: ShardSet, show: Request | None) -> Inspection:
    totals = shards.manifest.totals()
    view = None
    if show is not None:
        _require_sample(shards.where, show.sample, totals["records"])
        info, row = shards.locate(show.sample)
        decode = show.decoder(shards.teacher_folder)
        view = view_sample(shards.open(info), row, decode=decode, positions=show.positions)
    first = {info.split: info for info in reversed(shards.manifest.shards)}
    opened = [shards.open(first[split]) for split in shards.splits]
    numbers = partial(shards.columns.numbers, rows=slice(None))
    return _inspection(
        shards.where,
        opened,
        numbers,
        shards=totals["shards"],
        size=totals["bytes"],
        fidelity=shards.fidelity(),
        sample=view,
    )


def _inspection(
    where: str,
    opened: Sequence[ShardReader],
    numbers: Callable[[str], Numbers],
    *,
    shards: int,
    size: int,
    fidelity: Mapping[str, float],
    sample: SampleView | None,
) -> Inspection:
    positions = numbers("positions")
    damage = {shard.called: found for shard in opened if (found := damage_of(shard.verify)) is not None}
    return Inspection(
        contract=opened[0].contract,
        where=where,
        shards=shards,
        records=len(positions),
        positions=int(positions.sum(dtype=np.int64)),
        entries=int(numbers("entries").sum(dtype=np.int64)),
        bytes=size,
        looked_into=tuple(shard.called for shard in opened),
        bytes_by_column=_bytes_by_column(opened),
        bytes_per_position=_bytes_per_position(opened),
        coverage=Spread.of(numbers("mean_coverage")),
        entropy=Spread.of(numbers("mean_entropy")),
        checksum=Checksum(intact=not damage, damage=damage),
        fidelity=fidelity,
        sample=sample,
    )


def _bytes_by_column(opened: Sequence[ShardReader]) -> dict[str, int]:
    sizes = sum((Counter(shard.column_sizes()) for shard in opened), Counter[str]())
    return {**sizes, "framing": sum(shard.size for shard in opened) - sizes.total()}


def _bytes_per_position(opened: Sequence[ShardReader]) -> dict[str, float]:
    """By part: each payload of the codec, its tables, tokens, and in "columns" all that is none of these."""
    cells = sum(
        (Counter({name: int(shard.cell_sizes(name).sum()) for name in cell_names(shard.contract)}) for shard in opened),
        Counter[str](),
    )
    size = sum(shard.size for shard in opened)
    tokens = cells.pop("prompt_ids") + cells.pop("response_ids")
    tables = sum(len(shard.tables or b"") for shard in opened)
    rest = size - tokens - tables - cells.total()
    parts = {**cells, "tables": tables, "tokens": tokens, "columns": rest, "all": size}
    positions = sum(int(shard.numbers("positions").sum(dtype=np.int64)) for shard in opened)
    return {name: part / positions for name, part in parts.items()}


def _decode_beside(around: Storage, show: Request) -> Decode | None:
    """By the tokenizer of the set that a shard lies in; a shard that travels alone shows ids."""
    try:
        return show.decoder(ShardSet(around).teacher_folder)
    except ShardError:
        return None


def _require_sample(where: str, sample: int, count: int) -> None:
    if not 0 <= sample < count:
        raise InvalidRequest(f"{where} has samples 0 to {count - 1}, not {sample}", hint="samples are counted from 0")
