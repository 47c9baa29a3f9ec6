"""The codec of the shards beside what others store: bytes a token, KL, and how fast they are written and read.

Real distributions: SmolLM2-135M-Instruct (V = 49,152) over English text, `benchmarks/teacher_logits.py`; tables are
learnt from passages that the test has none of, and counted as they weigh in a shard of 250,000 positions.

Records are made in `codec_records.py`; what others store is in `peer_layouts.py`.

    python -m benchmarks.codec [--quick]
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.codec_measure import Measured, bucket_kl, coverage, full_kl, measure, rates
from benchmarks.codec_records import (
    VOCAB,
    WIDE_VOCAB,
    adaptive,
    contract_of,
    sampled,
    synthetic,
    topk,
    with_attention,
    with_curve,
)
from benchmarks.peer_layouts import (
    PACKED,
    CompiledLayout,
    DistillKitLayout,
    K,
    distillkit_records,
    packed_bytes,
    plain_bytes,
)
from benchmarks.record import Row, compare, parser, write
from benchmarks.teacher_logits import LAYERS, NODES, TOP_M, Passage, passages
from shards.contract import AttentionSpec, Contract, Selection
from shards.record import Record
from shards.topk_planes import TopkPlanes1

TEST, TAUGHT = 4_000, 36_000
QUICK_TEST, QUICK_TAUGHT = 500, 3_000
GROWTH, QUICK_GROWTH = (8, 16, 32, 128), (16,)
"""Ids a position over which the cost is followed."""
LEAST_COVERAGE = 0.89


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
    yield from speed_rows(given, case)
    for kind, size in ours.by_kind.items():
        print(f"    {kind:12} {size:7.3f} B at order 0")


def speed_rows(given: Material, case: str) -> Iterator[Row]:
    """Beside DistillKit's layout in its own way of coding it and in compiled loops; and our entropy coder alone."""
    plain, layout = given.plain, DistillKitLayout(VOCAB)
    ours = {"encode": given.ours.encode, "decode": given.ours.decode}
    tensors = [(torch.tensor(record.ids_NK), torch.tensor(record.logprobs_NK)) for record in plain]
    packed = [layout.encode(*pair) for pair in tensors]
    as_theirs: dict[str, Callable[[], object]] = {
        "encode": lambda: [layout.encode(*pair) for pair in tensors],
        "decode": lambda: [layout.decode(*parts) for parts in packed],
    }
    loops = CompiledLayout(layout)
    arrays = [(record.ids_NK, record.logprobs_NK) for record in plain]
    compact = [loops.encode(*pair) for pair in arrays]
    compiled: dict[str, Callable[[], object]] = {
        "encode": lambda: [loops.encode(*pair) for pair in arrays],
        "decode": lambda: [loops.decode(*parts) for parts in compact],
    }
    positions = sum(record.positions for record in plain)
    for name, works, bounds in (
        ("DistillKit's layout", as_theirs, {"encode": 2.3, "decode": 4.8}),
        ("the same, compiled", compiled, {}),
        ("our entropy coder alone", given.ours.coder, {}),
    ):
        for what, (mine, other) in rates(ours, works, positions).items():
            yield compare(case, what, "tokens/s", mine, other, name, bound=bounds.get(what), more_is_better=True)


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
    size = sum(curved.by_kind[kind] for kind in ("values", "slopes"))
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
