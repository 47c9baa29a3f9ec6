"""From prompts to answers being written: the students of the table, each with its scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from stages.corpus.rows import Message
from stages.inference.scheduler import Scheduler
from stages.inference.server.errors import Refusal
from stages.inference.server.metrics import Metrics
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings
from stages.inference.server.ticket import Ticket, answers_of, refusing
from stages.inference.settings import Sampling

Prompt = str | tuple[Message, ...] | list[int]
"""One user message, a conversation, or token ids."""


class Service:
    """Lives on one event loop; the schedulers exist from `start` to `close`."""

    def __init__(self, models: Sequence[ServedModel], settings: ServerSettings) -> None:
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        assert len(self.models) == len(models) > 0, "every model has a name of its own"
        self.settings = settings
        self.schedulers: dict[str, Scheduler] = {}
        self.metrics = Metrics(self.schedulers)
        # One prompt after the other, beside the event loop: a tokenizer is not made for several threads.
        self._tokenizing = asyncio.Lock()

    def start(self, post: Callable[[Callable[[], None]], object]) -> None:
        for name, model in self.models.items():
            self.schedulers[name] = Scheduler(
                model.student.model, slots=self.settings.slots, queue=self.settings.queue, post=post
            )

    async def close(self) -> None:
        """Requests have ended by now, so there is nothing to be patient with."""
        await asyncio.gather(*(asyncio.to_thread(scheduler.close) for scheduler in self.schedulers.values()))

    def find(self, name: str) -> ServedModel:
        """Raises Refusal for a name that is not in the table: no request can name a file."""
        if name not in self.models:
            raise Refusal(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return self.models[name]

    def require_room(self, model: ServedModel, drawn: Sampling, count: int, param: str) -> None:
        """Refuse before any prompt is read. Raises Refusal, naming `param` where answers may get too long."""
        longest = self.settings.max_new_tokens
        if drawn.max_new_tokens > longest:
            raise Refusal(400, f"`{param}`: an answer has at most {longest:,} tokens here", param=param)
        with refusing():
            self.schedulers[model.name].require_room(count)

    async def encode(self, model: ServedModel, prompts: Sequence[Prompt], param: str) -> list[list[int]]:
        """Token ids of each prompt. Raises Refusal, naming `param`, for what is no prompt or is too long."""
        encoded = []
        for prompt in prompts:
            try:
                if isinstance(prompt, list):
                    ids = prompt
                else:
                    async with self._tokenizing:
                        ids = await asyncio.to_thread(model.student.prompt_ids, prompt)
                model.student.require_ids(ids, "the prompt")
            except ValueError as error:
                raise Refusal(400, str(error), param=param) from error
            longest = self.settings.max_prompt_tokens
            if len(ids) > longest:
                raise Refusal(
                    400,
                    f"the prompt has {len(ids):,} tokens; this server takes {longest:,}",
                    param=param,
                    code="context_length_exceeded",
                )
            encoded.append(ids)
        return encoded

    def submit(self, model: ServedModel, prompts: Sequence[Sequence[int]], drawn: Sampling, count: int) -> Ticket:
        """Have `count` answers to each prompt written. Raises Refusal."""
        return Ticket(
            self.schedulers[model.name],
            answers_of(model.student, prompts, drawn, count),
            lambda seconds: self.metrics.first_token(model.name, seconds),
        )
