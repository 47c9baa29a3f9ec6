"""The codec of the shards beside what others store: bytes a token, KL, and how fast they are written and read.

Real distributions: SmolLM2-135M-Instruct (V = 49,152) over English text, `benchmarks/teacher_logits.py`; tables are
learnt from passages that the test has none of, and counted as they weigh in a shard of 250,000 positions. Synthetic
ones (V = 151,936) have the rank curves, tails and entropies of real positions, and ids from a seeded noisy Zipf law,
whose noise is such that the 1,024 most frequent ids have their real share.

What others store is in `peer_layouts.py`.

    python -m benchmarks.codec [--quick]
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peer_layouts import (
    PACKED,
    DistillKitLayout,
    K,
    distillkit_records,
    packed_bytes,
    plain_bytes,
)
from benchmarks.record import Row, compare, parser, write
from benchmarks.teacher_logits import LAYERS, NODES, TOP_M, Passage, passages
from shards.codec import codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.planes.calibration import learn_tables
from shards.planes.numbers import to_symbols
from shards.planes.tables import fingerprint
from shards.record import AttentionSummary, Record
from shards.topk_planes import TopkPlanes1

VOCAB, WIDE_VOCAB = 49_152, 151_936
TEST, TAUGHT = 4_000, 36_000
QUICK_TEST, QUICK_TAUGHT = 500, 3_000
GROWTH, QUICK_GROWTH = (8, 16, 32, 128), (16,)
"""Ids a position over which the cost is followed."""
SHARD_POSITIONS = 250_000
BUDGET = 1 << 17
REPEATS = 5
LEAST_COVERAGE = 0.89
FREQUENT = 1_024

Float64 = NDArray[np.float64]


def contract_of(selection: Selection, vocab_size: int = VOCAB, **fields: object) -> Contract:
    text = ("teacher", "teacher_fingerprint", "tokenizer_fingerprint", "corpus_fingerprint", "engine", "dtype")
    given = dict.fromkeys(text, "") | {"codec": "planes/3", "start_token_id": 0, "end_token_id": 0, "attention": None}
    return Contract(selection=selection, vocab_size=vocab_size, **(given | fields))  # type: ignore[arg-type]


def record_of(passage: Passage, kept_NC: NDArray[np.bool_], **fields: object) -> Record:
    """A record with the first ids of each position; the others are its tail."""
    width = int(kept_NC.sum(axis=1).max())
    logs_NC = passage.logprobs_NC.astype(np.float64)
    left_NC = np.where(kept_NC, -np.inf, logs_NC)
    log_tail_N = np.logaddexp(np.logaddexp.reduce(left_NC, axis=1), passage.log_rest_N)
    return Record(
        sample_id="",
        prompt_ids_P=passage.prompt_ids_P,
        response_ids_R=passage.response_ids_R,
        first_position=0,
        ids_NK=np.where(kept_NC, passage.ids_NC, -1)[:, :width],
        logprobs_NK=np.where(kept_NC, passage.logprobs_NC, np.float32(-np.inf))[:, :width],
        log_tail_N=log_tail_N.astype(np.float32),
        entropy_N=passage.entropy_N,
        **fields,  # type: ignore[arg-type]
    )


def topk(passage: Passage, k: int = K) -> Record:
    return record_of(passage, _first(passage, k))


def with_curve(passage: Passage) -> Record:
    logs_NC = np.where(_first(passage, K), -np.inf, passage.logprobs_NC.astype(np.float64))
    values, slopes = [], []
    for node, (b, rest_N) in enumerate(zip(NODES, passage.rest_curve_NJ.T[: len(NODES)], strict=True)):
        value_N = np.logaddexp(np.logaddexp.reduce(b * logs_NC, axis=1), rest_N)
        shares_NC = np.exp(b * logs_NC - value_N[:, None])
        slope_N = (shares_NC * np.maximum(logs_NC, -1e4)).sum(axis=1)
        slopes.append(slope_N + np.exp(rest_N - value_N) * passage.rest_curve_NJ[:, len(NODES) + node])
        values.append(value_N)
    return dataclasses.replace(topk(passage), curve_NJ=np.stack([*values, *slopes], axis=1).astype(np.float32))


def with_attention(passage: Passage) -> Record:
    sink_LN, prompt_LN, entropy_LN = passage.attention_scalars_3LN
    attention = AttentionSummary(
        positions_LNM=passage.attention_positions_LNM,
        weights_LNM=passage.attention_weights_LNM,
        sink_LN=sink_LN,
        prompt_LN=prompt_LN,
        entropy_LN=entropy_LN,
    )
    return dataclasses.replace(topk(passage), attention=attention)


def adaptive(selection: Selection) -> Callable[[Passage], Record]:
    def record(passage: Passage) -> Record:
        probs_NC = np.exp(passage.logprobs_NC.astype(np.float64))
        kept_NC = (probs_NC.cumsum(axis=1) - probs_NC < selection.mass) & (probs_NC >= selection.floor)
        kept_NC[:, 0] = True
        return record_of(passage, kept_NC & _first(passage, selection.k))

    return record


def sampled(draws: int) -> Callable[[Passage], Record]:
    def record(passage: Passage) -> Record:
        ids_NK, counts_NK = np.full((2, len(passage.draws_ND), draws), (-1,), np.int32)
        counts_NK[:] = 0
        for row, drawn in enumerate(passage.draws_ND[:, :draws]):
            ids, counts = np.unique(drawn, return_counts=True)
            order = np.lexsort((ids, -counts))
            ids_NK[row, : len(ids)], counts_NK[row, : len(ids)] = ids[order], counts[order]
        bare = record_of(passage, _first(passage, 1))
        none_N = np.zeros(len(ids_NK), np.float32)
        return dataclasses.replace(bare, ids_NK=ids_NK, logprobs_NK=None, draws_NK=counts_NK, log_tail_N=none_N)

    return record


def _first(passage: Passage, k: int) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(passage.ids_NC.shape[1]) < k, passage.ids_NC.shape).copy()


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

    def decode() -> list[Record]:
        signals = [
            codec.decode_signal(cell, positions=record.positions, entries=count)
            for cell, record, count in zip(cells, test, kept, strict=True)
        ]
        names = [field.name for field in dataclasses.fields(signals[0])]
        return [
            dataclasses.replace(record, **{name: getattr(signal, name) for name in names})
            for record, signal in zip(test, signals, strict=True)
        ]

    positions = sum(record.positions for record in test)
    attention = sum(len(codec.encode_attention(record)) for record in test) if contract.attention else 0
    by_kind = _order_0(codec, test) if data else {}
    return Measured(
        signal=sum(map(len, cells)) / positions,
        tables=len(data or b"") / SHARD_POSITIONS,
        attention=attention / positions,
        bound=sum(by_kind.values()) / positions,
        by_kind={kind: size / positions for kind, size in by_kind.items()},
        decoded=decode(),
        encode=lambda: codec.encode_signals(test),
        decode=decode,
    )


def _order_0(codec: object, records: Sequence[Record]) -> dict[str, float]:
    """Bytes of each kind of stream at the order-0 entropy of its symbols, side bytes included."""
    counts: dict[str, NDArray[np.int64]] = {}
    sides: dict[str, int] = {}
    for record in records:
        for kind, numbers in codec.signal_streams(record):  # type: ignore[attr-defined]
            symbols, side = to_symbols(numbers)
            counts[kind] = counts.get(kind, 0) + np.bincount(symbols, minlength=256)
            sides[kind] = sides.get(kind, 0) + len(side)
    return {kind: _entropy(found) * found.sum() / 8 + sides[kind] for kind, found in counts.items() if found.any()}


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


def rates(measured: Measured, test: Sequence[Record], layout: DistillKitLayout) -> dict[str, tuple[float, float]]:
    """Tokens a second of CPU time, ours and the layout's, medians of interleaved runs on one thread."""
    tensors = [(torch.tensor(record.ids_NK), torch.tensor(record.logprobs_NK)) for record in test]
    packed = [layout.encode(*pair) for pair in tensors]
    works: dict[str, Callable[[], object]] = {
        "encode": measured.encode,
        "decode": measured.decode,
        "their encode": lambda: [layout.encode(*pair) for pair in tensors],
        "their decode": lambda: [layout.decode(*parts) for parts in packed],
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    positions = sum(record.positions for record in test)
    speed = {name: positions / float(np.median(found)) for name, found in times.items()}
    return {name: (speed[name], speed[f"their {name}"]) for name in ("encode", "decode")}


def synthetic(real: Sequence[Record], taught: Sequence[Record]) -> list[Record]:
    """Records of V = 151,936: real values, ids of the largest scores under a noisy Zipf law."""
    rng = np.random.default_rng(0)
    kept = np.concatenate([record.ids_NK.ravel() for record in taught])
    share = np.sort(np.bincount(kept))[-FREQUENT:].sum() / kept.size
    law_V = -np.log(np.arange(WIDE_VOCAB, dtype=np.float32) + 2.7)
    shuffled = rng.permutation(WIDE_VOCAB).astype(np.int32)

    def draw(count: int, noise: float) -> NDArray[np.int32]:
        scores = law_V + np.float32(noise) * rng.standard_normal((count, WIDE_VOCAB), dtype=np.float32)
        top = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1)
        return np.take_along_axis(top, order, 1).astype(np.int32)

    low, high = 0.1, 6.0
    for _ in range(8):
        noise = (low + high) / 2
        low, high = (noise, high) if (draw(60, noise) < FREQUENT).mean() > share else (low, noise)
    found = []
    for record in real:
        ranks_NK = np.concatenate([draw(min(64, record.positions - at), low) for at in range(0, record.positions, 64)])
        found.append(dataclasses.replace(record, ids_NK=shuffled[ranks_NK]))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """Passages to test and to learn from, and what became of them at top-64."""

    test: Sequence[Passage]
    taught: Sequence[Passage]
    plain: Sequence[Record]
    learn: Sequence[Record]
    contract: Contract
    ours: Measured


