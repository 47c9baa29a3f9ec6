"""What a codec makes of records: bytes by part and their bound, errors, and rates beside those of a peer's layout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.codec import codec_for
from shards.contract import Contract
from shards.planes.learn_tables import learn_tables
from shards.planes.numbers import to_symbols
from shards.planes.rans import Coder, decode
from shards.planes.tables import Tables, fingerprint
from shards.record import Record
from shards.signal import Signal
from shards.topk_planes import TopkPlanes1

SHARD_POSITIONS = 250_000
BUDGET = 1 << 17
REPEATS = 5

Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes a position by part, the order-0 bound of the signal's streams, and what was decoded."""

    signal: float
    tables: float
    attention: float
    bound: float
    by_kind: dict[str, float]
    decoded: list[Record]
    encode: Callable[[], object]
    decode: Callable[[], object]
    coder: Mapping[str, Callable[[], object]]
    """The same with all but the entropy coder's own work done beforehand; of codecs with tables."""

    @property
    def total(self) -> float:
        return self.signal + self.tables


def measure(contract: Contract, test: Sequence[Record], taught: Sequence[Record]) -> Measured:
    data = None
    if contract.codec != TopkPlanes1.name:
        data = learn_tables(taught, contract, budget=BUDGET)
        contract = dataclasses.replace(contract, tables=fingerprint(data))
    codec = codec_for(contract, data)
    cells = codec.encode_signals(test)
    kept = [int((record.ids_NK >= 0).sum()) for record in test]

    def decoded() -> list[Signal]:
        return [
            codec.decode_signal(cell, labels_N=record.labels_N, entries=count)
            for cell, record, count in zip(cells, test, kept, strict=True)
        ]

    positions = sum(record.positions for record in test)
    attention = sum(len(codec.encode_attention(record)) for record in test) if contract.attention else 0
    by_kind = _order_0(codec, test) if data else {}
    coder = _coder_alone(codec, Tables.from_bytes(data, contract.vocab_size).coder, test, cells) if data else {}
    return Measured(
        signal=sum(map(len, cells)) / positions,
        tables=len(data or b"") / SHARD_POSITIONS,
        attention=attention / positions,
        bound=sum(by_kind.values()) / positions,
        by_kind={kind: size / positions for kind, size in by_kind.items()},
        decoded=[_with(record, signal) for record, signal in zip(test, decoded(), strict=True)],
        encode=lambda: codec.encode_signals(test),
        decode=decoded,
        coder=coder,
    )


def _with(record: Record, signal: Signal) -> Record:
    names = [field.name for field in dataclasses.fields(signal)]
    return dataclasses.replace(record, **{name: getattr(signal, name) for name in names})


def _coder_alone(
    codec: object, coder: Coder, records: Sequence[Record], cells: Sequence[bytes]
) -> dict[str, Callable[[], object]]:
    streams = [list(codec.signal_streams(record)) for record in records]  # type: ignore[attr-defined]
    rows = [
        np.concatenate([np.full(part.numbers.size, coder.row(part.kind)) + part.contexts for part in of_record])
        for of_record in streams
    ]
    given = [
        (cell, codes.astype(np.uint16), np.empty(len(codes), np.int32)) for cell, codes in zip(cells, rows, strict=True)
    ]
    return {
        "encode": lambda: [coder.pack(of_record) for of_record in streams],
        "decode": lambda: [decode(coder.reader(cell).source, codes, into) for cell, codes, into in given],
    }


def _order_0(codec: object, records: Sequence[Record]) -> dict[str, float]:
    """Bytes of each kind of stream at the order-0 entropy of its symbols in their contexts, side bytes included."""
    counts: dict[tuple[str, int], NDArray[np.int64]] = {}
    found: dict[str, float] = {}
    for record in records:
        for kind, numbers, contexts in codec.signal_streams(record):  # type: ignore[attr-defined]
            symbols, sides = to_symbols(numbers)
            found[kind] = found.get(kind, 0) + sides
            every = np.broadcast_to(contexts, symbols.shape)
            for context in np.unique(every).tolist():
                seen = np.bincount(symbols[every == context], minlength=256)
                counts[kind, context] = counts.get((kind, context), 0) + seen
    for (kind, _), seen in counts.items():
        found[kind] += _entropy(seen) * seen.sum() / 8
    return found


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bucket_kl(records: Sequence[Record], decoded: Sequence[Record]) -> float:
    """Mean KL(teacher || decoded) over the kept ids and the tail."""
    return float(np.concatenate([_bucket_kl(a, b) for a, b in zip(records, decoded, strict=True)]).mean())


def _bucket_kl(record: Record, decoded: Record) -> Float64:
    truth, guess = (_buckets(side) for side in (record, decoded))
    with np.errstate(invalid="ignore"):
        kl_N: Float64 = np.where(np.isneginf(truth), 0, np.exp(truth) * (truth - guess)).sum(axis=1)
    return kl_N


def _buckets(side: Record) -> Float64:
    assert side.logprobs_NK is not None
    order_NK = np.argsort(side.ids_NK, axis=1)
    kept_NK = np.take_along_axis(side.logprobs_NK.astype(np.float64), order_NK, axis=1)
    logs = np.concatenate([kept_NK, side.log_tail_N.astype(np.float64)[:, None]], axis=1)
    return logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)  # type: ignore[no-any-return]


def full_kl(records: Sequence[Record], decoded: Sequence[Record], vocab_size: int) -> float:
    """Mean KL(whole teacher || decoded), the decoded tail spread evenly over all ids that were not kept."""
    found = []
    for record, guess in zip(records, decoded, strict=True):
        assert record.logprobs_NK is not None
        logs_NK = record.logprobs_NK.astype(np.float64)
        head_N = (np.exp(logs_NK) * np.maximum(logs_NK, -1e4)).sum(axis=1)
        kept_N = (record.ids_NK >= 0).sum(axis=1)
        tail_N = np.exp(record.log_tail_N.astype(np.float64))
        inside_N = -record.entropy_N - head_N - tail_N * np.maximum(record.log_tail_N, -1e4)
        found.append(_bucket_kl(record, guess) + inside_N + tail_N * np.log(vocab_size - kept_N))
    return float(np.concatenate(found).mean())


def coverage(records: Sequence[Record]) -> float:
    return float(np.concatenate([1 - np.exp(record.log_tail_N.astype(np.float64)) for record in records]).mean())


def rates(
    ours: Mapping[str, Callable[[], object]], theirs: Mapping[str, Callable[[], object]], positions: int
) -> dict[str, tuple[float, float]]:
    """Tokens a second of CPU time, ours and theirs by name, medians of interleaved runs."""
    works = [(name, side, work) for side, part in enumerate((ours, theirs)) for name, work in part.items()]
    times: dict[tuple[str, int], list[float]] = {(name, side): [] for name, side, _ in works}
    for _ in range(REPEATS):
        for name, side, work in works:
            start = time.process_time()
            work()
            times[name, side].append(time.process_time() - start)
    speed = {key: positions / float(np.median(found)) for key, found in times.items()}
    return {name: (speed[name, 0], speed[name, 1]) for name in ours}
