"""Prepared data on disk: one Arrow file a split, and `corpus.json`, whose presence is the commit.

    corpus.json            fingerprints, special ids, the settings and the source it was made from, hashes, the report
    train/samples.arrow    sample_id: string, prompt_ids: list<int32>, response_ids: list<int32>
    dev/samples.arrow      the same
    rejects.jsonl          the lines that the last preparation could not read, with their number and reason

A folder without corpus.json is not a corpus, whatever else it holds. Files are memory-mapped and their sha256 checked
when a corpus is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.durable import file_sha256
from stages.corpus.publish import publish_set
from stages.corpus.sample import Sample
from stages.errors import StageError

VERSION = 1
COMMIT = "corpus.json"
REJECTS = "rejects.jsonl"
SPLITS = ("train", "dev")
_ROWS_PER_BATCH = 1_024
_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))]
)


def samples_file(folder: Path, split: str) -> Path:
    return folder / split / "samples.arrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `write_samples` wrote; `digest` covers ids and order, not the file's framing."""

    rows: int
    prompt_tokens: int
    response_tokens: int
    digest: str


class Samples(Sequence[Sample]):
    """The samples of one file, memory-mapped: a sample's arrays are read-only views of the page cache."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or pyarrow.ArrowInvalid where the file is missing or is no Arrow file of samples."""
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if self._reader.schema != _SCHEMA:
            raise pa.ArrowInvalid(f"{path} holds other columns than a sample has")
        self._batches = [self._reader.get_batch(index) for index in range(self._reader.num_record_batches)]
        for batch in self._batches:
            batch.validate(full=True)
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        batch = self._batches[number]
        row = index - self._ends[number] + batch.num_rows
        return Sample(
            sample_id=batch.column(0)[row].as_py(),
            prompt_ids=batch.column(1)[row].values.to_numpy(),
            response_ids=batch.column(2)[row].values.to_numpy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How conversations became ids."""

    tokenizer_fingerprint: str
    start_token_id: int
    end_token_id: int
    thinking: bool
    """Whether prompts and responses were rendered with the template's thinking form."""


_RENDERING = tuple(item.name for item in dataclasses.fields(Rendering))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus(Rendering):
    """Prepared data, as stage one takes it."""

    train: Sequence[Sample]
    dev: Sequence[Sample]
    fingerprint: str
    """sha256 over every sample of both splits in order, the tokenizer's fingerprint and the special ids."""
    report: Mapping[str, Any]
    """What became of the rows of the source, as `PrepareReport` counts them."""

    @property
    def splits(self) -> Mapping[str, Sequence[Sample]]:
        """Its samples by the names in `SPLITS`, in that order."""
        return dict(zip(SPLITS, (self.train, self.dev), strict=True))


def read_corpus(folder: Path) -> Corpus:
    """Open prepared data. Raises StageError where it is missing, unfinished, damaged or of another version."""
    facts = read_commit(folder)
    if facts is None:
        unfinished = any((folder / split).exists() for split in SPLITS)
        raise StageError(
            f"{folder} holds {'unfinished' if unfinished else 'no'} prepared data: there is no {COMMIT}",
            hint="run make prepare",
        )
    hint = f"delete {folder} and run make prepare"
    if facts["version"] != VERSION:
        raise StageError(f"{folder} is version {facts['version']} of prepared data, not {VERSION}", hint=hint)
    damaged = find_damage(folder, facts)
    if damaged:
        raise StageError(f"{folder}: {damaged}", hint=hint)
    try:
        train, dev = (Samples(samples_file(folder, split)) for split in SPLITS)
    except (OSError, pa.ArrowInvalid) as error:
        raise StageError(f"{folder} cannot be read: {error}", hint=hint) from error
    return Corpus(
        train=train,
        dev=dev,
        fingerprint=facts["fingerprint"],
        report=facts["report"],
        **{name: facts[name] for name in _RENDERING},
    )


def commit_corpus(
    staging: Path,
    out: Path,
    written: Mapping[str, Written],
    *,
    rendering: Rendering,
    inputs: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    """Make the splits that `write_split` wrote into `staging` the corpus in `out`, with all that is told of it.

    `inputs` is what decides the outcome: who finds the same there need not make it again.
    """
    names = [str(samples_file(Path(), split)) for split in SPLITS]
    facts = {
        "version": VERSION,
        "fingerprint": _fingerprint(written, rendering),
        **{name: getattr(rendering, name) for name in _RENDERING},
        "inputs": dict(inputs),
        "files": {name: file_sha256(staging / name) for name in names},
        "report": dict(report),
    }
    write_commit(staging, facts)
    publish_set(staging, out, names, commit=COMMIT)


def _fingerprint(written: Mapping[str, Written], rendering: Rendering) -> str:
    """sha256 over every sample of both splits in order, and what gives their ids a meaning."""
    parts = [written[split].digest for split in SPLITS]
    parts += [rendering.tokenizer_fingerprint, str(rendering.start_token_id), str(rendering.end_token_id)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_commit(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write corpus.json, sealed with the sha256 of what it says."""
    sealed = {**facts, "sha256": _seal(facts)}
    (folder / COMMIT).write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_commit(folder: Path) -> dict[str, Any] | None:
    """What corpus.json says, or None without one. Raises StageError where it is not as it was written."""
    path = folder / COMMIT
    hint = f"delete {path} and run make prepare"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} cannot be read: {error}", hint=hint) from error
    if not isinstance(facts, dict) or facts.pop("sha256", None) != _seal(facts):
        raise StageError(f"{path} is damaged: its content does not give the sha256 it was sealed with", hint=hint)
    return facts


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """The first file that differs from its hash in corpus.json, in words; None where all agree."""
    for name, sha256 in facts["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != sha256:
            return f"{name} is damaged: its sha256 is not the one in {COMMIT}"
    return None


def write_split(folder: Path, split: str, samples: Iterable[Sample]) -> Written:
    """Write one split of a corpus that is made in `folder`."""
    path = samples_file(folder, split)
    path.parent.mkdir()
    return write_samples(path, samples)


def write_samples(path: Path, samples: Iterable[Sample]) -> Written:
    """Write samples in batches, holding one batch at a time."""
    digest = hashlib.sha256()
    rows = prompt_tokens = response_tokens = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in _batched(samples):
            writer.write_batch(
                pa.record_batch(
                    [
                        pa.array([sample.sample_id for sample in batch], type=pa.string()),
                        _lists([sample.prompt_ids for sample in batch]),
                        _lists([sample.response_ids for sample in batch]),
                    ],
                    schema=_SCHEMA,
                )
            )
            for sample in batch:
                lengths = struct.pack("<QQ", len(sample.prompt_ids), len(sample.response_ids))
                digest.update(sample.sample_id.encode() + lengths)
                digest.update(sample.prompt_ids.astype("<i4").tobytes() + sample.response_ids.astype("<i4").tobytes())
                prompt_tokens += len(sample.prompt_ids)
                response_tokens += len(sample.response_ids)
            rows += len(batch)
    return Written(rows=rows, prompt_tokens=prompt_tokens, response_tokens=response_tokens, digest=digest.hexdigest())


def _batched(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, _ROWS_PER_BATCH)):
        yield batch


def _lists(arrays: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