def material(test: int, taught: int) -> Material:
    everything = list(passages("running", test + taught))
    ends = list(itertools.accumulate(len(passage.response_ids_R) for passage in everything))
    cut = next(index for index, end in enumerate(ends) if end >= test) + 1
    print(f"{ends[cut - 1]} positions, tables learnt from {ends[-1] - ends[cut - 1]} others")
    plain, learn = ([topk(passage) for passage in part] for part in (everything[:cut], everything[cut:]))
    contract = contract_of(Selection(kind="topk", k=K))
    return Material(
        test=everything[:cut],
        taught=everything[cut:],
        plain=plain,
        learn=learn,
        contract=contract,
        ours=measure(contract, plain, learn),
    )


def top64_rows(given: Material) -> Iterator[Row]:
    """Beside every other layout, real distributions."""
    plain, ours, layout, case = given.plain, given.ours, DistillKitLayout(VOCAB), "top-64, V = 49,152"
    old = measure(dataclasses.replace(given.contract, codec=TopkPlanes1.name), plain, ())
    theirs = distillkit_records(plain, layout)
    kl = bucket_kl(plain, ours.decoded)
    yield compare(case, "bytes a token", "B", ours.total, layout.bytes(), "DistillKit", bound=184 / 92)
    yield compare(case, "signal alone", "B", ours.signal, ours.bound, "order-0 bound of its streams")
    yield compare(case, "codec KL", "nats", kl, 1.6e-4, "what may be", bound=1)
    yield compare(case, "codec KL", "nats", kl, bucket_kl(plain, theirs), "DistillKit")
    yield compare(case, "bytes a token", "B", ours.total, old.signal, "topk-planes/1")
    yield compare(case, "codec KL", "nats", kl, bucket_kl(plain, old.decoded), "topk-planes/1")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in plain_bytes(plain, Path(folder)).items():
            yield compare(case, "bytes a token", "B", ours.total, size, name)
    yield compare(case, "bytes a token", "B", ours.total, packed_bytes(K, VOCAB), PACKED)
    for name, (mine, other) in rates(ours, plain, layout).items():
        bound = {"encode": 2.3, "decode": 4.8}[name]
        yield compare(case, name, "tokens/s", mine, other, "DistillKit's layout", bound=bound, more_is_better=True)
    for kind, size in ours.by_kind.items():
        print(f"    {kind:12} {size:7.3f} B at order 0")


