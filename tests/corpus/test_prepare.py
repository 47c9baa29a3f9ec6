from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.corpus import publish as publish_module
from stages.corpus.prepare import PrepareReport, prepare
from stages.corpus.settings import CorpusSettings
from stages.corpus.store import Corpus, read_corpus
from stages.corpus.tokenizer import ChatTokenizer
from stages.errors import StageError
from stages.events import Event, Note, Progress, silent

Prepare = Callable[..., PrepareReport]


@pytest.fixture
def run(tokenizer_folders: dict[str, Path], tmp_path: Path) -> Prepare:
    """prepare with small sizes; keyword arguments are settings, or "tokenizer", "out" and "emit"."""

    def call(source: Path, *, tokenizer: str = "chatml", out: str = "out", emit: Any = silent, **changes: Any) -> Any:
        values = {"train_size": 20, "val_size": 4} | changes
        return prepare(
            settings=CorpusSettings(**values),
            source=source,
            tokenizer_folder=tokenizer_folders[tokenizer],
            out=tmp_path / out,
            emit=emit,
        )

    return call


def ids(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [sample.sample_id for sample in corpus.train], [sample.sample_id for sample in corpus.dev]


def test_both_kinds_of_row_become_samples(
    run: Prepare, write_jsonl: Any, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    chat = {"messages": [{"role": "user", "content": "讲个故事"}, {"role": "assistant", "content": "从前有座山。"}]}
    distilled = {"input": "how much?", "reasoning_content": "6 days", "content": "42", "repo_name": "r", "score": 9}
    report = run(write_jsonl([chat, distilled]))
    assert (report.rows, report.train, report.dev, report.reused) == (2, 1, 1, False)
    corpus = read_corpus(tmp_path / "out")
    tokenizer = ChatTokenizer.load(tokenizer_folders["chatml"])
    texts = {
        tokenizer.decode(sample.prompt_ids.tolist()): tokenizer.decode(sample.response_ids.tolist())
        for sample in (*corpus.train, *corpus.dev)
    }
    assert texts == {
        "user\n讲个故事\nassistant\n": "从前有座山。",
        "user\nhow much?\nassistant\n": "6 days\n\n42",
    }
    assert all(sample.response_ids[-1] == corpus.end_token_id for sample in corpus.train)
    assert corpus.start_token_id != corpus.end_token_id


def test_ids_and_split_do_not_depend_on_the_order_of_the_rows(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path
) -> None:
    rows = [reasoning_row(number) for number in range(40)]
    run(write_jsonl(rows), out="a")
    random.Random(1).shuffle(rows)
    run(write_jsonl([*rows, rows[0]]), out="b")
    one, other = read_corpus(tmp_path / "a"), read_corpus(tmp_path / "b")
    assert ids(one) == ids(other)
    assert one.fingerprint == other.fingerprint
    run(write_jsonl(rows), out="c", seed=1)
    assert set(ids(read_corpus(tmp_path / "c"))[1]) != set(ids(one)[1])


def is_usable(row: dict[str, Any]) -> bool:
    return row["score"] >= 5 and "long" not in row["input"] and "<|im_end|>" not in row["content"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_row_is_kept_dropped_for_a_reason_or_rejected(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path, data: st.DataObject
) -> None:
    numbers = st.integers(0, 30)
    lines = data.draw(
        st.lists(
            numbers.map(reasoning_row)
            | numbers.map(lambda number: reasoning_row(number, score=1))
            | numbers.map(lambda number: reasoning_row(number, input="long " * 40))
            | numbers.map(lambda number: reasoning_row(number, content="ends<|im_end|>"))
            | st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"") + b"!"),
            max_size=50,
        )
    )
    source = write_jsonl(lines)
    try:
        report = run(source, min_score=5.0, max_prompt_tokens=60, train_size=8, val_size=2)
    except StageError:
        assert len({line["input"] for line in lines if isinstance(line, dict) and is_usable(line)}) < 2
        return
    assert report.rows == len(lines)
    assert report.rows == report.train + report.dev + sum(report.dropped.values()) + report.rejected
    assert report.train <= 8
    assert report.dev <= 2
    corpus = read_corpus(tmp_path / "out")
    assert (len(corpus.train), len(corpus.dev)) == (report.train, report.dev)
    prompts = [{sample.prompt_ids.tobytes() for sample in side} for side in (corpus.train, corpus.dev)]
    assert not prompts[0] & prompts[1]
    assert len({*ids(corpus)[0], *ids(corpus)[1]}) == report.train + report.dev


def test_reasons_for_leaving_rows_out_are_counted(run: Prepare, write_jsonl: Any, reasoning_row: Any) -> None:
    rows = [
        *(reasoning_row(number) for number in range(30)),
        reasoning_row(3),
        reasoning_row(4, score=7),
        reasoning_row(50, score=1),
        reasoning_row(51, content="x<|im_start|>"),
        b"{",
    ]
    notes: list[Event] = []
    report = run(write_jsonl(rows), min_score=2.0, emit=notes.append)
    assert report.dropped == {
        "beyond train_size and val_size": 6,
        "duplicate": 2,
        "score below the minimum": 1,
        "spells out a template token": 1,
    }
    assert (report.train, report.dev, report.rejected) == (20, 4, 1)
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert any("line 35" in text for text in texts)
    progress = [event for event in notes if isinstance(event, Progress) and event.stage == "tokenise"]
    assert progress[-1].done == progress[-1].total == 24


def test_lengths_are_limited_prompts_dropped_and_responses_cut(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path
) -> None:
    rows = [reasoning_row(number) for number in range(6)]
    rows += [reasoning_row(7, input="why " * 200), reasoning_row(8, content="so " * 200)]
    report = run(write_jsonl(rows), max_prompt_tokens=100, max_response_tokens=100)
    assert report.dropped == {"prompt too long": 1}
    assert report.cut == 1
    corpus = read_corpus(tmp_path / "out")
    samples = [*corpus.train, *corpus.dev]
    (cut,) = (sample for sample in samples if len(sample.response_ids) == 100)
    assert cut.response_ids[-1] != corpus.end_token_id
    assert all(sample.response_ids[-1] == corpus.end_token_id for sample in samples if sample is not cut)
    assert report.response_tokens == sum(len(sample.response_ids) for sample in samples)
    assert report.prompt_tokens == sum(len(sample.prompt_ids) for sample in samples)


def test_dropped_prompts_are_replaced_while_there_are_rows(run: Prepare, write_jsonl: Any, reasoning_row: Any) -> None:
    rows = [reasoning_row(n, input=f"{n}" + " why" * (200 if n % 2 else 1)) for n in range(600)]
    report = run(write_jsonl(rows), train_size=250, val_size=25, max_prompt_tokens=100)
    assert (report.train, report.dev) == (250, 25)


def test_less_data_than_asked_for_keeps_the_ratio_and_says_so(
    run: Prepare, write_jsonl: Any, reasoning_row: Any
) -> None:
    notes: list[Event] = []
    report = run(write_jsonl(map(reasoning_row, range(12))), emit=notes.append)
    assert (report.train, report.dev) == (10, 2)
    assert any("12 of the 24 samples" in event.text for event in notes if isinstance(event, Note))


def test_without_thinking_the_reasoning_is_left_out_and_twins_are_one(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path
) -> None:
    rows = [reasoning_row(number) for number in range(5)] + [reasoning_row(1, reasoning_content="otherwise")]
    assert run(write_jsonl(rows), thinking=False).dropped == {"duplicate": 1}
    assert run(write_jsonl(rows), thinking=True).dropped == {}


@pytest.mark.parametrize("lines", [[], [b"{", b"nonsense"], [{"input": "one", "content": "row"}]])
def test_too_little_to_learn_from_is_an_error_that_counts(run: Prepare, write_jsonl: Any, lines: list[Any]) -> None:
    with pytest.raises(StageError, match=f"of its {len(lines)} rows: {sum(line == b'{' for line in lines) * 2} broken"):
        run(write_jsonl(lines))


def test_rejects_can_be_read_even_if_nothing_else_came_of_it(run: Prepare, write_jsonl: Any, tmp_path: Path) -> None:
    with pytest.raises(StageError):
        run(write_jsonl([b"{"]))
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["line"] == 1
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_a_missing_source_is_named(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"absent\.jsonl"):
        run(tmp_path / "absent.jsonl")


def test_preparing_again_does_nothing_until_something_differs(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path
) -> None:
    source = write_jsonl(map(reasoning_row, range(12)))
    first = run(source)
    written = (tmp_path / "out" / "train" / "samples.arrow").stat().st_mtime_ns
    moved = source.rename(tmp_path / "elsewhere.jsonl")
    again = run(moved)
    assert again.reused
    assert (again.train, again.dropped) == (first.train, first.dropped)
    assert (tmp_path / "out" / "train" / "samples.arrow").stat().st_mtime_ns == written

    assert not run(moved, seed=1).reused
    assert not run(moved).reused
    assert not run(moved, tokenizer="thinking").reused
    assert not run(write_jsonl(map(reasoning_row, range(13))), tokenizer="thinking").reused


def test_a_damaged_corpus_is_prepared_again_with_a_note(
    run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path
) -> None:
    source = write_jsonl(map(reasoning_row, range(12)))
    run(source)
    fingerprint = read_corpus(tmp_path / "out").fingerprint
    for name in ("train/samples.arrow", "corpus.json"):
        path = tmp_path / "out" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        notes: list[Event] = []
        assert not run(source, emit=notes.append).reused
        assert any(event.level == "warning" for event in notes if isinstance(event, Note))
        assert read_corpus(tmp_path / "out").fingerprint == fingerprint


class Faults:
    """Calls `strike` before the n-th operation that makes a corpus durable or visible."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, strike: Callable[[], None]) -> None:
        self.count = 0
        for owner, name in ((publish_module, "sync"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), at, strike))

    def _counting(self, operation: Any, at: int, strike: Callable[[], None]) -> Any:
        def counted(*args: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == at:
                strike()
            return operation(*args, **keywords)

        return counted


@pytest.fixture
def old_and_new(run: Prepare, write_jsonl: Any, reasoning_row: Any, tmp_path: Path) -> tuple[Path, str, str]:
    """A source whose corpus is to replace another in out/: (source, old fingerprint, new fingerprint)."""
    source = write_jsonl(map(reasoning_row, range(12)))
    run(source, out="reference")
    run(write_jsonl(map(reasoning_row, range(20, 32)), "old.jsonl"))
    return source, read_corpus(tmp_path / "out").fingerprint, read_corpus(tmp_path / "reference").fingerprint


def seen(folder: Path) -> str | None:
    """The fingerprint of the corpus in a folder, or None where it says that it is unfinished."""
    try:
        return read_corpus(folder).fingerprint
    except StageError as error:
        if "unfinished" in str(error):
            return None
        raise


def killed(work: Callable[[], object]) -> bool:
    """Run `work` in a fork; True if SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_any_operation_it_leaves_the_old_corpus_or_none(
    run: Prepare, old_and_new: tuple[Path, str, str], tmp_path: Path
) -> None:
    source, old, new = old_and_new
    states = []
    for at in range(1, 100):

        def work(at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Faults(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                run(source)

        if not killed(work):
            break
        states.append(seen(tmp_path / "out"))
        assert states[-1] in (old, new, None)
        if states[-1] == new:
            break
    assert {old, None} <= set(states)
    assert states == sorted(states, key=[old, None, new].index), "the old, then none, then the new"
    run(source)
    assert seen(tmp_path / "out") == new
    assert not (tmp_path / "out" / ".staging").exists()


def test_killed_while_it_tokenises_it_leaves_the_old_corpus(
    run: Prepare, old_and_new: tuple[Path, str, str], tmp_path: Path
) -> None:
    source, old, new = old_and_new

    def strike(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "tokenise":
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(lambda: run(source, emit=strike))
    assert seen(tmp_path / "out") == old
    assert not run(source).reused
    assert seen(tmp_path / "out") == new


def test_a_full_disk_at_any_operation_is_one_clear_error(
    run: Prepare, old_and_new: tuple[Path, str, str], tmp_path: Path
) -> None:
    source, old, new = old_and_new

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    errors = []
    for at in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at, full)
            try:
                run(source)
            except StageError as error:
                errors.append(error)
        assert seen(tmp_path / "out") in (old, new, None)
        if faults.count < at:
            break
    assert len(errors) >= 8
    assert all("No space left" in str(error) and "make room" in error.hint for error in errors)
    assert seen(tmp_path / "out") == new
