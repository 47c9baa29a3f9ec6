"""What the server promises to whoever sends it anything (S1, S2, S3)."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from stages.errors import StageError
from stages.inference.generate import Student
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.requests import ChatRequest, CompletionRequest
from stages.inference.server.settings import ServerSettings
from tests.inference.server.refusals import assert_refused

MODEL = "learnt-3.answers"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": MODEL, "prompt": "count", "temperature": 0}
LONG = {**ASKED, "max_tokens": 10**7}


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


def test_an_error_of_our_own_says_nothing_of_its_inside(
    served: ServedModel, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    with serve(create_app([served], ServerSettings())) as address:
        with monkeypatch.context() as broken:
            broken.setattr(served.student.model, "output_hidden", fail)
            error = assert_refused(httpx.post(address + COMPLETIONS, json=ASKED), 500)
            streamed = httpx.post(address + COMPLETIONS, json={**ASKED, "stream": True}).text
        assert error["message"] == "Internal Server Error"
        assert json.loads(streamed.strip().removeprefix("data: "))["error"]["type"] == "server_error"
        assert "secret" not in streamed
        assert httpx.post(address + COMPLETIONS, json=ASKED).json()["choices"][0]["text"] == "one two three four"


def running(address: str) -> float:
    return metric(address, 'minicodformer_running{model="learnt-3.answers"}')


def metric(address: str, name: str) -> float:
    lines = httpx.get(address + "/metrics").text.splitlines()
    return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")), "nan"))


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@contextlib.contextmanager
def asking(address: str, body: dict[str, Any], receive_buffer: int = 1 << 16) -> Iterator[None]:
    """A caller who has asked, reads nothing, and hangs up in the end."""
    host, _, port = address.removeprefix("http://").partition(":")
    sent = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        caller.connect((host, int(port)))
        caller.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        yield


@pytest.fixture
def endless(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Answers do not end by themselves, until the fixture is called."""
    with monkeypatch.context() as patched:
        patched.setattr(served.student.model.config, "eos_token_id", -1)
        yield patched.undo


def test_S2_a_full_queue_says_when_to_come_again_and_takes_requests_afterwards(
    served: ServedModel, serve: Any, endless: Callable[[], None]
) -> None:
    settings = ServerSettings(slots=1, queue=1, max_new_tokens=10**7)
    with serve(create_app([served], settings)) as address:
        with asking(address, LONG), asking(address, LONG):
            waiting = 'minicodformer_waiting{model="learnt-3.answers"}'
            eventually(lambda: running(address) == 1 and metric(address, waiting) == 1)
            for body in (ASKED, {**ASKED, "stream": True}):
                full = httpx.post(address + COMPLETIONS, json=body)
                assert assert_refused(full, 429)["type"] == "rate_limit_error"
                assert int(full.headers["retry-after"]) >= 1
        eventually(lambda: running(address) == 0)
        endless()
        assert httpx.post(address + COMPLETIONS, json=ASKED).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_S2_a_caller_who_leaves_frees_its_slot(
    served: ServedModel, serve: Any, endless: Callable[[], None], stream: bool
) -> None:
    settings = ServerSettings(slots=1, queue=0, max_new_tokens=10**7)
    with serve(create_app([served], settings)) as address:
        with asking(address, {**LONG, "stream": stream}):
            eventually(lambda: running(address) == 1)
            assert_refused(httpx.post(address + COMPLETIONS, json=ASKED), 429)
        eventually(lambda: running(address) == 0)
        endless()
        assert httpx.post(address + COMPLETIONS, json=ASKED).json()["choices"][0]["text"] == "one two three four"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("patience", [60.0, 0.1])
def test_S2_answers_that_are_not_read_keep_their_places_for_a_while(
    served: ServedModel, serve: Any, endless: Callable[[], None], stream: bool, patience: float
) -> None:
    body = {**LONG, "max_tokens": 64, "n": 8, "logprobs": 20, "stream": stream}
    untaken, generated = (f'minicodformer_{what}{{model="{MODEL}"}}' for what in ("untaken", "generated_tokens_total"))
    settings = ServerSettings(slots=8, queue=0, unread_seconds=patience)
    small, app = 1 << 12, create_app([served], settings)
    with serve(app, send_buffer=small) as address, asking(address, body, receive_buffer=small):
        eventually(lambda: metric(address, generated) > 0)
        if patience == 60:
            eventually(lambda: metric(address, untaken) == 8)
            assert_refused(httpx.post(address + COMPLETIONS, json=ASKED), 429)
        else:
            # In this order: what has ended is untaken until it is let go.
            eventually(lambda: running(address) == metric(address, untaken) == 0)
            endless()
            assert httpx.post(address + COMPLETIONS, json=ASKED).status_code == 200


