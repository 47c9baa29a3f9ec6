"""Answers in OpenAI's forms, whole and as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from pydantic import BaseModel

from stages.inference.answer import Answer, Piece, TokenLogprob
from stages.inference.transcript import FinishReason

DONE = b"data: [DONE]\n\n"
_INCOMPLETE = "�"


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    """None for a token that is only part of a character."""


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]
    """Where each token begins in the tokens' texts joined."""


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Of a stream, each chunk is one too."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Heading(TypedDict):
    """What every part of one response repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(slots=True)
class ChatForm:
    """Answers as chat completions."""

    heading: Heading

    def whole(self, answers: Sequence[Answer], spent: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(content=answer.text),
                logprobs=None if answer.sampling.logprobs is None else _chat_logprobs(answer.logprobs),
                finish_reason=_ended(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.heading, choices=choices, usage=spent)

    def opening(self, count: int) -> BaseModel | None:
        """The first chunk of a stream of `count` answers."""
        said = Delta(role="assistant", content="")
        return ChatChunk(**self.heading, choices=[ChatChunkChoice(index=i, delta=said) for i in range(count)])

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=piece.text or None) if piece.finish_reason else Delta(content=piece.text),
            logprobs=_chat_logprobs(piece.tokens) if piece.tokens else None,
            finish_reason=piece.finish_reason,
        )
        return ChatChunk(**self.heading, choices=[choice])

    def closing(self, spent: Usage) -> BaseModel:
        """The chunk of a stream that says what it has cost."""
        return ChatChunk(**self.heading, choices=[], usage=spent)


@dataclass(slots=True)
class CompletionForm:
    """Answers as completions."""

    heading: Heading

    def whole(self, answers: Sequence[Answer], spent: Usage) -> BaseModel:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=None if answer.sampling.logprobs is None else _completion_logprobs(answer.logprobs),
                finish_reason=_ended(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self.heading, choices=choices, usage=spent)

    def opening(self, _: int) -> BaseModel | None:
        return None

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        logprobs = _completion_logprobs(piece.tokens) if piece.tokens else None
        choice = CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)
        return Completion(**self.heading, choices=[choice])

    def closing(self, spent: Usage) -> BaseModel:
        return Completion(**self.heading, choices=[], usage=spent)


Form = ChatForm | CompletionForm


def event(part: BaseModel) -> bytes:
    """One server-sent event."""
    return b"data: " + part.model_dump_json().encode() + b"\n\n"


def _ended(answer: Answer) -> FinishReason:
    assert answer.finish_reason is not None
    return answer.finish_reason


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=_bytes(token),
                top_logprobs=[TopLogprob(token=t.text, logprob=t.logprob, bytes=_bytes(t)) for t in token.top],
            )
            for token in tokens
        ]
    )


def _completion_logprobs(tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
    has_top = any(token.top for token in tokens)
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{t.text: t.logprob for t in reversed(token.top)} for token in tokens] if has_top else None,
        text_offset=[token.offset for token in tokens],
    )


def _bytes(token: TokenLogprob) -> list[int] | None:
    return None if _INCOMPLETE in token.text else list(token.text.encode())
