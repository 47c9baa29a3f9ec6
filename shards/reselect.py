"""Fewer ids out of what is kept, without the teacher: what is dropped goes back to the tail.

The tail's mass, its partition curve and the curve's slope are sums over ids, so what is dropped is added to them,
exactly at the nodes. The entropy is that of the full distribution and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards.assembly import Progress, Unit, make_set
from shards.codec import codec_for
from shards.contract import Contract, Selection
from shards.errors import InvalidRequest
from shards.learnt import EXAMPLES, tables_budget, with_tables
from shards.manifest import FIDELITY_FILE, Manifest
from shards.reader import ShardSet
from shards.record import Float32, Float64, Record
from shards.storage import Location, storage_at
from shards.units import ShardInfo, unit_of
from shards.writer import build_shard


def reselect_set(
    source: Location, target: Location, selection: Selection, *, progress: Progress | None = None
) -> Manifest:
    """Make a set that keeps fewer ids a position; whether its tail is known is told by the source.

    What the source's codec lost is lost: the values are those that it decodes. `progress` is told records. Stopped and
    called again, it goes on. Raises InvalidRequest for a selection that the source does not hold, UnknownVersion for
    one that its codec cannot carry, ContractMismatch where `target` holds another set, and what reading a damaged
    source raises.
    """
    shards, storage = ShardSet(source), storage_at(target)
    held = shards.contract.selection
    selection = replace(selection, tail_known=held.tail_known)
    require_held(held, selection)
    contract, tables = with_tables(
        storage,
        replace(shards.contract, selection=selection),
        lambda: _examples(shards, selection),
        budget=tables_budget(_positions_a_shard(shards)),
    )
    codec_for(contract, tables)
    # The fidelity was measured on the larger selection.
    names = [name for name in shards.manifest.teacher_files if name != FIDELITY_FILE]
    return make_set(
        storage,
        contract,
        (
            Unit(name=unit_of(info), size=info.records, make=partial(_narrowed, shards, info, contract, tables))
            for info in shards.manifest.shards
        ),
        lambda: {name: shards.teacher_file(name) for name in names},
        total=shards.manifest.totals()["records"],
        progress=progress,
    )


def _narrowed(shards: ShardSet, info: ShardInfo, contract: Contract, tables: bytes | None) -> bytes:
    shard = shards.open(info)
    records = [reselected(shard[row], contract.selection, contract.curve) for row in range(len(shard))]
    return build_shard(unit_of(info), info.split, contract, records, tables=tables)


def _examples(shards: ShardSet, selection: Selection) -> list[Record]:
    """Records of the set, evenly spread, as they will be."""
    split = shards.split(shards.splits[-1])
    step = -(-len(split) // EXAMPLES)
    return [reselected(split[index], selection, shards.contract.curve) for index in range(0, len(split), step)]


def _positions_a_shard(shards: ShardSet) -> int:
    return max(info.positions for info in shards.manifest.shards)


def require_held(old: Selection, new: Selection) -> None:
    """Raise InvalidRequest where `new` keeps what `old` did not."""
    if (refused := _refused(old, new)) is not None:
        raise InvalidRequest(refused, hint="a set can only lose ids: fewer k, less mass, a higher floor")


def _refused(old: Selection, new: Selection) -> str | None:
    if old.kind == "sample":
        return "a sampled set has no exact ids to choose from"
    if new.kind not in ("topk", "adaptive"):
        return f"a selection {new.kind!r} draws, and drawing needs the teacher"
    if old.kind == "adaptive" and (new.kind != "adaptive" or new.mass > old.mass or new.floor < old.floor):
        return "an adaptive set can only become one of at most its mass and at least its floor"
    if new.k > old.k:
        return f"the set keeps {old.k} ids a position, not {new.k}"
    return None


def reselected(record: Record, selection: Selection, curve: Sequence[float]) -> Record:
    """A record with fewer ids. `curve` are the contract's exponents; draws outside the head are dropped, too."""
    assert record.logprobs_NK is not None
    exact_NK = record.ids_NK >= 0
    if record.draws_NK is not None:
        exact_NK &= record.draws_NK == 0
    kept_NK = exact_NK & _chosen(np.where(exact_NK, record.logprobs_NK, -np.inf), selection)
    back_NK = np.where(exact_NK & ~kept_NK, record.logprobs_NK, -np.inf).astype(np.float64)
    # The exact ids lead their row by falling probability: the first k columns hold whatever is kept.
    ids_NK = np.where(kept_NK, record.ids_NK, -1)[:, : selection.k]
    logprobs_NK = np.where(kept_NK, record.logprobs_NK, -np.inf)[:, : selection.k]
    return replace(
        record,
        ids_NK=ids_NK.astype(np.int32),
        logprobs_NK=logprobs_NK.astype(np.float32),
        draws_NK=None,
        log_tail_N=_add(record.log_tail_N.astype(np.float64), _log_sum(back_NK)).astype(np.float32),
        curve_NJ=None if record.curve_NJ is None else _with(record.curve_NJ.astype(np.float64), back_NK, curve),
    )


def _chosen(logprobs_NK: NDArray[np.floating], selection: Selection) -> NDArray[np.bool_]:
    """The first k, up to the id with which the mass is reached or before the first below the floor; at least one."""
    probs_NK = np.exp(logprobs_NK.astype(np.float64))
    dropped_NK = np.zeros(probs_NK.shape, np.bool_)
    if selection.kind == "adaptive":
        dropped_NK |= (probs_NK.cumsum(axis=1) - probs_NK >= selection.mass) | (probs_NK < selection.floor)
    dropped_NK[:, 0] = False
    dropped_NK[:, selection.k :] = True
    chosen_NK: NDArray[np.bool_] = ~np.maximum.accumulate(dropped_NK, axis=1)
    return chosen_NK


def _with(curve_NJ: Float64, back_NK: Float64, exponents: Sequence[float]) -> Float32:
    """The partition curve and its slopes with the ids of `back_NK` (log-probabilities, -inf for none) added."""
    log_NK = np.where(np.isneginf(back_NK), 0.0, back_NK)
    values, slopes = [], []
    for j, b in enumerate(exponents):
        value_N = _add(curve_NJ[:, j], _log_sum(b * back_NK))
        with np.errstate(invalid="ignore"):  # -inf - -inf: a tail without anything in it, whose slope has no meaning
            old_N = np.nan_to_num(np.exp(curve_NJ[:, j] - value_N)) * curve_NJ[:, len(exponents) + j]
            added_NK = np.nan_to_num(np.exp(b * back_NK - value_N[:, None])) * log_NK
        values.append(value_N)
        slopes.append(old_N + added_NK.sum(axis=1))
    return np.stack([*values, *slopes], axis=1).astype(np.float32)


def _add(log_N: Float64, other_N: Float64) -> Float64:
    """log(e^x + e^y); NaN, which says that the tail is not known, stays."""
    with np.errstate(invalid="ignore"):
        total_N: Float64 = np.logaddexp(log_N, other_N)
    return total_N


def _log_sum(logs_NK: Float64) -> Float64:
    total_N: Float64 = np.logaddexp.reduce(logs_NK, axis=1, initial=-np.inf)
    return total_N
