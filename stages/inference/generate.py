"""The student in use: load a finished model and ask it.

    student = Student.load()
    student.generate("How much is 6 x 7?")[0].text
    student.chat([Message(role="user", content="How much is 6 x 7?")]).text
    for text in student.stream("How much is 6 x 7?"): ...

A prompt passes through the same chat template as in training. The same call gives the same answers; nothing here
reads or moves a global random state. Streamed pieces joined are the text of `generate`, and greedy tokens are those
of transformers' own `generate`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from stages.corpus.chat import read_thinking
from stages.corpus.rows import Message
from stages.corpus.tokenizer import ChatTokenizer, RefusedByTemplate
from stages.errors import StageError
from stages.inference.answer import Answer, Piece, TokenLogprob
from stages.inference.batch import DecodeBatch
from stages.inference.few_rows import expect_few_rows
from stages.inference.loading import load_model, newest_model
from stages.inference.prompts import PromptCache
from stages.inference.settings import Sampling, SamplingOptions
from stages.inference.transcript import FinishReason
from stages.student.model import MiniCodformerForConditionalGeneration

BATCH = 32
"""Prompts answered at once; as one answer ends, the next prompt takes its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end token."""
    prompt_tokens: int
    finish_reason: FinishReason
    """"stop": the model ended the answer, or a stop string did. "length": it was cut at max_new_tokens."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One a token of `token_ids`, where they were asked for."""


class Student:
    """A finished model with its tokenizer. Calls do not change it, so threads may share one."""

    def __init__(self, model: MiniCodformerForConditionalGeneration, tokenizer: ChatTokenizer) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path | str | None = None, *, device: str | None = None) -> Student:
        """Read a model folder, by default the newest `runs/*/final_model` below the working directory.

        It goes onto `device`, by default the GPU if there is one. Raises StageError where the folder is missing,
        damaged, or not a student.
        """
        folder = newest_model() if path is None else Path(path)
        model = load_model(folder)
        tokenizer = ChatTokenizer.load(folder, thinking=read_thinking(folder))
        if tokenizer.vocab_size > model.config.vocab_size:
            raise StageError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
                hint="the tokenizer files are another model's: export the student again",
            )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if model.device.type == "cpu":
            expect_few_rows(model)
        return cls(model, tokenizer)

    def generate(self, prompts: str | Sequence[str], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Answer each prompt, one user message each, in order. Raises ValueError for options that mean nothing."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.generate_from_ids([self.prompt_ids(text) for text in texts], **options)

    def chat(self, messages: Sequence[Message], **options: Unpack[SamplingOptions]) -> Generation:
        """The next turn of a conversation. Raises ValueError, also for turns that the chat template does not take."""
        (generation,) = self.generate_from_ids([self.prompt_ids(messages)], **options)
        return generation

    def stream(self, prompt: str | Sequence[Message], **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """The answer in pieces of whole characters, as they come. Closing the iterator ends the work."""
        pieces = self.stream_pieces(prompt, **options)
        return (piece.text for piece in pieces if piece.text)

    def stream_pieces(self, prompt: str | Sequence[Message], **options: Unpack[SamplingOptions]) -> Iterator[Piece]:
        """What each token brings: text, log-probabilities where asked for, and in the end the reason of the end."""
        answer = self.answer(self.prompt_ids(prompt), Sampling(**options))
        return self._written_alone(answer)

    def generate_from_ids(
        self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]
    ) -> list[Generation]:
        """Answer prompts that are token ids already, chat template included. Raises ValueError."""
        drawn = Sampling(**options)
        for index, prompt in enumerate(prompts):
            self.require_ids(prompt, f"prompt {index}")
        answers = [self.answer(prompt, drawn.of_answer(index)) for index, prompt in enumerate(prompts)]
        batch = self._batch()
        waiting = deque(answers)
        while waiting or len(batch):
            batch.join([waiting.popleft() for _ in range(min(BATCH - len(batch), len(waiting)))])
            batch.step()
        return [_generation(answer) for answer in answers]

    def answer(self, prompt_ids: Sequence[int], drawn: Sampling) -> Answer:
        """An answer with nothing written yet, for a batch or a scheduler to write."""
        return Answer(prompt_ids, drawn, self.decode, self.model.config.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without the special tokens."""
        return self._tokenizer.decode(ids)

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a conversation under the chat template; a text is one user message. Raises ValueError."""
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        try:
            (ids,) = self._tokenizer.encode_prompts([messages])
        except RefusedByTemplate as error:
            raise ValueError(f"the chat template refuses this prompt: {error}") from error
        listed: list[int] = ids.tolist()
        return listed

    def require_ids(self, prompt: Sequence[int], name: str) -> None:
        """Raises ValueError where the ids are no prompt."""
        if not prompt:
            raise ValueError(f"{name} is empty")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise ValueError(f"{name} holds an id outside the vocabulary")

    def _batch(self) -> DecodeBatch:
        return DecodeBatch(self.model, PromptCache(self.model))

    def _written_alone(self, answer: Answer) -> Iterator[Piece]:
        batch = self._batch()
        batch.join([answer])
        while len(batch):
            for _, piece in batch.step():
                yield piece


def _generation(answer: Answer) -> Generation:
    assert answer.finish_reason is not None
    return Generation(
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        prompt_tokens=len(answer.prompt_ids),
        finish_reason=answer.finish_reason,
        logprobs=None if answer.sampling.logprobs is None else tuple(answer.logprobs),
    )
