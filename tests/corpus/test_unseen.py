"""Rows read to measure a student on are the tokens that preparing them would give, each once, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.corpus.prepare import prepare
from stages.corpus.sample import Sample
from stages.corpus.settings import CorpusSettings
from stages.corpus.store import read_corpus
from stages.corpus.unseen import read_unseen
from stages.errors import StageError
from stages.events import Event, Note, silent

SETTINGS = CorpusSettings(train_size=16, val_size=4, max_prompt_tokens=60, max_response_tokens=40)


def read(source: Path, tokenizer: Path, emit: Any = silent) -> list[Sample]:
    rejects = source.with_name("rejects.jsonl")
    return read_unseen(source, tokenizer_folder=tokenizer, settings=SETTINGS, rejects=rejects, emit=emit)


def test_they_are_the_tokens_that_preparing_gives(
    write_jsonl: Any, reasoning_row: Any, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, folder = write_jsonl([reasoning_row(number) for number in range(20)]), tokenizer_folders["chatml"]
    prepare(settings=SETTINGS, source=source, tokenizer_folder=folder, out=tmp_path / "o", emit=silent)
    corpus = read_corpus(tmp_path / "o")
    prepared = {sample.sample_id: sample for sample in (*corpus.train, *corpus.dev)}
    found = read(source, folder)
    assert len(found) == len(prepared) == 20
    for sample in found:
        assert sample.prompt_ids.tolist() == prepared[sample.sample_id].prompt_ids.tolist()
        assert sample.response_ids.tolist() == prepared[sample.sample_id].response_ids.tolist()
    reverse = read(write_jsonl([reasoning_row(number) for number in reversed(range(20))]), folder)
    assert [sample.sample_id for sample in reverse] == [sample.sample_id for sample in found][::-1]


def test_what_is_left_out_is_told_and_a_file_with_nothing_is_refused(
    write_jsonl: Any, reasoning_row: Any, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = write_jsonl([reasoning_row(1), reasoning_row(2), {"input": "x" * 900, "content": "y"}])
    folder = tokenizer_folders["chatml"]
    with source.open("a") as file:
        file.write("{broken\n")
    events: list[Event] = []
    assert len(read(source, folder, events.append)) == 2
    notes = " ".join(event.text for event in events if isinstance(event, Note))
    assert "1 rows left out: prompt too long" in notes
    assert "1 of 4 rows cannot be read" in notes
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{broken\n")
    with pytest.raises(StageError, match="no row to measure with: 1 of its 1 rows are broken"):
        read(empty, folder)
    with pytest.raises(StageError, match="no file"):
        read(tmp_path / "absent.jsonl", folder)
