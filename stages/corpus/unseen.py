"""Rows that no corpus was made of, as the same tokens that preparing them would give: text to measure a student on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stages.corpus.catalogue import catalogue, require_source
from stages.corpus.prepare import Tally, tell_left_out, tokenise
from stages.corpus.sample import Sample
from stages.corpus.settings import CorpusSettings
from stages.corpus.tokenizer import ChatTokenizer
from stages.errors import StageError
from stages.events import Emit


def read_unseen(
    source: Path, *, tokenizer_folder: Path, settings: CorpusSettings, rejects: Path, emit: Emit
) -> list[Sample]:
    """Every usable row of a JSONL file, in its order; limits, reasoning and refusals as `settings` have them.

    Raises StageError where there is no file, or no usable row in it.
    """
    require_source(source)
    tokenizer = ChatTokenizer.load(tokenizer_folder, thinking=settings.thinking)
    found = catalogue(source, settings=settings, rejects=rejects, refuse=tokenizer.objection, emit=emit)
    rows = len(found.offsets_S)
    tally = Tally(dropped=found.dropped)
    everything = dataclasses.replace(settings, train_size=max(rows, 1))
    samples = list(tokenise(list(range(rows)), found, tokenizer, everything, tally, emit))
    tell_left_out(tally.dropped, settings, tally, emit)
    if not samples:
        raise StageError(
            f"{source} holds no row to measure with: {found.rejected} of its {found.rows} rows are broken",
            hint=f"{rejects} lists them; the formats are in README.md",
        )
    return samples