@pytest.mark.usefixtures("endless")
def test_S2_a_full_server_reads_no_prompt(served: ServedModel, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the prompt was read")

    monkeypatch.setattr(Student, "prompt_ids", fail)
    settings = ServerSettings(slots=1, queue=0, max_new_tokens=10**7)
    with serve(create_app([served], settings)) as address, asking(address, {**LONG, "prompt": [5]}):
        eventually(lambda: running(address) == 1)
        assert_refused(httpx.post(address + COMPLETIONS, json=ASKED), 429)
        assert_refused(httpx.post(address + COMPLETIONS, json={**ASKED, "n": 2}), 400)


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


@pytest.mark.parametrize("name", ["../learnt-3.answers", "/etc", "Upper", "a b", "", "é", "a/b"])
def test_S3_a_name_that_leads_anywhere_is_none(student_folder: Path, address: str, name: str) -> None:
    with pytest.raises(StageError, match="cannot name a served model"):
        ServedModel.load(name, student_folder)
    if name:
        assert_refused(httpx.post(address + COMPLETIONS, json={**ASKED, "model": name}), 404)


def test_S3_a_path_in_a_request_opens_nothing(address: str, student_folder: Path) -> None:
    for name in (str(student_folder), f"../{student_folder.name}", "config.json"):
        assert_refused(httpx.post(address + COMPLETIONS, json={**ASKED, "model": name}), 404)
    for path in (
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/web/..%2f..%2fsettings.py",
        "/api/runs/..%2f..",
        "/web/../app.py",
    ):
        assert_refused(httpx.get(address + path), 404)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"queue": -1},
        {"port": 70_000},
        {"drain_seconds": float("nan")},
        {"unread_seconds": 0.0},
        {"api_key": ""},
        {"api_key": "é"},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("api_key", "API key")):
        ServerSettings(**wrong)


def test_metrics_count_what_happened(served: ServedModel, serve: Any) -> None:
    with serve(create_app([served], ServerSettings())) as address:
        for _ in range(3):
            httpx.post(address + COMPLETIONS, json=ASKED)
        httpx.get(address + "/no/such/path")
        label = '{model="learnt-3.answers"}'
        (expected,) = served.student.generate("count")
        assert metric(address, f"minicodformer_prompt_hits_total{label}") == 2
        assert metric(address, f"minicodformer_prompt_misses_total{label}") == 1
        assert metric(address, f"minicodformer_prompt_tokens_total{label}") == 3 * expected.prompt_tokens
        written = len(expected.token_ids) + 1  # the end token is written too
        assert metric(address, f"minicodformer_generated_tokens_total{label}") == 3 * written
        assert metric(address, f"minicodformer_first_token_seconds_count{label}") == 3
        assert metric(address, 'minicodformer_responses_total{path="/v1/completions",status="200"}') == 3
        assert metric(address, 'minicodformer_responses_total{path="other",status="404"}') == 1
        httpx.get(address + "/v1/models/no-such-model")
        assert metric(address, 'minicodformer_responses_total{path="/v1/models/{model}",status="404"}') == 1
        assert metric(address, "process_resident_memory_bytes") > 1e6
        status = httpx.get(address + "/api/status").json()
        assert status["models"]["learnt-3.answers"]["generated_tokens"] == 3 * written


def test_many_callers_who_come_and_go_leave_nothing_behind(address: str) -> None:
    """Some read to the end, some leave at once, some after a moment; afterwards all slots are free."""

    def call(number: int) -> None:
        body = {
            **ASKED,
            "prompt": [5 + number % 7] * (number % 40 + 1),
            "max_tokens": 40,
            "temperature": 1,
            "stream": True,
        }
        with httpx.stream("POST", address + COMPLETIONS, json=body, timeout=60) as response:
            if response.status_code == 429:
                return
            for read, _ in enumerate(response.iter_raw()):
                if number % 3 and read == number % 5:
                    break

    threads = [threading.Thread(target=call, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: running(address) == 0)
