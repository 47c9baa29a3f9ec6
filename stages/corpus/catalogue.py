"""The first pass over a JSONL file: which rows are usable, in a few bytes a row.

Lines are read one at a time and bounded, broken ones go to a rejects file with their number and reason, and of each
usable row only two keys and its offset stay in memory (24 bytes). `Catalogue.read` fetches a row again by offset.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from stages.corpus.rows import BrokenRow, Conversation, parse_row
from stages.corpus.settings import CorpusSettings
from stages.errors import StageError
from stages.events import Emit, Note, Progress

MAX_LINE_BYTES = 16 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXCERPT_BYTES = 200
_ROWS_BETWEEN_REPORTS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The usable rows of a file in file order (suffix S), and what became of the others."""

    source: Path
    source_sha256: str
    rows: int
    """Lines that are not blank."""
    rejected: int
    dropped: Counter[str]
    sample_keys_S: NDArray[np.uint64]
    prompt_keys_S: NDArray[np.uint64]
    offsets_S: NDArray[np.int64]

    def read(self, file: BinaryIO, index: int, settings: CorpusSettings) -> Conversation:
        """Row `index` again. Raises StageError where the file is no longer the one that was catalogued."""
        file.seek(self.offsets_S[index])
        try:
            conversation = _as_set(parse_row(_strip_mark(file.readline(MAX_LINE_BYTES))), settings)
        except BrokenRow:
            conversation = None
        if conversation is None or conversation.sample_key() != self.sample_keys_S[index]:
            raise StageError(f"{self.source} changed while it was read", hint="run prepare again")
        return conversation


def require_source(source: Path) -> None:
    """Raise StageError where there is no file of rows."""
    if not source.is_file():
        raise StageError(f"no file {source}", hint="name a JSONL file of rows with --data (DATA=…)")


def catalogue(
    source: Path,
    *,
    settings: CorpusSettings,
    rejects: Path,
    refuse: Callable[[Conversation], str | None],
    emit: Emit,
) -> Catalogue:
    """Read `source` once, writing what is broken to `rejects`.

    `refuse` names the reason for which a well-formed row is left out, or None.
    """
    digest = hashlib.sha256()
    size = source.stat().st_size
    rows = rejected = 0
    first_reject = ""
    dropped: Counter[str] = Counter()
    sample_keys, prompt_keys, offsets = array("Q"), array("Q"), array("q")
    with source.open("rb") as file, rejects.open("w", encoding="utf-8") as rejects_file:
        for number, offset, line in _lines(file, digest.update):
            rows += 1
            if rows % _ROWS_BETWEEN_REPORTS == 0:
                emit(Progress(stage="read corpus", done=offset, total=size, unit="bytes"))
            try:
                conversation = _as_set(parse_row(_whole(line)), settings)
            except BrokenRow as error:
                rejected += 1
                first_reject = first_reject or f"line {number}: {error}"
                rejects_file.write(_reject(number, str(error), line))
                continue
            reason = _below_score(conversation, settings) or refuse(conversation)
            if reason:
                dropped[reason] += 1
                continue
            sample_keys.append(conversation.sample_key())
            prompt_keys.append(conversation.prompt_key())
            offsets.append(offset)
    emit(Progress(stage="read corpus", done=size, total=size, unit="bytes"))
    if rejected:
        text = f"{rejected} of {rows} rows cannot be read and are listed in {rejects.name}; the first is {first_reject}"
        emit(Note(stage="corpus", text=text, level="warning"))
    return Catalogue(
        source=source,
        source_sha256=digest.hexdigest(),
        rows=rows,
        rejected=rejected,
        dropped=dropped,
        sample_keys_S=np.array(sample_keys, dtype=np.uint64),
        prompt_keys_S=np.array(prompt_keys, dtype=np.uint64),
        offsets_S=np.array(offsets, dtype=np.int64),
    )


def _lines(file: BinaryIO, seen: Callable[[bytes], object]) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset and bytes of every line that is not blank; an over-long line comes one byte too long."""
    offset = 0
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        seen(line)
        number += 1
        start, offset = offset, offset + len(line)
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
            seen(rest)
            offset += len(rest)
        line = _strip_mark(line) if start == 0 else line
        if line.strip():
            yield number, start, line


def _strip_mark(line: bytes) -> bytes:
    return line.removeprefix(_BYTE_ORDER_MARK)


def _whole(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise BrokenRow(f"longer than {MAX_LINE_BYTES} bytes")
    return line


def _as_set(conversation: Conversation, settings: CorpusSettings) -> Conversation:
    return conversation if settings.thinking else conversation.without_reasoning()


def _below_score(conversation: Conversation, settings: CorpusSettings) -> str | None:
    if settings.min_score is None or conversation.score is None or conversation.score >= settings.min_score:
        return None
    return "score below the minimum"


def _reject(number: int, reason: str, line: bytes) -> str:
    excerpt = line[:_EXCERPT_BYTES].decode("utf-8", errors="backslashreplace").rstrip("\n")
    return json.dumps({"line": number, "reason": reason, "begins": excerpt}) + "\n"
