"""A server as a process: it listens, says so, and on SIGTERM or Ctrl-C lets the answers under way finish."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from stages.errors import StageError
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.pages import Runs
from stages.inference.server.settings import ServerSettings

_BACKLOG = 2048


def serve(
    models: Sequence[ServedModel], settings: ServerSettings, runs: Runs | None, on_listening: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; `on_listening` hears the address. Raises StageError where it cannot listen."""
    with _listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            create_app(models, settings, runs),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        )
        on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        with _signals_end_quietly():
            uvicorn.Server(config).run(sockets=[listener])


def _listening(settings: ServerSettings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a host"
        of_port = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        hint = "choose another one with --port" if of_port else "name an address of this machine with --host"
        raise StageError(f"cannot listen on {settings.host}:{settings.port}: {reason}", hint=hint) from error


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when all is done: that is no error to us."""

    def ignore(*_: object) -> None:
        pass

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
