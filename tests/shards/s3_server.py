"""A real S3 server on loopback that can be told to refuse its n-th request: `python s3_server.py` prints its port.

A process of its own, as what it imports must not be found in a process that loads models: vLLM looks through every
module there is. `POST /-/refuse?at=N` counts from there (no `at`: refuses nothing), `GET /-/requests` lists since then.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_REFUSAL = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>not today</Message></Error>'


class Server:
    """The application."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._refused: int | None = None
        self._requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/-/"):
            start_response("200 OK", [("Content-Type", "application/json")])
            return [self._controlled(path, environ.get("QUERY_STRING", ""))]
        with self._lock:
            refused = len(self._requests) == self._refused
            self._requests.append(f"{environ['REQUEST_METHOD']} {path}")
        if refused:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            # 403 is final for the client; anything from 500 it would try again for long.
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [_REFUSAL]
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def _controlled(self, path: str, query: str) -> bytes:
        with self._lock:
            if path == "/-/refuse":
                self._refused = int(query.removeprefix("at=")) if query else None
                self._requests.clear()
            return json.dumps(self._requests).encode()


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Server(), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
