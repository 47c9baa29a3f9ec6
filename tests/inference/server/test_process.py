"""`cli.py serve` as a process of its own: what it says, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.errors import PipelineError
from pipeline.serving import serve
from stages.errors import StageError

ROOT = Path(__file__).resolve().parents[3]
WORK = {"prompt": [7, 8, 9], "n": 40, "max_tokens": 150, "temperature": 1.5, "seed": 1, "stream": True}
"""With one slot, 40 answers after one another: a second or two."""


@contextlib.contextmanager
def process(folder: Path, *options: str, home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", *options, "--port", "0", f"m={folder}"]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"serving m at (http://\S+) ", line)
            assert found, (line, server.stderr and server.stderr.read())
            yield server, found[1]
        finally:
            server.kill()


def test_S2_asked_to_stop_it_finishes_what_it_has_begun_and_takes_no_more(student_folder: Path, tmp_path: Path) -> None:
    with process(student_folder, "--slots", "1", "--drain-seconds", "300", home=tmp_path) as (server, address):
        assert httpx.get(f"{address}/ready").json() == {"status": "ready"}
        with httpx.stream("POST", f"{address}/v1/completions", json={"model": "m", **WORK}, timeout=60) as response:
            lines = response.iter_lines()
            chunks = [next(lines)]
            server.send_signal(signal.SIGTERM)
            chunks += [line for line in lines if line]
        assert chunks[-1] == "data: [DONE]"
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in chunks[:-1] if line]
        assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == list(range(40))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/ready")
        assert server.wait(30) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""


def test_S2_a_drain_has_an_end(student_folder: Path, tmp_path: Path) -> None:
    options = ("--slots", "1", "--drain-seconds", "1", "--max-new-tokens", "1000000")
    body = {"model": "m", **WORK, "max_tokens": 1_000_000, "n": 64}
    with process(student_folder, *options, home=tmp_path) as (server, address):
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in list(lines)
        assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (["no-such-run"], {}, "no run 'no-such-run'"),
        (["UPPER={folder}"], {}, "'UPPER' cannot name a served model"),
        (["m={folder}", "m={folder}"], {}, "two models are called 'm'"),
        (["m={folder}"], {"port": 70_000}, "port must lie in"),
        (["m=absent"], {}, "no model in absent"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_listens(
    student_folder: Path, models: list[str], options: dict[str, Any], said: str
) -> None:
    lines: list[str] = []
    with pytest.raises((PipelineError, StageError), match=said):
        serve([model.format(folder=student_folder) for model in models], lines.append, **options)
    assert lines == []


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a..b"])  # the second is another machine's
def test_an_address_that_is_not_here_is_refused_with_a_hint_at_the_host(student_folder: Path, host: str) -> None:
    with pytest.raises(StageError, match=f"cannot listen on {host}") as refused:
        serve([f"m={student_folder}"], pytest.fail, host=host)
    assert refused.value.hint == "name an address of this machine with --host"


def test_a_port_that_is_taken_is_refused_with_a_hint_at_the_port(student_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"cannot listen on 127.0.0.1:{port}") as refused:
            serve([f"m={student_folder}"], pytest.fail, port=port)
    assert refused.value.hint == "choose another one with --port"
