"""What is no request, or one that cannot be granted, is refused (S1)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from stages.inference.server.requests import ChatRequest, CompletionRequest
from tests.inference.server.refusals import assert_refused

MODEL = "learnt-3.answers"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": MODEL, "prompt": "count", "temperature": 0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"model": "learnt-3.answers", "prompt": "\\ud800"}',
        b'{"model": "learnt-3.answers", "prompt": "count", "\\ud800": 1}',
        b'{"model": "learnt-3.answers", "prompt": "count", "temperature": NaN}',
        b'{"model": "learnt-3.answers", "prompt": "count", "top_p": -Infinity}',
        b'{"model": "learnt-3.answers", "prompt": "count", "seed": ' + b"9" * 5_000 + b"}",
        b'{"model": "learnt-3.answers", "prompt": "count", "user": ' + b"[" * 30_000 + b"}",
    ],
    ids=lambda body: repr(body[:60]),
)
def test_S1_what_is_no_request_is_refused(address: str, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS):
        assert_refused(httpx.post(address + path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", ["a", [1]]),
        ("prompt", [-1]),
        ("prompt", [10_000_000]),
        ("prompt", [2**70]),
        ("prompt", 3),
        ("temperature", "0.5"),
        ("temperature", -0.1),
        ("temperature", 1e400),
        ("top_p", 0),
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 1),
        ("seed", 0.5),
        ("logprobs", 21),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("echo", True),
        ("best_of", 3),
        ("suffix", "x"),
        ("model", ""),
        ("model", None),
    ],
)
def test_S1_a_value_that_means_nothing_is_refused_by_name(address: str, field: str, value: Any) -> None:
    sent = json.dumps({**ASKED, field: value}).replace("Infinity", "1e400")
    error = assert_refused(
        httpx.post(address + COMPLETIONS, content=sent, headers={"content-type": "application/json"})
    )
    assert field in error["message"] or error["param"] == field


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {},
        [{}],
        [{"role": "user"}],
        [{"role": "king", "content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        [{"role": "user", "content": "a", "name": "b"}],
    ],
)
def test_S1_messages_that_are_none_are_refused(address: str, messages: Any) -> None:
    error = assert_refused(httpx.post(address + CHAT, json={"model": MODEL, "messages": messages}))
    assert (error["param"] or "").startswith("messages")


@pytest.mark.parametrize("fields", [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens", "max_tokens"]])
def test_S1_an_answer_beyond_the_limit_is_refused_by_the_field_that_asked_for_it(
    address: str, fields: list[str]
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "count"}], **dict.fromkeys(fields, 65)}
    error = assert_refused(httpx.post(address + CHAT, json=body))
    assert error["param"] == fields[0]
    assert error["message"] == f"`{fields[0]}`: an answer has at most 64 tokens here"


def test_S1_a_prompt_beyond_the_limit_is_refused_with_its_length(address: str) -> None:
    error = assert_refused(httpx.post(address + COMPLETIONS, json={**ASKED, "prompt": [5] * 201}))
    assert error["code"] == "context_length_exceeded"
    assert "201 tokens; this server takes 200" in error["message"]
    assert httpx.post(address + COMPLETIONS, json={**ASKED, "prompt": [5] * 200, "max_tokens": 1}).status_code == 200


def test_S1_a_body_beyond_the_limit_is_refused_declared_or_not(address: str) -> None:
    large = b'{"model": "' + b"x" * (1 << 16) + b'"}'
    headers = {"content-type": "application/json"}
    assert_refused(httpx.post(address + CHAT, content=large, headers=headers), 413)
    parts = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert_refused(httpx.post(address + CHAT, content=parts, headers=headers), 413)


def test_S1_other_paths_and_methods_are_refused_in_the_same_shape(address: str) -> None:
    assert_refused(httpx.get(address + "/v1/nothing"), 404)
    assert_refused(httpx.get(address + CHAT), 405)
    assert_refused(httpx.post(address + CHAT, data={"model": MODEL}), 400)
    text_plain = httpx.post(address + CHAT, content=json.dumps(ASKED), headers={"content-type": "text/plain"})
    assert_refused(text_plain, 400)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (ChatRequest, {"messages": [{}] * 5_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 5_000}]}),
        (ChatRequest, {"messages": [dict.fromkeys(map(str, range(5_000)))]}),
        (ChatRequest, {"modalities": ["song"] * 5_000}),
        (ChatRequest, dict.fromkeys(map(str, range(5_000)))),
        (CompletionRequest, {"prompt": [None] * 5_000}),
        (CompletionRequest, {"prompt": [[None] * 5_000]}),
    ],
)
def test_S1_a_body_of_many_errors_is_as_cheap_as_one_of_few(kind: type[BaseModel], changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": MODEL, **changes})
    assert refused.value.error_count() < 20
