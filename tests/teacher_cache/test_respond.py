"""Responses written anew: what corpus comes of them, and that no interruption shows in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.responses import StudentAuthor
from stages.corpus.store import Corpus
from stages.errors import StageError
from stages.events import silent
from stages.inference.generate import Student
from stages.teacher_cache import respond as module
from stages.teacher_cache.respond import respond
from stages.teacher_cache.settings import RespondSettings

END = 2


class MadeUp:
    """Writes what prompt and seed decide, and counts; `fail_at` is the call that does not return."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.closed, self._fail_at = 0, False, fail_at

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        self.calls += 1
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        return [[(sum(prompt) + seed + index) % 300, END] for index, prompt in enumerate(prompts)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def corpus(recorded: ModuleType, recorded_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(module, "_PROMPTS_PER_PART", 2)
    return recorded.make_corpus(recorded_teacher)


def written(corpus: Corpus, out: Path, author: MadeUp, identity: str = "a", **settings: object) -> Corpus:
    asked = RespondSettings(**{"by": "teacher", **settings})
    return respond(corpus=corpus, settings=asked, identity=identity, author=lambda: author, out=out, emit=silent)


def test_a_teachers_responses_replace_the_corpuss_own(corpus: Corpus, tmp_path: Path) -> None:
    author = MadeUp()
    made = written(corpus, tmp_path, author, per_prompt=3)
    assert (author.calls, author.closed) == (4 + 1, True)
    for split in ("train", "dev"):
        theirs, ours = getattr(corpus, split), getattr(made, split)
        assert [sample.prompt_ids.tolist() for sample in ours] == [
            sample.prompt_ids.tolist() for sample in theirs for _ in range(3)
        ]
        assert all(sample.response_ids.tolist()[1:] == [END] for sample in ours)
        assert len({sample.sample_id for sample in ours}) == len(ours) == 3 * len(theirs)
    assert made.fingerprint != corpus.fingerprint
    assert made.tokenizer_fingerprint == corpus.tokenizer_fingerprint


def test_a_students_responses_join_the_corpuss_own_and_leave_validation_as_it_is(
    corpus: Corpus, tmp_path: Path
) -> None:
    made = written(corpus, tmp_path, MadeUp(), by="student=somewhere")
    ids = [sample.sample_id for sample in made.train]
    assert ids[: len(corpus.train)] == [sample.sample_id for sample in corpus.train]
    assert len(set(ids)) == len(ids) == 2 * len(corpus.train)
    assert [s.response_ids.tolist() for s in made.dev] == [s.response_ids.tolist() for s in corpus.dev]


@pytest.mark.parametrize("call", [1, 3, 5])
def test_stopped_at_any_part_it_goes_on_to_the_same_corpus(corpus: Corpus, tmp_path: Path, call: int) -> None:
    whole = written(corpus, tmp_path / "whole", MadeUp())
    stopped, rest = MadeUp(fail_at=call), MadeUp()
    with pytest.raises(KeyboardInterrupt):
        written(corpus, tmp_path / "out", stopped)
    assert stopped.closed
    made = written(corpus, tmp_path / "out", rest)
    assert made.fingerprint == whole.fingerprint
    assert rest.calls == 5 - (call - 1)
    assert not list((tmp_path / "out").glob("parts-*")), "what was collected is not kept twice"


def test_a_part_that_was_damaged_meanwhile_is_written_again(corpus: Corpus, tmp_path: Path) -> None:
    whole, rest = written(corpus, tmp_path / "whole", MadeUp()), MadeUp()
    with pytest.raises(KeyboardInterrupt):
        written(corpus, tmp_path / "out", MadeUp(fail_at=3))
    first, _ = sorted((tmp_path / "out").glob("parts-*/*.arrow"))
    data = bytearray(first.read_bytes())
    data[data.index(corpus.train[0].prompt_ids.tobytes())] ^= 1
    first.write_bytes(data)
    assert written(corpus, tmp_path / "out", rest).fingerprint == whole.fingerprint
    assert rest.calls == 5 - 1


def test_what_is_written_is_not_written_again_and_not_mixed_with_anothers(corpus: Corpus, tmp_path: Path) -> None:
    first, again = written(corpus, tmp_path, MadeUp()), MadeUp()
    assert written(corpus, tmp_path, again).fingerprint == first.fingerprint
    assert again.calls == 0
    for change in ({"identity": "b"}, {"seed": 1}, {"temperature": 0.5}):
        with pytest.raises(StageError, match="another author"):
            written(corpus, tmp_path, again, **change)


def test_another_seed_writes_something_else(corpus: Corpus, tmp_path: Path) -> None:
    one, other = (written(corpus, tmp_path / str(seed), MadeUp(), seed=seed) for seed in (0, 1))
    assert one.fingerprint != other.fingerprint


def test_a_prompt_without_a_response_is_left_out_and_the_same_response_kept_once(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MadeUp, "write", lambda self, prompts, seed: [[7] if i else [] for i, _ in enumerate(prompts)])
    once, twice = (written(corpus, tmp_path / str(count), MadeUp(), per_prompt=count) for count in (1, 2))
    assert len(once.train) == 3, "the first of each part of two has none, and the last part has but one"
    assert len(twice.train) == 7
    assert all(sample.response_ids.tolist() == [7] for sample in (*once.train, *twice.train))


def test_a_student_closes_its_answers_with_the_end_token(finished_run: Path) -> None:
    student = Student.load(finished_run / "final_model")
    end = student.model.config.eos_token_id
    settings = RespondSettings(by="student=x", max_new_tokens=6)
    prompts = [student.prompt_ids("1 + 1?"), student.prompt_ids("2?")]
    author = StudentAuthor(student, settings, end, context=512)
    responses = author.write(prompts, 5)
    assert responses == author.write(prompts, 5)
    assert responses != author.write(prompts, 6)
    for response in responses:
        assert 1 <= len(response) <= 7
        assert response[-1] == end or len(response) == 6
        assert end not in response[:-1]
    longer, shorter = sorted(map(len, prompts), reverse=True)
    assert shorter < longer, "one of them leaves the teacher no room"
    tight = StudentAuthor(student, settings, end, context=longer)
    assert [len(response) for response in tight.write(prompts, 5)] == [
        min(len(response), longer - len(prompt)) for prompt, response in zip(prompts, responses, strict=True)
    ]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"by": "parrot"}, "respond.by"),
        ({"by": "student="}, "respond.by"),
        ({"per_prompt": 2, "temperature": 0.0}, "per_prompt"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(asked: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RespondSettings(**asked)
