"""One request's answers while they are being written, as the event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from stages.inference.answer import Answer, Piece
from stages.inference.generate import Student
from stages.inference.scheduler import Closed, Event, QueueFull, Scheduler
from stages.inference.server.errors import Refusal
from stages.inference.settings import Sampling

SECONDS_TO_ANOTHER_SERVER = 5
"""What a server that shuts down tells its callers to wait: by then another one may stand there."""


class Ticket:
    """Answers that were submitted together. Whoever holds it calls `cancel` in the end, whatever that is."""

    def __init__(self, scheduler: Scheduler, answers: Sequence[Answer], on_first: Callable[[float], None]) -> None:
        """Submits. `on_first` hears the seconds to the first token of each answer. Raises Refusal."""
        self.answers = list(answers)
        self._scheduler = scheduler
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        index = {answer: number for number, answer in enumerate(self.answers)}
        began, silent = time.monotonic(), set(index)

        def listen(answer: Answer, event: Event) -> None:
            if answer in silent:
                silent.discard(answer)
                on_first(time.monotonic() - began)
            self._events.put_nowait((index[answer], event))

        with refusing():
            scheduler.submit(self.answers, listen)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of the answer, and what its next token brought. Raises Refusal, and what the model raised."""
        unfinished = len(self.answers)
        while unfinished:
            index, event = await self._events.get()
            if isinstance(event, Closed):
                raise shutting_down()
            if isinstance(event, Exception):
                raise event
            unfinished -= event.finish_reason is not None
            yield index, event

    async def finish(self) -> None:
        async for _ in self.pieces():
            pass

    def cancel(self) -> None:
        """Stop writing what is not finished, and let go of what is."""
        self._scheduler.cancel(self.answers)

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Why a scheduler does not take answers, as their caller is told it."""
    try:
        yield
    except QueueFull as full:
        after = str(max(1, math.ceil(full.retry_after)))
        raise Refusal(429, f"the queue is full; try again in {after} s", headers={"retry-after": after}) from full
    except Closed as closed:
        raise shutting_down() from closed
    except ValueError as error:
        raise Refusal(400, f"`n`: {error}", param="n") from error


def shutting_down() -> Refusal:
    return Refusal(
        503,
        "the server is shutting down",
        headers={"retry-after": str(SECONDS_TO_ANOTHER_SERVER)},
        code="shutting_down",
    )


def answers_of(student: Student, prompts: Sequence[Sequence[int]], drawn: Sampling, count: int) -> list[Answer]:
    """`count` answers to each prompt, the i-th of all with seed + i."""
    wanted = [prompt for prompt in prompts for _ in range(count)]
    return [student.answer(prompt, drawn.of_answer(index)) for index, prompt in enumerate(wanted)]
