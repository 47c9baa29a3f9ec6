"""Stage one over a real corpus: 300,000 response tokens and more of English Wikipedia, verified, and its fidelity.

The demo's real teacher reads questions and the passages that answer them (BoolQ), with the tail's curve and the
attention of three layers. Interrupted with Ctrl-C or killed it goes on with the shards that are missing, here under
data/benchmarks/corpus; about 20 minutes on two cores.

    python -m benchmarks.corpus
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.record import Row, compare, write
from benchmarks.teacher_logits import FOLDER, TEACHER, boolq
from pipeline.assets import teacher_folder
from pipeline.sinks import listening
from shards.fidelity import KEPT_MASS
from shards.inspect import Inspection, inspect
from shards.verify import VerifyReport, verify_shards
from stages.corpus.prepare import prepare
from stages.corpus.settings import CorpusSettings
from stages.corpus.store import Corpus, read_corpus
from stages.events import Emit
from stages.teacher_cache.cache import fill_cache
from stages.teacher_cache.settings import CacheSettings, TeacherSettings

HOME = FOLDER / "corpus"
SHARDS = HOME / "shards"
TOKENS = 300_000
CORPUS = CorpusSettings(train_size=2_260, val_size=40, max_prompt_tokens=256, max_response_tokens=256)
TEACHER_SETTINGS = TeacherSettings(model=TEACHER, max_model_len=512)
CACHE = CacheSettings(k=64, curve=(0.5, 0.25), records_per_shard=1_024)
LAYOUT = CACHE.k * (4 + 2)
"""Bytes a position of k ids as int32 and their log-probabilities as float16, and nothing else."""


def rows_of(source: Path, out: Path) -> None:
    """Each passage once, as the answer to the first of its questions."""
    seen = set[str]()
    with out.open("w", encoding="utf-8") as file:
        for row in map(json.loads, source.read_text(encoding="utf-8").splitlines()):
            if row["passage"] not in seen:
                seen.add(row["passage"])
                file.write(json.dumps({"input": f"{row['question']}?", "content": row["passage"]}) + "\n")


def cache(emit: Emit) -> Corpus:
    """Go on with the set until it is sealed."""
    HOME.mkdir(parents=True, exist_ok=True)
    rows, folder = HOME / "rows.jsonl", teacher_folder(TEACHER, None, emit)
    rows_of(boolq(), rows)
    prepare(settings=CORPUS, source=rows, tokenizer_folder=folder, out=HOME / "processed", emit=emit)
    corpus = read_corpus(HOME / "processed")
    fill_cache(corpus=corpus, teacher=TEACHER_SETTINGS, cache=CACHE, teacher_folder=folder, target=SHARDS, emit=emit)
    return corpus


def table(corpus: Corpus, found: Inspection, verdict: VerifyReport) -> Iterator[Row]:
    files, parts = verdict.shards + verdict.teacher_files, found.bytes_per_position
    entropy = found.entropy.median
    yield compare("the set", "response tokens", "", found.positions, TOKENS, "asked for", bound=1, more_is_better=True)
    yield compare(
        "verify", "files intact", "", files - len(verdict.damage), files, "all files", bound=1, more_is_better=True
    )
    samples = len(corpus.train) + len(corpus.dev)
    yield compare("the set", "samples, each once", "", found.records, samples, "corpus", bound=1, more_is_better=True)
    yield compare("kept ids", "mass of a record", "", found.coverage.median, 1.0, "all ids", more_is_better=True)
    yield compare(
        "the set", "bytes of a position", "B", found.bytes / found.positions, LAYOUT, "int32 and float16 alone"
    )
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        if part != "all" and size:
            yield compare(part, "bytes of a position", "B", size, parts["all"], "all parts")
    for name, value in found.fidelity.items():
        what, _, which = name.rpartition(", ")
        if what and what != KEPT_MASS:
            yield compare(what, which, "nats", value, entropy, "median entropy of a record")


def main() -> None:
    with listening() as emit:
        corpus = cache(emit)
    write(
        "corpus",
        list(table(corpus, inspect(SHARDS), verify_shards(SHARDS))),
        clock="none: nothing is timed",
        packages=("torch", "vllm", "transformers"),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
