"""What stands before the application: who may ask, how much they may send, and headers that every answer carries."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.inference.server.errors import error_response
from stages.inference.server.settings import ServerSettings

_OPEN = {"/", "/runs", "/health", "/ready", "/openapi.json"}
"""Paths that need no key, with all below /web/: they tell nothing that the sources do not."""
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_FOREIGN_NAME = (
    "without a key this server answers to the name localhost only: to be reached by another one, through a proxy too, "
    "start it with --api-key, or with --host and the address that others know"
)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
NO_ROUTE = "other"
"""What is counted where a request reached no route: there is none, or it was refused before."""
_CLOSE = {"connection": "close"}
"""Where a body is not read to its end, no other request can follow it."""


class Guard:
    """Wraps the application; `count` hears the path of the route and the status of each response."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count
        self._largest = settings.max_body_bytes
        self._too_large = f"the body is larger than {self._largest:,} bytes"
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        # A page on the internet can point a name of its own at 127.0.0.1 and read, through its visitor's browser, what
        # answers there (DNS rebinding). Where no key keeps it out, the name in the request gives it away.
        self._local_only = settings.only_this_machine and settings.api_key is None
        self._local_names = {*_LOCAL_NAMES, settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                self._count(getattr(scope.get("route"), "path", NO_ROUTE), message["status"])
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, self._bounded(receive), sending)
        else:
            await refusal(scope, receive, sending)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self._local_only and _name(headers.get("host", "").lower()) not in self._local_names:
            return error_response(421, _FOREIGN_NAME)
        if self._key is not None and path not in _OPEN and not path.startswith("/web/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key)
            if scheme.lower() != "bearer" or not same:
                message = "give the server's API key: Authorization: Bearer KEY"
                return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._largest:
            return error_response(413, self._too_large, headers=_CLOSE)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """What is received, as long as it is not more than was allowed."""
        taken = 0

        async def receiving() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._largest:
                raise HTTPException(413, self._too_large, headers=_CLOSE)
            return message

        return receiving


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _digest(key: bytes) -> bytes:
    """Of fixed length, so that a comparison takes the same time whatever was given."""
    return hashlib.sha256(key).digest()
