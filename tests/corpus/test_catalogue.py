from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.corpus import catalogue as catalogue_module
from stages.corpus.catalogue import Catalogue, catalogue
from stages.corpus.settings import CorpusSettings
from stages.errors import StageError
from stages.events import silent


def read(source: Path, **changes: Any) -> Catalogue:
    return catalogue(
        source,
        settings=CorpusSettings(**changes),
        rejects=source.parent / "rejects.jsonl",
        refuse=lambda row: "odd" if "odd" in row.answer else None,
        emit=silent,
    )


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.just(b'{"input": "a", "content": "b"}')
        | st.just(b'{"input": "a", "content": "odd"}')
        | st.just(b'{"input": "a", "content": "b", "score": 1}'),
        max_size=12,
    )
)
def test_every_line_is_accounted_for(tmp_path: Path, lines: list[bytes]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(lines))
    found = read(source, min_score=2.0)
    content = source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert found.rows == sum(bool(line.strip()) for line in content.split(b"\n"))
    assert found.rows == len(found.offsets_S) + found.dropped.total() + found.rejected
    assert found.source_sha256 == sha256(source.read_bytes()).hexdigest()
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == found.rejected
    assert all(reject["reason"] for reject in rejects)


def test_rejects_name_line_reason_and_beginning(write_jsonl: Callable[..., Path], reasoning_row: Any) -> None:
    source = write_jsonl(
        [b"\xef\xbb\xbf" + json.dumps(reasoning_row(1)).encode(), b"", b'{"input": "\xff', reasoning_row(2)]
    )
    found = read(source)
    assert (found.rows, found.rejected, len(found.offsets_S)) == (3, 1, 2)
    (reject,) = (json.loads(line) for line in (source.parent / "rejects.jsonl").read_text().splitlines())
    assert reject["line"] == 3
    assert reject["reason"].startswith("not UTF-8")
    assert reject["begins"] == '{"input": "\\xff'


def test_a_line_too_long_to_hold_is_rejected_and_the_next_one_read(
    write_jsonl: Callable[..., Path], reasoning_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_LINE_BYTES", 256)
    source = write_jsonl([reasoning_row(1), reasoning_row(2, content="x" * 2_000), reasoning_row(3)])
    found = read(source)
    assert (found.rows, found.rejected, len(found.offsets_S)) == (3, 1, 2)
    assert "longer than 256 bytes" in (source.parent / "rejects.jsonl").read_text()
    with source.open("rb") as file:
        assert found.read(file, 1, CorpusSettings()).answer == "4"
    assert found.source_sha256 == sha256(source.read_bytes()).hexdigest()


def test_scores_below_the_minimum_are_dropped_and_rows_without_one_kept(
    write_jsonl: Callable[..., Path], reasoning_row: Any
) -> None:
    source = write_jsonl([reasoning_row(1, score=4.9), reasoning_row(2, score=5), reasoning_row(3, score=None)])
    found = read(source, min_score=5.0)
    assert found.dropped == {"score below the minimum": 1}
    assert len(found.offsets_S) == 2


def test_a_source_that_changes_between_the_passes_is_noticed(
    write_jsonl: Callable[..., Path], reasoning_row: Any
) -> None:
    source = write_jsonl([reasoning_row(1), reasoning_row(2)])
    found = read(source)
    write_jsonl([reasoning_row(2), reasoning_row(1)])
    with source.open("rb") as file, pytest.raises(StageError, match="changed while it was read"):
        found.read(file, 0, CorpusSettings())
