"""OpenAI's routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from stages.inference.server.delivery import Delivery, slices
from stages.inference.server.errors import ErrorBody, Refusal, error_document
from stages.inference.server.models import ServedModel
from stages.inference.server.requests import ChatRequest, CompletionRequest
from stages.inference.server.responses import (
    DONE,
    ChatCompletion,
    ChatForm,
    Completion,
    CompletionForm,
    Form,
    Heading,
    event,
    usage,
)
from stages.inference.server.service import Service
from stages.inference.server.ticket import Ticket

NOBODY_LISTENS = 499
"""What is counted for a request whose caller has left; nobody receives it."""

_log = logging.getLogger(__name__)


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["minicodformer"] = "minicodformer"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models", responses=refusals(401))
    async def list_models() -> ModelList:
        return ModelList(data=[_card(model) for model in service.models.values()])

    @router.get("/models/{model}", responses=refusals(401, 404))
    async def get_model(model: str) -> ModelCard:
        return _card(service.find(model))

    answers = refusals(400, 401, 404, 413, 429, 503)
    data = {"type": "string", "description": "A chunk as JSON, an error as JSON, or in the end [DONE]."}
    events = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    streamed = {"text/event-stream": {"itemSchema": events}}

    @router.post("/completions", responses={**answers, 200: {"model": Completion, "content": streamed}})
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model = service.find(body.model)
        return await _answer(service, model, body, CompletionForm(_heading("cmpl", model)), request)

    @router.post("/chat/completions", responses={**answers, 200: {"model": ChatCompletion, "content": streamed}})
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = service.find(body.model)
        return await _answer(service, model, body, ChatForm(_heading("chatcmpl", model)), request)

    return router


async def _answer(
    service: Service, model: ServedModel, body: CompletionRequest | ChatRequest, form: Form, request: Request
) -> Response:
    drawn, count, asked = body.sampling(service.settings.max_new_tokens), body.n or 1, body.prompts()
    service.require_room(model, drawn, count * len(asked), body.length_field)
    prompts = await service.encode(model, asked, body.prompt_field)
    ticket = service.submit(model, prompts, drawn, count)
    prompt_tokens, patience = sum(map(len, prompts)), service.settings.unread_seconds
    headers = {"x-ignored-fields": ", ".join(ignored)} if (ignored := body.ignored()) else {}
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        chunks = _chunks(form, ticket, prompt_tokens if with_usage else None)
        return Delivery(chunks, ticket, patience, "text/event-stream", {**headers, "cache-control": "no-store"})
    with contextlib.ExitStack() as leaving:
        leaving.callback(ticket.cancel)
        if not await _finished(ticket, request):
            return Response(status_code=NOBODY_LISTENS)
        spent = usage(prompt_tokens, ticket.completion_tokens)
        whole = form.whole(ticket.answers, spent).model_dump_json().encode()
        leaving.pop_all()  # from here on the delivery holds the ticket
    headers["content-length"] = str(len(whole))
    return Delivery(slices(whole), ticket, patience, "application/json", headers)


async def _finished(ticket: Ticket, request: Request) -> bool:
    """Wait for the answers; false where the caller leaves before. Raises what `Ticket.pieces` raises."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    finishing, leaving = asyncio.ensure_future(ticket.finish()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({finishing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if finishing.done():
            finishing.result()
        return finishing.done()
    finally:
        finishing.cancel()
        leaving.cancel()


async def _chunks(form: Form, ticket: Ticket, prompt_tokens: int | None) -> AsyncIterator[bytes]:
    """The events of a stream; the last but one says what it has cost, where `prompt_tokens` are told."""
    try:
        if (opening := form.opening(len(ticket.answers))) is not None:
            yield event(opening)
        async for index, piece in ticket.pieces():
            if piece.text or piece.tokens or piece.finish_reason:
                yield event(form.chunk(index, piece))
        if prompt_tokens is not None:
            yield event(form.closing(usage(prompt_tokens, ticket.completion_tokens)))
        yield DONE
    except Refusal as refusal:
        yield b"data: " + error_document(refusal.status, str(refusal), code=refusal.code).encode() + b"\n\n"
    except Exception:  # the status is sent already: an event is the only way to tell the caller
        _log.exception("an answer failed while it was streamed")
        yield b"data: " + error_document(500, "Internal Server Error").encode() + b"\n\n"


def _heading(kind: str, model: ServedModel) -> Heading:
    return Heading(
        id=f"{kind}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created)