def growth_rows(given: Material, ks: Sequence[int]) -> Iterator[Row]:
    """Other numbers of ids than 64, which has rows of its own."""
    for k in ks:
        made = measure(
            contract_of(Selection(kind="topk", k=k)),
            [topk(passage, k) for passage in given.test],
            [topk(passage, k) for passage in given.taught],
        )
        yield compare(f"top-{k}, V = 49,152", "bytes a token", "B", made.total, packed_bytes(k, VOCAB), PACKED)


def wide_rows(given: Material) -> Iterator[Row]:
    layout, few = DistillKitLayout(WIDE_VOCAB), given.learn[:: max(1, len(given.learn) // 40)]
    both = synthetic([*given.plain[:8], *few], given.learn)
    wide, taught = both[:8], both[8:]
    ours, case = measure(contract_of(Selection(kind="topk", k=K), WIDE_VOCAB), wide, taught), "top-64, V = 151,936"
    yield compare(case, "bytes a token", "B", ours.total, layout.bytes(), "DistillKit", bound=200 / 105)
    yield compare(case, "signal alone", "B", ours.signal, ours.bound, "order-0 bound of its streams")
    yield compare(case, "codec KL", "nats", bucket_kl(wide, ours.decoded), 1.6e-4, "what may be", bound=1)


def added_rows(given: Material) -> Iterator[Row]:
    """What the partition curve and the attention summary add."""
    curved = measure(
        dataclasses.replace(given.contract, curve=NODES),
        [with_curve(passage) for passage in given.test],
        [with_curve(passage) for passage in given.taught[::4]],
    )
    size = sum(curved.by_kind[kind] for kind in ("values0", "values1", "slopes0", "slopes1"))
    yield compare("partition curve", "bytes a token", "B", size, 8.0, "what may be", bound=1)
    attended = measure(
        dataclasses.replace(given.contract, attention=AttentionSpec(layers=LAYERS, top_m=TOP_M)),
        [with_attention(passage) for passage in given.test],
        [with_attention(passage) for passage in given.taught[::4]],
    )
    yield compare("attention, 3 layers", "bytes a token", "B", attended.attention, 30.0, "what may be", bound=1)


def adaptive_rows(given: Material) -> Iterator[Row]:
    plain, ours, promised = given.plain, given.ours, False
    for floor in (5e-3, 2.5e-3, 1.55e-3, 1e-3):
        selection = Selection(kind="adaptive", k=128, mass=1.0, floor=floor)
        found = [adaptive(selection)(passage) for passage in given.test]
        made = measure(contract_of(selection), found, [adaptive(selection)(passage) for passage in given.taught[::3]])
        case = f"adaptive, floor {floor:g}"
        covered = coverage(found)
        yield compare(case, "coverage", "", covered, coverage(plain), "top-64", more_is_better=True)
        bound = 1.0 if covered >= LEAST_COVERAGE and not promised else None
        promised |= covered >= LEAST_COVERAGE
        yield compare(case, "bytes a token", "B", made.total, 55.0, "what may be at .89", bound=bound)
        yield compare(case, "codec KL", "nats", bucket_kl(found, made.decoded), 1.6e-4, "what may be")
        far = full_kl(found, made.decoded, VOCAB)
        yield compare(case, "KL(full || decoded)", "nats", far, full_kl(plain, ours.decoded, VOCAB), "top-64")


def sample_rows(given: Material) -> Iterator[Row]:
    for draws in (24, 32):
        found = [sampled(draws)(passage) for passage in given.test]
        selection = Selection(kind="sample", draws=draws, logprobs=False)
        made = measure(contract_of(selection), found, [sampled(draws)(passage) for passage in given.taught[::2]])
        unique = float(np.concatenate([(record.ids_NK >= 0).sum(axis=1) for record in found]).mean())
        case = f"sample, {unique:.1f} unique"
        yield compare(case, "bytes a token", "B", made.total, 36.0, "2503.16870, 12 unique", bound=2)
        yield compare(case, "signal alone", "B", made.signal, made.bound, "order-0 bound of its streams")


def main() -> None:
    quick: bool = parser(__doc__).parse_args().quick
    torch.set_num_threads(1)
    given = material(QUICK_TEST, QUICK_TAUGHT) if quick else material(TEST, TAUGHT)
    rows = [*top64_rows(given), *growth_rows(given, QUICK_GROWTH if quick else GROWTH)]
    if not quick:
        rows += [row for part in (wide_rows, added_rows, adaptive_rows, sample_rows) for row in part(given)]
    write(
        "codec",
        rows,
        clock="CPU time of the process, median",
        packages=("numpy", "zstandard", "pyarrow", "torch"),
        threads=1,
        quick=quick,
    )


if __name__ == "__main__":
    main()
