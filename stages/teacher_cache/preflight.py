"""What a run of stage one will take, and whether that is there: looked at before a teacher is loaded.

Memory is counted from the shapes in config.json, for one of the devices that a copy of the teacher is split over.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open

from shards.contract import AttentionSpec, Selection
from shards.schema import MAX_ENTRIES
from shards.storage import LocalStorage, Location, Storage, storage_at
from shards.units import published_units
from stages.checks import Check
from stages.corpus.fingerprint import tokenizer_fingerprint
from stages.corpus.store import Corpus
from stages.errors import StageError
from stages.teacher_cache.engines.vllm.process import resolve_dtype
from stages.teacher_cache.plan import plan_units
from stages.teacher_cache.settings import CacheSettings, TeacherSettings
from stages.teacher_cache.teacher import head_tensor, read_facts, weight_files

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 1 << 30
_LOGITS_BYTES = 1 << 28
"""A block of logits and what is made of it."""
_ENTRY_BYTES, _POSITION_BYTES, _KEY_BYTES, _ROW_BYTES, _TOKEN_BYTES = 1.6, 8.0, 1.7, 6.0, 4.0
"""What shards take, about: a kept id, a position, an attention key, an attention row, a token of text."""
_DISK_MARGIN = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What the copies of the teacher are given."""

    replicas: int
    memory: int | None
    """Bytes of one device, or of this machine's share for one process; None where it cannot be seen from here."""
    gpus: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """How large a corpus is."""

    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    """Tokens of a sample that the teacher reads: all but its last."""
    longest_response: int = 0
    largest: int = 0
    """Id, those that start and end a response included."""


def require_fits(corpus: Corpus, teacher: TeacherSettings, cache: CacheSettings, teacher_folder: Path) -> None:
    """Refuse at once what would stop a run of days at its last sample. Raises StageError."""
    for check in _fits(corpus, _extent(corpus), teacher, cache, teacher_folder):
        if not check.ok:
            raise StageError(check.fact, hint=_HINTS[check.name])


_HINTS = {
    "tokenizer": "prepare the corpus again with this teacher",
    "vocabulary": "the tokenizer belongs to another model: prepare the corpus with the teacher's own",
    "context": "raise teacher.max_model_len, or lower corpus.max_prompt_tokens or corpus.max_response_tokens",
    "kept ids": "lower cache.k",
    "record": "lower cache.k, cache.attention_top_m or corpus.max_response_tokens",
    "head": "its principal components travel with the shards: take weights whose head or tied embedding is not packed",
}


def preflight(
    *,
    corpus: Corpus,
    teacher: TeacherSettings,
    cache: CacheSettings,
    teacher_folder: Path,
    target: Location,
    devices: Devices,
) -> Iterator[Check]:
    """The plan and its needs, one row each."""
    units = plan_units(corpus.splits, cache.records_per_shard)
    storage = storage_at(target)
    there = published_units(storage)
    published = [unit for unit in units if unit.name in there]
    extent = _extent(corpus)
    yield Check(
        name="plan",
        ok=True,
        fact=f"{len(units)} shards of up to {cache.records_per_shard} records, {len(published)} of them published; "
        f"{extent.prompt_tokens:,} prompt and {extent.response_tokens:,} response tokens",
    )
    yield _work(extent, teacher, teacher_folder, devices)
    for check in _fits(corpus, extent, teacher, cache, teacher_folder):
        yield check if check.ok else replace(check, fact=f"{check.fact}; {_HINTS[check.name]}")
    yield _memory(teacher, teacher_folder, devices)
    yield _room(extent, cache, teacher_folder, storage, missing=1 - len(published) / max(len(units), 1))


def _extent(corpus: Corpus) -> _Extent:
    prompts = responses = longest = longest_response = 0
    largest = max(corpus.start_token_id, corpus.end_token_id)
    for samples in corpus.splits.values():
        for sample in samples:
            prompt, response = len(sample.prompt_ids), len(sample.response_ids)
            prompts, responses, longest = prompts + prompt, responses + response, max(longest, prompt + response - 1)
            longest_response = max(longest_response, response)
            largest = max(largest, int(sample.prompt_ids.max()), int(sample.response_ids.max()))
    return _Extent(
        prompt_tokens=prompts,
        response_tokens=responses,
        longest=longest,
        longest_response=longest_response,
        largest=largest,
    )


def _fits(
    corpus: Corpus, extent: _Extent, teacher: TeacherSettings, cache: CacheSettings, teacher_folder: Path
) -> Iterator[Check]:
    same = tokenizer_fingerprint(teacher_folder) == corpus.tokenizer_fingerprint
    whose = "the teacher's" if same else "another tokenizer than the teacher's"
    yield Check(name="tokenizer", ok=same, fact=f"the corpus was tokenised with {whose}")
    width = read_facts(teacher_folder).vocab_size
    yield Check(
        name="vocabulary",
        ok=extent.largest < width,
        fact=f"the corpus's largest id is {extent.largest}, the teacher's logits are {width} wide",
    )
    yield Check(
        name="context",
        ok=extent.longest <= teacher.max_model_len,
        fact=f"the longest sample has {extent.longest} tokens, teacher.max_model_len is {teacher.max_model_len}",
    )
    selection = cache.chosen()
    yield Check(
        name="kept ids",
        ok=selection.k <= width,
        fact=f"cache.k keeps {selection.k} ids of a position, the teacher's logits are {width} wide",
    )
    yield _record(extent, selection, cache.attention(read_facts(teacher_folder).layers))
    yield _head(teacher_folder)


