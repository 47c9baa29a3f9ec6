"""Raw JSONL to tokenised samples: two passes, bounded memory, the same result whatever the order of the rows.

The first pass finds the usable rows (`catalogue`), the second tokenises them in rank order (`split.rank`) until both
splits are full. Every row is accounted for: rows = kept + dropped, by reason, + rejected. Running it again with the
same source, settings and tokenizer does nothing; killed at any point, it leaves the former corpus or none.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.durable import file_sha256
from stages.corpus.catalogue import Catalogue, catalogue, require_source
from stages.corpus.fingerprint import tokenizer_fingerprint
from stages.corpus.publish import exclusive
from stages.corpus.sample import Sample
from stages.corpus.settings import CorpusSettings
from stages.corpus.split import divide, rank
from stages.corpus.store import (
    REJECTS,
    SPLITS,
    VERSION,
    Rendering,
    Samples,
    Written,
    commit_corpus,
    find_damage,
    read_commit,
    write_samples,
    write_split,
)
from stages.errors import StageError
from stages.events import Emit, Note, Progress

if TYPE_CHECKING:
    from stages.corpus.tokenizer import ChatTokenizer

_STAGE = "corpus"
_ROWS_PER_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What became of the rows of a source: rows = train + dev + sum(dropped) + rejected."""

    rows: int
    """Lines that are not blank."""
    train: int
    dev: int
    dropped: Mapping[str, int]
    """Well-formed rows that were left out, by reason."""
    rejected: int
    """Broken rows; rejects.jsonl says which and why."""
    cut: int
    """Kept samples whose response was cut at the length limit."""
    prompt_tokens: int
    response_tokens: int
    reused: bool = False
    """True where the folder held exactly this corpus already and nothing was done."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """Filled while `tokenise` runs."""

    dropped: Counter[str]
    kept: list[int] = field(default_factory=list)
    """Catalogue indices of the samples, in the order they were given out."""
    cut: int = 0
    refusal: str = ""


def prepare(*, settings: CorpusSettings, source: Path, tokenizer_folder: Path, out: Path, emit: Emit) -> PrepareReport:
    """Make `out` the prepared data of `source`. Raises StageError where there is nothing to learn from, or no room."""
    require_source(source)
    try:
        with exclusive(out, waiting=lambda: _note(emit, f"another process prepares {out}: waiting for it")) as staging:
            inputs = _inputs(settings, tokenizer_folder)
            done = _done_before(out, inputs, source, emit)
            return done or _make(settings, inputs, source, tokenizer_folder, staging, out, emit)
    except OSError as error:
        raise StageError(
            f"cannot prepare {out} from {source}: {error}",
            hint="make room or fix the permissions, then run it again; nothing unfinished is taken for whole",
        ) from error


def _inputs(settings: CorpusSettings, tokenizer_folder: Path) -> dict[str, Any]:
    """What decides the outcome, beside the source's bytes."""
    return {"settings": settings.deciding(), "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer_folder)}


def _done_before(out: Path, inputs: Mapping[str, Any], source: Path, emit: Emit) -> PrepareReport | None:
    try:
        facts = read_commit(out)
    except StageError as error:
        _note(emit, f"{error}; preparing again", level="warning")
        return None
    if facts is None or facts["version"] != VERSION:
        return None
    if facts["inputs"] != {**inputs, "source_sha256": file_sha256(source)}:
        _note(emit, f"{out} was made from another source, tokenizer or settings: preparing again")
        return None
    damage = find_damage(out, facts)
    if damage:
        _note(emit, f"{damage}: preparing again", level="warning")
        return None
    report = PrepareReport(**facts["report"], reused=True)
    _note(emit, f"{out} is up to date: {report.train:,} train and {report.dev:,} validation samples")
    return report


def _make(
    settings: CorpusSettings,
    inputs: Mapping[str, Any],
    source: Path,
    tokenizer_folder: Path,
    staging: Path,
    out: Path,
    emit: Emit,
) -> PrepareReport:
    # transformers takes seconds to import: a run that finds everything done must not pay for it.
    from stages.corpus.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(tokenizer_folder, thinking=settings.thinking)
    found = catalogue(
        source,
        settings=settings,
        rejects=staging / REJECTS,
        refuse=tokenizer.objection,
        emit=emit,
    )
    order = rank(found.sample_keys_S, found.prompt_keys_S, seed=settings.seed)
    # The rejects are there to be read even if nothing else comes of the source.
    (staging / REJECTS).replace(out / REJECTS)
    tally = Tally(dropped=found.dropped + Counter(duplicate=len(found.offsets_S) - len(order)))
    spool = staging / "spool.arrow"
    write_samples(spool, tokenise(order.tolist(), found, tokenizer, settings, tally, emit))
    written = _write_splits(spool, found, settings, tally, staging)

    kept = sum(split.rows for split in written.values())
    tally.dropped["beyond train_size and val_size"] = found.rows - found.rejected - kept - tally.dropped.total()
    report = PrepareReport(
        rows=found.rows,
        train=written["train"].rows,
        dev=written["dev"].rows,
        dropped={reason: count for reason, count in sorted(tally.dropped.items()) if count},
        rejected=found.rejected,
        cut=tally.cut,
        prompt_tokens=sum(split.prompt_tokens for split in written.values()),
        response_tokens=sum(split.response_tokens for split in written.values()),
    )
    _require_both(report, source)
    _tell(report, settings, tally, emit)
    commit_corpus(
        staging,
        out,
        written,
        rendering=Rendering(
            tokenizer_fingerprint=tokenizer.fingerprint,
            start_token_id=tokenizer.start_token_id,
            end_token_id=tokenizer.end_token_id,
            thinking=settings.thinking,
        ),
        inputs={**inputs, "source_sha256": found.source_sha256},
        report={name: value for name, value in dataclasses.asdict(report).items() if name != "reused"},
    )
    return report


def tokenise(
    order: list[int],
    found: Catalogue,
    tokenizer: ChatTokenizer,
    settings: CorpusSettings,
    tally: Tally,
    emit: Emit,
) -> Iterator[Sample]:
    """Samples in rank order, as many as both splits may hold together."""
    wanted = settings.train_size + settings.val_size
    with found.source.open("rb") as file:
        for start in range(0, len(order), _ROWS_PER_BATCH):
            rows = order[start : start + _ROWS_PER_BATCH]
            pairs = tokenizer.encode([found.read(file, row, settings) for row in rows])
            for row, pair in zip(rows, pairs, strict=True):
                if isinstance(pair, Exception):
                    tally.dropped["refused by the chat template"] += 1
                    tally.refusal = tally.refusal or str(pair)
                    continue
                prompt_ids, response_ids = pair
                if len(prompt_ids) > settings.max_prompt_tokens:
                    tally.dropped["prompt too long"] += 1
                    continue
                tally.cut += len(response_ids) > settings.max_response_tokens
                tally.kept.append(row)
                yield Sample(
                    sample_id=f"{int(found.sample_keys_S[row]):016x}",
                    prompt_ids=prompt_ids,
                    response_ids=response_ids[: settings.max_response_tokens],
                )
                if len(tally.kept) == wanted:
                    break
            ahead = 0 if len(tally.kept) == wanted else len(order) - start - len(rows)
            done = len(tally.kept)
            emit(Progress(stage="tokenise", done=done, total=min(wanted, done + ahead), unit="rows"))
            if done == wanted:
                return


def _write_splits(
    spool: Path, found: Catalogue, settings: CorpusSettings, tally: Tally, staging: Path
) -> dict[str, Written]:
    samples = Samples(spool)
    split = divide(
        found.prompt_keys_S[np.array(tally.kept, dtype=np.int64)],
        train_size=settings.train_size,
        val_size=settings.val_size,
    )
    return {
        name: write_split(staging, name, (samples[index] for index in indices.tolist()))
        for name, indices in zip(SPLITS, (split.train, split.dev), strict=True)
    }


def _require_both(report: PrepareReport, source: Path) -> None:
    if report.train and report.dev:
        return
    counts = ", ".join(
        [f"{report.rejected} broken", *(f"{count} {reason}" for reason, count in report.dropped.items())]
    )
    raise StageError(
        f"{source} leaves {report.train} samples to train on and {report.dev} to validate with; "
        f"of its {report.rows} rows: {counts}",
        hint="training and validation each need a row of their own, with different prompts, within the length limits",
    )


def _tell(report: PrepareReport, settings: CorpusSettings, tally: Tally, emit: Emit) -> None:
    kept, wanted = report.train + report.dev, settings.train_size + settings.val_size
    if kept < wanted:
        _note(
            emit,
            f"{kept:,} of the {wanted:,} samples asked for: {report.train:,} train and {report.dev:,} validation, "
            "in the ratio asked for",
        )
    tell_left_out(report.dropped, settings, tally, emit)


def tell_left_out(dropped: Mapping[str, int], settings: CorpusSettings, tally: Tally, emit: Emit) -> None:
    for reason, count in dropped.items():
        _note(emit, f"{count:,} rows left out: {reason}")
    if tally.cut:
        _note(emit, f"{tally.cut:,} responses cut at {settings.max_response_tokens:,} tokens")
    if tally.refusal:
        _note(emit, f"the chat template's first refusal: {tally.refusal}", level="warning")


def _note(emit: Emit, text: str, *, level: str = "info") -> None:
    emit(Note(stage=_STAGE, text=text, level=level))
