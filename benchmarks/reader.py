"""Sets of up to ten million response tokens: opened, and read in a shuffled order with flat memory.

Prints a table and writes results/reader.json. The sets are synthetic: one real shard of seeded top-64 distributions
over 151,936 ids, repeated under other sample ids; ten million tokens are 1.4 GB on disk. Opening is timed in a process
of its own, imports not counted; the file pages may be in memory. Reading is one thread; both orders and both libraries
take turns, and the figures are medians. Memory is the resident set of the process that reads, mapped pages included.

    python -m benchmarks.reader [--quick]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

import benchmarks.record as results
from benchmarks.synthetic_records import K, synthetic_contract, synthetic_record
from shards.export import export_parquet
from shards.framing import write_frame
from shards.learnt import tables_budget
from shards.manifest import begin, seal
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import fingerprint
from shards.reader import ShardSet, Split
from shards.schema import fixed_parts
from shards.shard import ShardReader
from shards.storage import LocalStorage
from shards.units import ShardInfo, publish_unit
from shards.writer import build_shard

RECORDS, TOKENS, PROMPT, VOCABULARY = 100, 1_000, 100, 151_936
SHARDS, QUICK_SHARDS = (10, 30, 100), (10,)
"""Of the sets that are measured."""
EXPORTED = 10
"""Shards of the set that `datasets` reads."""
ROUNDS, SAMPLE = 5, 150
OPEN_SECONDS = 1.0
CONTRACT = synthetic_contract(VOCABULARY)


def make_set(folder: Path, shards: int) -> Path:
    """Build one shard and repeat it under other names and sample ids."""
    rng = np.random.default_rng(0)
    records = [
        synthetic_record(rng, VOCABULARY, sample_id=f"{row:012d}", prompt=PROMPT, response=TOKENS)
        for row in range(RECORDS)
    ]
    tables = learn_tables(records, CONTRACT, budget=tables_budget(RECORDS * TOKENS))
    contract = replace(CONTRACT, tables=fingerprint(tables))
    data = build_shard("train-00000", "train", contract, records, tables=tables)
    storage = LocalStorage(folder)
    begin(storage, contract)
    infos: list[ShardInfo] = []
    with ShardReader.of(data, called="the one") as shard:
        at = shard.batch.schema.get_field_index("sample_id")
        for number in range(shards):
            ids = pa.array([f"{number * RECORDS + row:012d}" for row in range(RECORDS)])
            unit = f"train-{number:05d}"
            metadata = {**shard.batch.schema.metadata, b"unit": unit.encode()}
            batch = shard.batch.set_column(at, shard.batch.schema.field(at), ids).replace_schema_metadata(metadata)
            infos.append(publish_unit(storage, unit, write_frame(batch, fixed_parts(batch)), contract))
    seal(storage, contract, infos)
    return folder


def in_child(verb: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.reader", verb, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def open_set(folder: Path) -> dict[str, float]:
    """Seconds until every length is known: through the columns of the set, and shard by shard."""
    begun = time.perf_counter()
    shards = ShardSet(folder)
    tokens = int(shards.split("train").response_lengths.sum())
    whole = time.perf_counter() - begun
    begun = time.perf_counter()
    one_by_one = 0
    for info in shards.manifest.shards:
        with ShardReader.open(folder / info.name) as shard:
            one_by_one += int(shard.numbers("response_length").sum())
    assert tokens == one_by_one
    return {"columns": whole, "shards": time.perf_counter() - begun, "tokens": tokens}


def read_shuffled(folder: Path) -> dict[str, float]:
    """Every record once in a shuffled order: the resident set before, and its peak, in MiB."""
    split = ShardSet(folder).split("train")
    order = np.random.default_rng(1).permutation(len(split))
    before = peak = resident()
    for index in order.tolist():
        assert split[index].positions == TOKENS
        peak = max(peak, resident())
    return {"before": before, "peak": peak}


def resident() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def rate(split: Split, order: list[int]) -> float:
    begun = time.perf_counter()
    for index in order:
        assert split[index].ids_NK.shape == (TOKENS, K)
    return len(order) * TOKENS / (time.perf_counter() - begun)


def datasets_rate(rows: object, order: list[int]) -> float:
    """The same numbers as arrays out of `datasets`, which keeps them decoded on disk."""
    begun = time.perf_counter()
    for index in order:
        row = rows[index]  # type: ignore[index]
        assert row["ids"].shape == row["logprobs"].shape == (TOKENS, K)
    return len(order) * TOKENS / (time.perf_counter() - begun)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.arrow"))


def case_of(folder: Path) -> str:
    return f"{len(ShardSet(folder).split('train')) * TOKENS / 1e6:.0f}M tokens, {size_of(folder) / 1e9:.2f} GB"


def memory_rows(folders: Sequence[Path]) -> Iterator[results.Row]:
    """Sets by rising size. Of the largest two both are larger than what is kept mapped: memory must not grow."""
    read = [in_child("read", folder) for folder in folders]
    metric, last = "peak memory, shuffled", len(folders) - 1
    for place, (folder, figures) in enumerate(zip(folders, read, strict=True)):
        case, peak = case_of(folder), figures["peak"]
        if place:
            bound = 0.9 if place == last else None
            yield results.compare(
                case, metric, "MiB", peak, read[place - 1]["peak"], "the next smaller set", bound=bound
            )
        yield results.compare(case, metric, "MiB", peak, size_of(folder) / 2**20, "the set")
        yield results.compare(case, metric, "MiB", peak, figures["before"], "before reading")


def measure(folder: Path, theirs: object) -> Iterator[results.Row]:
    """One set, memory aside; `theirs` are the rows of `datasets`."""
    split = ShardSet(folder).split("train")
    case = case_of(folder)
    largest = len(split) * TOKENS >= 10e6
    opened = [in_child("open", folder) for _ in range(ROUNDS)]
    median = statistics.median(figures["columns"] for figures in opened)
    yield results.compare(case, "open", "s", median, OPEN_SECONDS, "the promise", bound=1.0 if largest else None)
    by_shard = statistics.median(figures["shards"] for figures in opened)
    yield results.compare(case, "open", "s", median, by_shard, "opening every shard")

    rates: dict[str, list[float]] = {"ours": [], "in order": [], "datasets, decoded on disk": []}
    for turn in range(ROUNDS):
        rng = np.random.default_rng(turn)
        rates["ours"].append(rate(split, rng.choice(len(split), SAMPLE, replace=False).tolist()))
        rates["in order"].append(rate(split, list(range(turn * SAMPLE, (turn + 1) * SAMPLE))))
        order = rng.choice(EXPORTED * RECORDS, SAMPLE, replace=False).tolist()
        rates["datasets, decoded on disk"].append(datasets_rate(theirs, order))
    ours, *others = ((name, statistics.median(found)) for name, found in rates.items())
    for name, other in others:
        yield results.compare(case, "decode, shuffled", "tokens/s", ours[1], other, name, more_is_better=True)


def main() -> None:
    import datasets

    quick: bool = results.parser(__doc__).parse_args().quick
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as place:
        export_parquet(make_set(Path(place) / "exported", EXPORTED), Path(place) / "parquet")
        theirs = datasets.load_dataset(f"{place}/parquet", split="train", cache_dir=f"{place}/datasets")
        theirs = theirs.select_columns(["ids", "logprobs"]).with_format("numpy")
        folders = [make_set(Path(place) / str(shards), shards) for shards in (QUICK_SHARDS if quick else SHARDS)]
        for folder in folders:
            rows += measure(folder, theirs)
        rows += memory_rows(folders)
    results.write(
        "reader",
        rows,
        clock="wall, medians of interleaved rounds",
        packages=("numpy", "pyarrow", "zstandard", "datasets"),
        threads=1,
        quick=quick,
    )


if __name__ == "__main__":
    if sys.argv[1:2] in (["open"], ["read"]):
        print(json.dumps({"open": open_set, "read": read_shuffled}[sys.argv[1]](Path(sys.argv[2]))))
    else:
        main()
