"""The scheduler with a real model on its thread: who is written when, and what everybody hears of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.inference import scheduler as scheduler_module
from stages.inference.answer import Answer
from stages.inference.batch import DecodeBatch
from stages.inference.generate import Student
from stages.inference.scheduler import Closed, Event, QueueFull, Scheduler
from stages.inference.settings import Sampling

PATIENCE = 60.0


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    return Student.load(student_folder, device="cpu")


@pytest.fixture
def scheduler(student: Student) -> Iterator[Scheduler]:
    scheduler = Scheduler(student.model, slots=4, queue=64)
    yield scheduler
    scheduler.close()


class Ear:
    """Listens, and knows when an answer has come to its end."""

    def __init__(self) -> None:
        self.heard: list[tuple[Answer, Event]] = []
        self._changed = threading.Condition()

    def __call__(self, answer: Answer, event: Event) -> None:
        with self._changed:
            self.heard.append((answer, event))
            self._changed.notify_all()

    def of(self, answer: Answer) -> list[Event]:
        return [event for who, event in self.heard if who is answer]

    def wait(self, *answers: Answer, pieces: int | None = None) -> None:
        """Until each has ended, or has `pieces`."""

        def over(answer: Answer) -> bool:
            events = self.of(answer)
            if pieces is not None:
                return len(events) >= pieces
            return bool(events) and (isinstance(events[-1], Exception) or events[-1].finish_reason is not None)

        with self._changed:
            assert self._changed.wait_for(lambda: all(map(over, answers)), PATIENCE), "nothing came"


def endless(student: Student, prompt: str = "count") -> Answer:
    """An answer that goes on until it is cancelled, or nearly so."""
    drawn = Sampling(max_new_tokens=1_000_000, temperature=50.0, seed=len(prompt))
    answer = student.answer(student.prompt_ids(prompt), drawn)
    answer._transcript._end_token_id = -1
    return answer


def test_crowds_from_many_threads_get_the_answers_of_generate(
    student: Student, answers: dict[str, str], scheduler: Scheduler
) -> None:
    ear, all_answers = Ear(), []

    def client(number: int) -> None:
        prompts = list(answers)[number % 3 :] + list(answers)[: number % 3]
        mine = [student.answer(student.prompt_ids(text), Sampling(temperature=0.0)) for text in prompts]
        all_answers.extend(zip(prompts, mine, strict=True))
        for answer in mine:
            scheduler.submit([answer], ear)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    ear.wait(*(answer for _, answer in all_answers))
    assert len(all_answers) == 24
    for prompt, answer in all_answers:
        assert answer.text == answers[prompt]
        assert "".join(event.text for event in ear.of(answer) if not isinstance(event, Exception)) == answers[prompt]
    load = scheduler.load()
    assert (load.running, load.waiting) == (0, 0)
    assert load.generated_tokens == len(ear.heard)
    assert load.prompt_tokens == sum(len(answer.prompt_ids) for _, answer in all_answers)
    assert load.prompt_hits + load.prompt_misses == 24
    assert load.prompt_misses == 3, "each prompt was encoded once"
    assert load.tokens_per_second > 0


def test_answers_enter_in_the_order_in_which_they_came(student: Student) -> None:
    scheduler, ear = Scheduler(student.model, slots=1, queue=8), Ear()
    given = [student.answer(student.prompt_ids("count"), Sampling(max_new_tokens=3)) for _ in range(5)]
    scheduler.submit(given, ear)
    ear.wait(*given)
    assert [answer for answer, _ in ear.heard] == [answer for answer in given for _ in range(3)]
    scheduler.close()


def test_a_crowd_does_not_stop_an_answer_under_way(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 50)
    entered: list[int] = []
    join = DecodeBatch.join

    def counted(self: DecodeBatch, answers: list[Answer]) -> None:
        entered.append(sum(len(prompt) for prompt in {answer.prompt_ids for answer in answers}))
        join(self, answers)

    monkeypatch.setattr(DecodeBatch, "join", counted)
    scheduler, ear = Scheduler(student.model, slots=64, queue=0), Ear()
    crowd = [student.answer([5 + n] * 20, Sampling(max_new_tokens=2)) for n in range(8)]
    long = student.answer([9] * 70, Sampling(max_new_tokens=2))
    same = [student.answer([5] * 20, Sampling(max_new_tokens=2)) for _ in range(8)]
    scheduler.submit([*crowd, long, *same], ear)
    ear.wait(*crowd, long, *same)
    # No step encodes more than its 50 tokens, but one long prompt comes in; prompts at hand (the last 20) cost nothing.
    assert entered == [40, 40, 40, 40, 70 + 20]
    scheduler.close()


def test_S2_the_queue_is_bounded_and_says_when_to_come_again(student: Student) -> None:
    scheduler, ear = Scheduler(student.model, slots=1, queue=2), Ear()
    running = endless(student)
    scheduler.submit([running], ear)
    ear.wait(running, pieces=5)
    waiting = [student.answer(student.prompt_ids("count"), Sampling()) for _ in range(3)]
    with pytest.raises(QueueFull) as full:
        scheduler.submit(waiting, ear)
    assert full.value.retry_after > 0
    assert scheduler.load().waiting == 0, "all or none"
    scheduler.submit(waiting[:2], ear)
    assert (scheduler.load().running, scheduler.load().waiting) == (1, 2)
    with pytest.raises(QueueFull):
        scheduler.submit(waiting[2:], ear)
    with pytest.raises(ValueError, match="this server holds 3"):
        scheduler.submit([*waiting, running], ear)
    scheduler.cancel([running])
    ear.wait(*waiting[:2])
    scheduler.close()


def test_S2_a_cancelled_answer_frees_its_slot_whether_it_ran_or_waited(student: Student) -> None:
    scheduler, ear = Scheduler(student.model, slots=1, queue=8), Ear()
    running, waiting = endless(student), endless(student)
    last = student.answer(student.prompt_ids("count"), Sampling())
    for answer in (running, waiting, last):
        scheduler.submit([answer], ear)
    ear.wait(running, pieces=2)
    scheduler.cancel([waiting])
    assert scheduler.load().waiting == 1
    scheduler.cancel([running, running])
    ear.wait(last)
    assert not ear.of(waiting)
    count = len(running.token_ids)
    again = student.answer(student.prompt_ids("count"), Sampling())
    scheduler.submit([again], ear)
    ear.wait(again)
    assert len(running.token_ids) == count, "nobody writes on"
    scheduler.cancel([again])
    scheduler.close()


def test_S2_an_answer_that_is_written_holds_its_place_until_it_is_taken(student: Student) -> None:
    scheduler, ear = Scheduler(student.model, slots=1, queue=0), Ear()
    written, next_one = (student.answer(student.prompt_ids("count"), Sampling()) for _ in range(2))
    scheduler.submit([written], ear)
    ear.wait(written)
    with pytest.raises(QueueFull):
        scheduler.submit([next_one], ear)
    load = scheduler.load()
    assert (load.running, load.waiting, load.untaken) == (0, 0, 1)
    scheduler.cancel([written])
    assert scheduler.load().untaken == 0
    scheduler.submit([next_one], ear)
    ear.wait(next_one)
    scheduler.close()


def test_an_error_of_the_model_reaches_those_who_asked_and_nobody_after(
    student: Student, answers: dict[str, str], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    asked = [student.answer(student.prompt_ids("count"), Sampling()) for _ in range(2)]

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(student.model, "output_hidden", fail)
        scheduler.submit(asked, ear)
        ear.wait(*asked)
    assert [str(event) for answer in asked for event in ear.of(answer)] == ["the device is gone"] * 2
    after = student.answer(student.prompt_ids("count"), Sampling())
    scheduler.submit([after], ear)
    ear.wait(after)
    assert after.text == answers["count"]
    assert scheduler.load().running == 0


def test_closing_tells_those_who_wait_and_takes_no_more(student: Student) -> None:
    scheduler, ear = Scheduler(student.model, slots=1, queue=8), Ear()
    running, waiting = endless(student), endless(student)
    scheduler.submit([running, waiting], ear)
    ear.wait(running, pieces=1)
    scheduler.close()
    assert isinstance(ear.of(running)[-1], Closed)
    assert isinstance(ear.of(waiting)[-1], Closed)
    assert not scheduler.taking
    with pytest.raises(Closed):
        scheduler.submit([student.answer([5], Sampling())], ear)
