"""A real server on loopback, in a thread of the test's process, with the student that has learnt three answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from stages.inference.generate import Student
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings

Serve = Callable[[ASGIApp], AbstractContextManager[str]]


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of the application while it is served."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve() -> Serve:
    return serving


@pytest.fixture(scope="session")
def served(student_folder: Path) -> ServedModel:
    return ServedModel.load("learnt-3.answers", student_folder)


@pytest.fixture(scope="session")
def student(served: ServedModel) -> Student:
    return served.student


@pytest.fixture(scope="session")
def address(served: ServedModel) -> Iterator[str]:
    settings = ServerSettings(slots=8, queue=32, max_prompt_tokens=200, max_new_tokens=64, max_body_bytes=1 << 16)
    with serving(create_app([served], settings)) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
