"""What others dumped of a teacher as shards: the k most probable ids, of a tail that nobody summed up.

A folder with DistillKit's Parquet and compression_config.yaml (`distillkit`): its samples are split as a corpus is, one
in about fifty for validation, by their prompts. Or a file of vLLM's `prompt_logprobs`, one JSON object a line, as
docs/teacher_cache.md says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.assembly import Progress, Unit, make_set
from shards.contract import MAX_KEPT, Contract, Selection
from shards.durable import file_sha256
from shards.errors import InvalidRecord
from shards.learnt import EXAMPLES, tables_budget, with_tables
from shards.manifest import Manifest
from shards.planes.codec import Planes3
from shards.record import Record
from shards.storage import Location, storage_at
from shards.units import unit_name
from shards.validation import require_valid
from shards.writer import build_shard
from stages.corpus.store import SPLITS
from stages.corpus.tokenizer import ChatTokenizer
from stages.errors import StageError
from stages.teacher_cache.distillkit import COLUMNS, CONFIG_FILE, Row, read_layout, read_row
from stages.teacher_cache.teacher import head_tensor, read_facts, teacher_files, weights_fingerprint

RECORDS_PER_SHARD = 512
ENGINE, DISTILLKIT_ENGINE = "vllm prompt_logprobs dump", "distillkit parquet"
_ONE_IN = 50
_ROWS = 64
"""Of Parquet, in memory at once."""
_NO_SAMPLE = (ValueError, KeyError, TypeError, OverflowError, InvalidRecord)
"""What reading something else as a sample raises."""


def import_dump(
    dump: Path,
    target: Location,
    *,
    teacher: str,
    teacher_folder: Path,
    k: int,
    pca_width: int,
    thinking: bool,
    progress: Progress | None = None,
) -> Manifest:
    """Make a shard set of a dump; stopped and called again, it goes on. `progress` is told bytes of the dump.

    `teacher_folder` holds the model that was dumped: it gives the set its tokenizer, vocabulary and head. Raises
    StageError naming the line or row that is none, ContractMismatch where `target` holds another set.
    """
    facts, tokenizer = read_facts(teacher_folder), ChatTokenizer.load(teacher_folder, thinking=thinking)
    if k > (most := min(MAX_KEPT, facts.vocab_size)):
        raise StageError(f"a set of this teacher has up to {most} ids a position, not {k}", hint=f"--k {most} or fewer")
    files = parquet_files(dump) if dump.is_dir() else [dump]
    contract = Contract(
        codec=Planes3.name,
        teacher=teacher,
        teacher_fingerprint=weights_fingerprint(teacher_folder),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=facts.vocab_size,
        start_token_id=tokenizer.start_token_id,
        end_token_id=tokenizer.end_token_id,
        selection=Selection(kind="topk", k=k, tail_known=False),
        attention=None,
        corpus_fingerprint=_content(dump, files),
        engine=DISTILLKIT_ENGINE if dump.is_dir() else ENGINE,
        dtype="unknown",
    )
    storage = storage_at(target)
    read = read_parquet if dump.is_dir() else read_dump
    head_tensor(teacher_folder)  # or a day's import would end for the lack of it
    first = [record for _, record, _ in islice(read(dump, contract), RECORDS_PER_SHARD)]
    budget = tables_budget(sum(record.positions for record in first))
    contract, tables = with_tables(storage, contract, lambda: first[:EXAMPLES], budget=budget)
    return make_set(
        storage,
        contract,
        (
            Unit(name=name, size=size, make=partial(build_shard, name, split, contract, records, tables=tables))
            for name, split, records, size in _units(read(dump, contract))
        ),
        lambda: teacher_files(teacher_folder, storage, pca_width=pca_width, thinking=thinking),
        total=sum(path.stat().st_size for path in files),
        progress=progress,
    )


def read_dump(dump: Path, contract: Contract) -> Iterator[tuple[str, Record, int]]:
    """Split, record, and how many bytes are read by then, of each line. Raises StageError naming the line."""
    done, seen = 0, dict[str, int]()
    with dump.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            done += len(line)
            if not line.strip():
                continue
            try:
                found: dict[str, Any] = json.loads(line)
                split, record = found.get("split", "train"), _record(found, number, contract.selection.k)
                if split not in SPLITS:
                    raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
                require_valid(record, contract)
                if (first := seen.setdefault(record.sample_id, number)) != number:
                    raise ValueError(f"its sample {record.sample_id!r} is that of line {first} already")
            except (*_NO_SAMPLE, AttributeError, RecursionError) as error:
                raise StageError(
                    f"{dump}, line {number}: {error}",
                    hint="each line must be what vLLM says of one sample, with at least --k ids a position",
                ) from error
            yield split, record, done
    if not seen:
        raise StageError(f"{dump} is empty", hint="dump prompt_logprobs first, one JSON object a line")


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet of a folder, be it in folders of it, by name. Raises StageError where there is none."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise StageError(f"no .parquet in {folder}", hint="name the folder that DistillKit wrote, or a JSONL dump")
    return files


def read_parquet(folder: Path, contract: Contract) -> Iterator[tuple[str, Record, int]]:
    """As `read_dump`, of what DistillKit wrote. Raises StageError naming the file and the row."""
    layout, k, done, rows = read_layout(folder), contract.selection.k, 0, 0
    if layout.k < k:
        raise StageError(f"{folder} holds {layout.k} ids a position, not {k}", hint=f"--k {layout.k} or fewer")
    for path in parquet_files(folder):
        number, size = 0, path.stat().st_size
        try:
            file = pq.ParquetFile(path)
            named = [name for name in (*COLUMNS, "labels", "attention_mask") if name in file.schema_arrow.names]
            if missing := set(COLUMNS) - set(named):
                raise ValueError(f"there is no column {min(missing)}: an older layout of DistillKit is not read")
            for batch in file.iter_batches(_ROWS, columns=named):
                for found in batch.to_pylist():
                    row = read_row(found, layout, pad_id=contract.start_token_id)
                    record = _compressed(row, f"{path.relative_to(folder).with_suffix('').as_posix()}-{number}", k)
                    require_valid(record, contract)
                    number += 1
                    yield _split_of(record), record, done + size * number // file.metadata.num_rows
        except (*_NO_SAMPLE, OSError, pa.ArrowException) as error:
            raise StageError(
                f"{path}, row {number}: {error}",
                hint=f"each row must be one sample, compressed as {CONFIG_FILE} says, with ids of this teacher",
            ) from error
        done, rows = done + size, rows + number
    if not rows:
        raise StageError(f"the .parquet of {folder} holds no row", hint="let DistillKit sample the teacher first")


def _compressed(row: Row, name: str, k: int) -> Record:
    unknown_N = np.full(len(row.ids_NK), np.nan, np.float32)
    return Record(
        sample_id=name,
        prompt_ids_P=row.prompt_ids_P,
        response_ids_R=row.response_ids_R,
        first_position=0,
        ids_NK=np.ascontiguousarray(row.ids_NK[:, :k]),
        logprobs_NK=np.ascontiguousarray(row.logprobs_NK[:, :k]),
        log_tail_N=unknown_N,
        entropy_N=unknown_N,
    )


def _split_of(record: Record) -> str:
    """The same for the same prompt, whatever stands around it, so that no validation prompt is trained on.

    One token is no prompt: it is where a text begins that has none.
    """
    prompt, response = record.prompt_ids_P.tobytes(), record.response_ids_R.tobytes()
    digest = hashlib.sha256(prompt if len(record.prompt_ids_P) > 1 else prompt + response).digest()
    return "dev" if int.from_bytes(digest[:8], "big") % _ONE_IN == 0 else "train"


def _content(dump: Path, files: Sequence[Path]) -> str:
    """sha256 of a dump: of a folder's, over its files' and how they are compressed."""
    if not dump.is_dir():
        return file_sha256(dump)
    said = "".join(f"{file_sha256(path)}\n" for path in (dump / CONFIG_FILE, *files) if path.is_file())
    return hashlib.sha256(said.encode()).hexdigest()


def _record(found: Mapping[str, Any], number: int, k: int) -> Record:
    tokens, dumped = found["prompt_token_ids"], found["prompt_logprobs"]
    prompt = found.get("prompt_length", 1)
    if type(prompt) is not int or not 1 <= prompt < len(tokens) or len(dumped) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(dumped)} positions, a prompt of {prompt!r}")
    rows = [_most_probable(dumped[position], position, k) for position in range(prompt, len(tokens))]
    unknown_N = np.full(len(rows), np.nan, np.float32)
    return Record(
        sample_id=f"line-{number}" if found.get("id") is None else str(found["id"]),
        prompt_ids_P=np.array(tokens[:prompt], np.int32),
        response_ids_R=np.array(tokens[prompt:], np.int32),
        first_position=0,
        ids_NK=np.array([[id_ for id_, _ in row] for row in rows], np.int32),
        logprobs_NK=np.array([[logprob for _, logprob in row] for row in rows], np.float32),
        log_tail_N=unknown_N,
        entropy_N=unknown_N,
    )


def _most_probable(said: Mapping[str, Any] | None, position: int, k: int) -> list[tuple[int, float]]:
    pairs = [(int(id_), float(at["logprob"] if isinstance(at, dict) else at)) for id_, at in (said or {}).items()]
    if len(pairs) < k:
        raise ValueError(f"position {position} has {len(pairs)} ids, not {k}")
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]


def _units(records: Iterator[tuple[str, Record, int]]) -> Iterator[tuple[str, str, list[Record], int]]:
    """Name, split and records of every shard, each full but the last of its split, and the bytes read for it."""
    waiting: dict[str, list[Record]] = {split: [] for split in SPLITS}
    written, done, told = dict.fromkeys(SPLITS, 0), 0, 0
    for split, record, done in records:
        waiting[split].append(record)
        if len(waiting[split]) == RECORDS_PER_SHARD:
            yield unit_name(split, written[split]), split, waiting[split], done - told
            waiting[split], written[split], told = [], written[split] + 1, done
    for split, rest in waiting.items():
        if rest:
            yield unit_name(split, written[split]), split, rest, done - told
            told = done
