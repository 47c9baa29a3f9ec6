from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.durable import file_sha256
from stages.corpus.sample import Sample
from stages.corpus.store import VERSION, Samples, read_corpus, samples_file, write_commit, write_samples
from stages.errors import StageError

token_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


def sample(number: int, prompt: list[int], response: list[int]) -> Sample:
    return Sample(
        sample_id=f"{number:016x}",
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of 3,000 train and 5 validation samples."""
    files = {}
    for split, count in (("train", 3_000), ("dev", 5)):
        path = samples_file(tmp_path, split)
        path.parent.mkdir()
        write_samples(path, (sample(n, [n, n + 1], [n] * (n % 3 + 1)) for n in range(count)))
        files[f"{split}/samples.arrow"] = file_sha256(path)
    facts = {
        "version": VERSION,
        "fingerprint": "f",
        "tokenizer_fingerprint": "t",
        "start_token_id": 0,
        "end_token_id": 2,
        "thinking": True,
        "files": files,
        "report": {"rows": 3_005},
    }
    write_commit(tmp_path, facts)
    return tmp_path


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), max_size=20))
def test_samples_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[list[int], list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("samples") / "samples.arrow"
    written = write_samples(path, (sample(n, *pair) for n, pair in enumerate(pairs)))
    samples = Samples(path)
    assert [(s.sample_id, s.prompt_ids.tolist(), s.response_ids.tolist()) for s in samples] == [
        (f"{n:016x}", *pair) for n, pair in enumerate(pairs)
    ]
    assert all(s.prompt_ids.dtype == s.response_ids.dtype == np.int32 for s in samples)
    assert (written.rows, written.prompt_tokens, written.response_tokens) == (
        len(pairs),
        sum(len(prompt) for prompt, _ in pairs),
        sum(len(response) for _, response in pairs),
    )


def test_the_digest_tells_where_one_text_ends_and_the_next_begins(tmp_path: Path) -> None:
    digests = {
        write_samples(tmp_path / "a", rows).digest
        for rows in (
            [sample(0, [1, 2], [3])],
            [sample(0, [1], [2, 3])],
            [sample(0, [1, 2], [3]), sample(1, [1], [3])],
            [sample(1, [1], [3]), sample(0, [1, 2], [3])],
        )
    }
    assert len(digests) == 4


def test_a_corpus_is_a_sequence_over_several_batches(folder: Path) -> None:
    corpus = read_corpus(folder)
    assert len(corpus.train) == 3_000
    assert corpus.train[2_999].prompt_ids.tolist() == [2_999, 3_000]
    assert corpus.train[-1].sample_id == corpus.train[2_999].sample_id
    assert [s.prompt_ids[0] for s in corpus.train[1_022:1_027]] == [1_022, 1_023, 1_024, 1_025, 1_026]
    assert not corpus.train[0].prompt_ids.flags.writeable
    for index in (3_000, -3_001):
        with pytest.raises(IndexError):
            corpus.train[index]
    assert (corpus.start_token_id, corpus.end_token_id, corpus.report["rows"]) == (0, 2, 3_005)


def test_no_corpus_is_told_from_an_unfinished_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no prepared data"):
        read_corpus(tmp_path / "nowhere")
    (folder / "corpus.json").unlink()
    with pytest.raises(StageError, match="holds unfinished prepared data") as caught:
        read_corpus(folder)
    assert "make prepare" in caught.value.hint


def test_any_flipped_bit_is_found_and_its_file_named(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dev/samples.arrow", "train/samples.arrow", "corpus.json"):
        path = folder / name
        whole = path.read_bytes()
        for position in rng.integers(0, len(whole), size=25):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(StageError, match=name):
                read_corpus(folder)
        path.write_bytes(whole)
    read_corpus(folder)


def test_a_missing_split_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "dev")
    with pytest.raises(StageError, match=r"dev/samples\.arrow is missing"):
        read_corpus(folder)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.arrow"
    batch = pa.record_batch({"sample_id": pa.array([1])})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(pa.ArrowInvalid, match="other columns"):
        Samples(path)
