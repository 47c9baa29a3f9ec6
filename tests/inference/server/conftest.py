"""A real server on loopback, in a thread of the test's process, with the student that has learnt three answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from stages.inference.generate import Student
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings


@pytest.fixture(scope="session")
def served(student_folder: Path) -> ServedModel:
    return ServedModel.load("learnt-3.answers", student_folder)


@pytest.fixture(scope="session")
def student(served: ServedModel) -> Student:
    return served.student


@pytest.fixture(scope="session")
def address(served: ServedModel, serve: Any) -> Iterator[str]:
    settings = ServerSettings(slots=8, queue=32, max_prompt_tokens=200, max_new_tokens=64, max_body_bytes=1 << 16)
    with serve(create_app([served], settings)) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
