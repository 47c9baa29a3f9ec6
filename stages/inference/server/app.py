"""The application: OpenAI's routes, what an operator asks of a server, and the pages for people."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import psutil
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.types import ASGIApp

from stages.inference.server import errors
from stages.inference.server.errors import Refusal
from stages.inference.server.guard import Guard
from stages.inference.server.models import ServedModel
from stages.inference.server.openai_routes import openai_routes, refusals
from stages.inference.server.pages import NoRuns, Runs, page_routes
from stages.inference.server.service import Service
from stages.inference.server.settings import ServerSettings
from stages.inference.server.ticket import shutting_down


class Alive(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"


def create_app(models: Sequence[ServedModel], settings: ServerSettings, runs: Runs | None = None) -> ASGIApp:
    """A server of these models, which needs an ASGI server that runs its lifespan."""
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop().call_soon_threadsafe)
        yield
        await service.close()

    # The documentation pages that FastAPI brings load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="MiniCodformer", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    app.include_router(openai_routes(service))
    app.include_router(page_routes(runs or NoRuns()))
    _operator_routes(app, service)
    _state_our_own_errors(app)
    return Guard(app, settings, service.metrics.count)


def _state_our_own_errors(app: FastAPI) -> None:
    """Take out of the schema the 422 that FastAPI would send and this server never does: its own is a 400."""
    schema = app.openapi()
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _operator_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=refusals(500))
    async def health() -> Alive:
        """Whether the server works at all."""
        if not all(scheduler.alive for scheduler in service.schedulers.values()):
            raise Refusal(500, "a decoding thread has ended")
        return Alive()

    @app.get("/ready", responses=refusals(503))
    async def ready() -> Ready:
        """Whether the server takes requests."""
        if not all(scheduler.taking for scheduler in service.schedulers.values()):
            raise shutting_down()
        return Ready()

    @app.get("/metrics", responses={**refusals(401), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/api/status", include_in_schema=False)
    async def status() -> dict[str, Any]:
        """What the page shows of the server."""
        return {
            "models": {name: dataclasses.asdict(scheduler.load()) for name, scheduler in service.schedulers.items()},
            "slots": service.settings.slots,
            "max_new_tokens": service.settings.max_new_tokens,
            "memory": psutil.Process().memory_info().rss,
        }