def _record(extent: _Extent, selection: Selection, attention: AttentionSpec | None) -> Check:
    """What the longest response keeps at least, as its record must hold it."""
    ids, keys = extent.longest_response * selection.least_kept, 0
    if attention is not None:
        rows = extent.longest if attention.rows == "all" else extent.longest_response
        keys = rows * len(attention.layers) * attention.top_m
    return Check(
        name="record",
        ok=max(ids, keys) <= MAX_ENTRIES,
        fact=f"the largest record has {ids:,} ids and {keys:,} attention keys, each at most {MAX_ENTRIES:,}",
    )


def _head(teacher_folder: Path) -> Check:
    try:
        name, _ = head_tensor(teacher_folder)
    except StageError as error:
        return Check(name="head", ok=False, fact=str(error))
    return Check(name="head", ok=True, fact=f"the teacher's output head is {name}")


def _work(extent: _Extent, teacher: TeacherSettings, teacher_folder: Path, devices: Devices) -> Check:
    """Two operations a parameter and token; experts that a token does not visit count too."""
    operations = 2 * _parameters(teacher_folder) * (extent.prompt_tokens + extent.response_tokens)
    copies = f"{devices.replicas} cop{'y' if devices.replicas == 1 else 'ies'} of the teacher"
    split = f", each over {teacher.tensor_parallel} devices" if teacher.tensor_parallel > 1 else ""
    return Check(name="work", ok=True, fact=f"{operations / 1e15:,.3g} PFLOP of matrix products; {copies}{split}")


def _memory(teacher: TeacherSettings, teacher_folder: Path, devices: Devices) -> Check:
    """What one device holds: its part of the weights, keys and values of one longest sample, a block of logits."""
    facts = read_facts(teacher_folder)
    width = _WIDTHS[resolve_dtype(teacher.dtype, teacher_folder)]
    weights = _file_bytes(teacher_folder) if facts.quantisation else _parameters(teacher_folder) * width
    cached = 2 * facts.layers * facts.key_heads * facts.head_dim * width * teacher.max_model_len
    head = facts.vocab_size * facts.hidden_size * 4 if teacher.head_dtype == "float32" else 0
    logits = min(teacher.max_batched_tokens, teacher.max_model_len) * facts.vocab_size * 4
    needed = (weights + cached + head) // teacher.tensor_parallel + min(logits, _LOGITS_BYTES)
    spread = f" over {teacher.tensor_parallel} devices" if teacher.tensor_parallel > 1 else ""
    parts = (
        f"weights {weights / _GIB:.1f}, keys and values {cached / _GIB:.1f}, head in fp32 {head / _GIB:.1f}{spread}, "
        f"a block of logits {min(logits, _LOGITS_BYTES) / _GIB:.1f}"
    )
    if devices.memory is None:
        seen = "what the cluster's have is not seen from here"
        return Check(name="memory", ok=True, fact=f"{needed / _GIB:.1f} GiB a device, {seen}: {parts}")
    there = devices.memory * (teacher.gpu_memory_utilization if devices.gpus else 1.0)
    told, fits = f"{needed / _GIB:.1f} of {there / _GIB:.1f} GiB a device: {parts}", needed <= there
    return Check(name="memory", ok=fits, fact=told if fits else f"{told}; {_relief(teacher, devices)}")


def _relief(teacher: TeacherSettings, devices: Devices) -> str:
    """Where memory falls short, what makes it enough: processes without a GPU only split the same memory again."""
    if devices.gpus:
        return "raise teacher.tensor_parallel (TP=…)"
    fewer = f"have fewer copies (GPUS={teacher.tensor_parallel}), or " if devices.replicas > 1 else ""
    return f"{fewer}lower teacher.max_model_len"


def _room(extent: _Extent, cache: CacheSettings, teacher_folder: Path, storage: Storage, *, missing: float) -> Check:
    selection, attention = cache.chosen(), cache.attention(read_facts(teacher_folder).layers)
    position = _POSITION_BYTES + selection.most_kept * _ENTRY_BYTES + 4 * len(cache.curve)
    rows = keys = 0
    if attention is not None:
        rows = len(attention.layers) * (
            extent.response_tokens + (extent.prompt_tokens if attention.rows == "all" else 0)
        )
        keys = rows * attention.top_m
    text = (extent.prompt_tokens + extent.response_tokens) * _TOKEN_BYTES
    needed = missing * (extent.response_tokens * position + rows * _ROW_BYTES + keys * _KEY_BYTES + text)
    fact = f"about {needed / _GIB:.2f} GiB of shards to write"
    if not isinstance(storage, LocalStorage):
        return Check(name="store", ok=True, fact=f"{fact} to {storage.where()}, which answers")
    folder = storage.folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    fact = f"{fact}, {free / _GIB:.0f} GiB free"
    enough = needed * _DISK_MARGIN <= free
    return Check(name="disk", ok=enough, fact=fact if enough else f"{fact}; make room, or lower cache.k")


def _parameters(folder: Path) -> int:
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))
