"""A shard set as Parquet: one file a shard, every value decoded into typed columns, for tools that know no codec.

- Lists hold what there is: a position with fewer ids than the widest has a shorter list, and no padding.
- Columns that the contract has no use for (draws, curve, attention) are absent.
- A file appears whole or not at all and names its shard's hash: an export that was stopped goes on where it stopped.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.assembly import Progress
from shards.contract import DRAWN, Contract
from shards.durable import make_folder, sync
from shards.errors import InvalidRequest, StorageFailed
from shards.reader import ShardSet
from shards.record import AttentionSummary, Record
from shards.schema import LENGTHS, STATISTICS
from shards.shard import ShardReader
from shards.storage import Location
from shards.units import ShardInfo

FORMATS = ("parquet",)
_ROWS = 64
"""Records a row group: what a reader of one record must fetch."""
_OTHER_FOLDER = "give an empty or a new folder"
_SHA256_KEY, _CONTRACT_KEY = b"shard_sha256", b"contract"

_INTEGERS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_POSITION_INTEGERS, _POSITION_FLOATS = pa.list_(_INTEGERS), pa.list_(_FLOATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export left in its folder."""

    files: int
    written: int
    """Files that were not there before."""
    records: int
    bytes: int


def export_parquet(location: Location, target: Path, *, progress: Progress | None = None) -> ExportReport:
    """Write every shard of a set as `target`/UNIT.parquet; what is there already is kept.

    `progress` is told records. Raises InvalidRequest where `target` holds another set's file, StorageFailed, and what
    reading a damaged shard raises.
    """
    shards = ShardSet(location)
    make_folder(target)
    done, total, written, size = 0, shards.manifest.totals()["records"], 0, 0
    for info in shards.manifest.shards:
        shard = shards.open(info)
        path = target / f"{shard.unit}.parquet"
        if not _is_there(path, info):
            _write(shard, info, path)
            written += 1
        done, size = done + info.records, size + path.stat().st_size
        if progress is not None:
            progress(done, total)
    return ExportReport(files=len(shards.manifest.shards), written=written, records=total, bytes=size)


def parquet_schema(contract: Contract) -> pa.Schema:
    """The columns of an exported set, in the shapes of `Record`: lists run over positions, then over what is kept."""
    columns = {
        "sample_id": pa.string(),
        "split": pa.string(),
        **dict.fromkeys(LENGTHS, pa.int32()),
        **dict.fromkeys(STATISTICS, pa.float32()),
        "prompt_ids": _INTEGERS,
        "response_ids": _INTEGERS,
        "ids": _POSITION_INTEGERS,
        **({"logprobs": _POSITION_FLOATS} if contract.selection.logprobs else {}),
        **({"draws": _POSITION_INTEGERS} if contract.selection.kind in DRAWN else {}),
        "log_tail": _FLOATS,
        "entropy": _FLOATS,
        **({"curve": _POSITION_FLOATS} if contract.curve else {}),
    }
    if contract.attention is not None:
        columns |= {
            "attention_positions": pa.list_(_POSITION_INTEGERS),
            "attention_weights": pa.list_(_POSITION_FLOATS),
            **dict.fromkeys(("attention_sink", "attention_prompt", "attention_entropy"), _POSITION_FLOATS),
        }
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _is_there(path: Path, info: ShardInfo) -> bool:
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError) as error:
        raise InvalidRequest(f"{path} is no Parquet file: {error}", hint=_OTHER_FOLDER) from error
    if metadata.get(_SHA256_KEY) != info.sha256.encode():
        raise InvalidRequest(f"{path} comes from another shard than {info.name}", hint=_OTHER_FOLDER)
    return True


def _write(shard: ShardReader, info: ShardInfo, path: Path) -> None:
    described = {_CONTRACT_KEY: shard.contract.to_json().encode(), _SHA256_KEY: info.sha256.encode()}
    schema = parquet_schema(shard.contract).with_metadata(described)
    arriving = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with pq.ParquetWriter(arriving, schema, compression="zstd") as writer:
            for start in range(0, len(shard), _ROWS):
                rows = range(start, min(start + _ROWS, len(shard)))
                writer.write_batch(_batch(shard, rows, schema), row_group_size=_ROWS)
        sync(arriving)
        arriving.replace(path)
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error}", hint="make room, then run it again") from error
    finally:
        arriving.unlink(missing_ok=True)


def _batch(shard: ShardReader, rows: range, schema: pa.Schema) -> pa.RecordBatch:
    numbers = {name: pa.array(shard.numbers(name)[rows.start : rows.stop]) for name in (*LENGTHS, *STATISTICS)}
    records = [_columns(shard[row]) for row in rows]
    nested = {name: pa.concat_arrays([record[name] for record in records]) for name in records[0]}
    plain = {
        "sample_id": pa.array(shard.sample_ids[rows.start : rows.stop]),
        "split": pa.array([shard.split] * len(rows)),
    }
    columns = {**numbers, **nested, **plain}
    assert set(columns) == set(schema.names)
    return pa.RecordBatch.from_arrays(
        [columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema
    )


def _columns(record: Record) -> dict[str, pa.ListArray]:
    """The lists of one record, each in an array of length one."""
    kept_NK = record.ids_NK >= 0
    counts_N = kept_NK.sum(axis=1)
    columns = {
        "prompt_ids": _lists(pa.array(record.prompt_ids_P)),
        "response_ids": _lists(pa.array(record.response_ids_R)),
        "log_tail": _lists(pa.array(record.log_tail_N)),
        "entropy": _lists(pa.array(record.entropy_N)),
    }
    ragged = {"ids": record.ids_NK, "logprobs": record.logprobs_NK, "draws": record.draws_NK}
    columns |= {
        name: _lists(_lists(pa.array(values_NK[kept_NK]), counts_N))
        for name, values_NK in ragged.items()
        if values_NK is not None
    }
    if record.curve_NJ is not None:
        columns["curve"] = _lists(_rows(record.curve_NJ))
    if record.attention is not None:
        columns |= _attention(record.attention)
    return columns


def _attention(summary: AttentionSummary) -> dict[str, pa.ListArray]:
    layers, positions, _ = summary.positions_LNM.shape
    kept_LNM = summary.positions_LNM >= 0
    counts = kept_LNM.sum(axis=2).ravel()
    keys = {"attention_positions": summary.positions_LNM, "attention_weights": summary.weights_LNM}
    masses = {
        "attention_sink": summary.sink_LN,
        "attention_prompt": summary.prompt_LN,
        "attention_entropy": summary.entropy_LN,
    }
    each_layer = np.full(layers, positions)
    return {
        **{name: _lists(_lists(_lists(pa.array(x[kept_LNM]), counts), each_layer)) for name, x in keys.items()},
        **{name: _lists(_rows(values_LN)) for name, values_LN in masses.items()},
    }


def _rows(values: NDArray[np.float32]) -> pa.ListArray:
    """A list for each row of a matrix."""
    return _lists(pa.array(values.ravel()), np.full(len(values), values.shape[1]))


def _lists(values: pa.Array, lengths: NDArray[np.int64] | None = None) -> pa.ListArray:
    """Cut values into lists of these lengths; by default into one."""
    lengths = np.array([len(values)]) if lengths is None else lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
