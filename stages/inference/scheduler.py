"""Who is decoded when: a bounded queue before a batch of slots, and one thread that moves the batch token by token.

Answers are taken in the order in which they came. One holds its place until `cancel`, written or not: what its caller
has not taken yet lies in memory, and the bound is one of memory. No step takes in more than PREFILL_TOKENS tokens of
new prompts (but always one prompt), so that answers under way go on while a crowd arrives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.inference.answer import Answer, Piece
from stages.inference.batch import DecodeBatch
from stages.inference.prompts import PromptCache
from stages.student.model import MiniCodformerForConditionalGeneration

PREFILL_TOKENS = 1024

Event = Piece | Exception
Listener = Callable[[Answer, Event], None]


class QueueFull(Exception):
    """There is no room for more answers; `retry_after` is a guess, in seconds, of when there will be."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many answers are waiting")
        self.retry_after = retry_after


class Closed(Exception):
    """No more answers are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a scheduler is doing now, and what it has done since it began."""

    running: int
    waiting: int
    untaken: int
    """Written, but not yet taken by those who asked."""
    generated_tokens: int
    prompt_tokens: int
    prompt_hits: int
    prompt_misses: int
    prompt_bytes: int
    tokens_per_second: float
    """Over the last steps of work; 0 before any."""


class Scheduler:
    """Starts its thread at once; `close` ends it. Every method may be called from any thread."""

    def __init__(
        self,
        model: MiniCodformerForConditionalGeneration,
        *,
        slots: int,
        queue: int,
        post: Callable[[Callable[[], None]], object] = lambda deliver: deliver(),
    ) -> None:
        """`slots` answers are decoded together and `queue` more may wait for theirs.

        `post` runs a function where listeners live, e.g. an event loop's `call_soon_threadsafe`.
        """
        self.slots, self.queue = slots, queue
        self._model, self._post = model, post
        self._prompts = PromptCache(model)
        self._batch = DecodeBatch(model, self._prompts)
        self._changed = threading.Condition()  # guards all below
        self._held: set[Answer] = set()
        self._listeners: dict[Answer, Listener] = {}  # of those that are held and not written yet
        self._waiting: deque[Answer] = deque()
        self._cancelled: set[Answer] = set()
        self._taking, self._ended = True, False
        self._generated = self._prompt_tokens = 0
        self._rate = _Rate()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[Answer], listen: Listener) -> None:
        """Have all of the answers written, or none. Raises what `require_room` raises.

        `listen` is told of every piece; an exception is the last thing it hears of an answer. Whoever submits calls
        `cancel` in the end.
        """
        with self._changed:
            self.require_room(len(answers))
            self._held.update(answers)
            self._listeners.update(dict.fromkeys(answers, listen))
            self._waiting.extend(answers)
            self._changed.notify_all()

    def require_room(self, count: int) -> None:
        """Raises QueueFull or Closed where so many answers are not taken now, and ValueError for more than ever fit."""
        most = self.slots + self.queue
        if count > most:
            raise ValueError(f"{count} answers at once; this server holds {most}")
        with self._changed:
            if not self._taking:
                raise Closed
            excess = len(self._held) + count - most
            if excess > 0:
                raise QueueFull(self._seconds_until_room(excess))

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more: their places are free now, their slots from the next step on."""
        with self._changed:
            self._held.difference_update(answers)
            self._cancelled.update(answer for answer in answers if self._listeners.pop(answer, None))
            self._changed.notify_all()

    def load(self) -> Load:
        with self._changed:
            waiting = sum(answer in self._listeners for answer in self._waiting)
            return Load(
                running=len(self._listeners) - waiting,
                waiting=waiting,
                untaken=len(self._held) - len(self._listeners),
                generated_tokens=self._generated,
                prompt_tokens=self._prompt_tokens,
                prompt_hits=self._prompts.hits,
                prompt_misses=self._prompts.misses,
                prompt_bytes=self._prompts.bytes,
                tokens_per_second=self._rate.per_second,
            )

    @property
    def taking(self) -> bool:
        """Whether `submit` may succeed."""
        return self._taking

    @property
    def alive(self) -> bool:
        """Whether the thread works. Only an error of our own ends it before `close`."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take no more answers and end the thread; listeners of answers that are not finished hear Closed."""
        with self._changed:
            self._taking, self._ended = False, True
            self._changed.notify_all()
        self._thread.join()
        self._tell([(answer, Closed("the server is shutting down")) for answer in self._listeners])

    def _seconds_until_room(self, excess: int) -> float:
        """When the `excess` shortest answers under way are finished, at the present pace."""
        left = sorted(answer.sampling.max_new_tokens - len(answer.token_ids) for answer in self._listeners)
        steps = left[min(excess, len(left)) - 1] if left else 0
        return steps * min(self.slots, len(left)) / self._rate.per_second if self._rate.per_second else 1.0

    def _work(self) -> None:
        while (entering := self._next()) is not None:
            events: list[tuple[Answer, Event]] = []
            try:
                if entering:
                    self._batch.join(entering)
                if len(self._batch):
                    events += self._batch.step()
            except Exception as error:  # whatever a model raises: those who asked are told, the next find a fresh batch
                with self._changed:
                    events = [(answer, error) for answer in self._listeners if answer not in self._waiting]
                self._batch = DecodeBatch(self._model, self._prompts)
            self._tell(events)

    def _next(self) -> list[Answer] | None:
        """Wait for work, let go of the cancelled, and return who joins before the next step; None at the end."""
        with self._changed:
            if not self._listeners:
                self._changed.wait_for(lambda: self._listeners or self._cancelled or self._ended)
                self._rate.start()
            if self._ended:
                return None
            if self._cancelled:
                self._waiting = deque(answer for answer in self._waiting if answer not in self._cancelled)
                self._batch.drop(self._cancelled)
                self._cancelled.clear()
            entering: list[Answer] = []
            new_prompts: set[tuple[int, ...]] = set()
            while self._waiting and len(self._batch) + len(entering) < self.slots:
                prompt = self._waiting[0].prompt_ids
                if prompt not in self._prompts:
                    new_prompts.add(prompt)
                if len(new_prompts) > 1 and sum(map(len, new_prompts)) > PREFILL_TOKENS:
                    break
                entering.append(self._waiting.popleft())
                self._prompt_tokens += len(prompt)
            return entering

    def _tell(self, events: Sequence[tuple[Answer, Event]]) -> None:
        with self._changed:
            told = [(self._listeners[answer], answer, event) for answer, event in events if answer in self._listeners]
            for _, answer, event in told:
                if isinstance(event, Exception) or event.finish_reason is not None:
                    del self._listeners[answer]
            pieces = sum(isinstance(event, Piece) for _, event in events)
            self._generated += pieces
            self._rate.count(pieces)
            self._changed.notify_all()

        def deliver() -> None:
            for listen, answer, event in told:
                listen(answer, event)

        if told:
            self._post(deliver)


class _Rate:
    """Tokens a second over the last steps, without the pauses between works."""

    STEPS = 64

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=self.STEPS)  # seconds, tokens
        self._last = time.monotonic()

    def start(self) -> None:
        """Work begins now; what came before was none."""
        self._last = time.monotonic()

    def count(self, tokens: int) -> None:
        now = time.monotonic()
        self._steps.append((now - self._last, tokens))
        self._last = now

    @property
    def per_second(self) -> float:
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else 0.0
