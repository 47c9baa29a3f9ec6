"""What the server promises to whoever sends it requests (S2, S3); of what is none, see test_malformed.py."""

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

from stages.errors import StageError
from stages.inference.generate import Student
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings
from tests.inference.server.refusals import assert_refused

MODEL = "learnt-3.answers"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": MODEL, "prompt": "count", "temperature": 0}
LONG = {**ASKED, "max_tokens": 10**7}


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
