"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_LONGEST = 500


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})


def error_document(status: int, message: str, param: str | None = None, code: str | None = None) -> str:
    """ASCII JSON, because a message may quote what is no valid Unicode."""
    match status:
        case 401:
            kind = "authentication_error"
        case 429:
            kind = "rate_limit_error"
        case _ if status >= 500:
            kind = "server_error"
        case _:
            kind = "invalid_request_error"
    message = message if len(message) <= _LONGEST else message[:_LONGEST] + " …"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    document = error_document(status, message, param, code)
    return Response(document, status, headers=headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Let every error of the application leave it in this shape."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return error_response(
            refusal.status, str(refusal), param=refusal.param, code=refusal.code, headers=refusal.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        param, message = _first(error)
        return error_response(400, message, param=param)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        # What it was stands in the log; the caller can do nothing with it.
        return error_response(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase)


def _first(error: RequestValidationError) -> tuple[str | None, str]:
    """Parameter and message of the first thing that is wrong with a body."""
    first: Mapping[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return None, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    place = [part for part in first["loc"][1:] if isinstance(part, int) or _FIELD.fullmatch(part)]
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "value_error" and not place:
        return None, message
    if not place:
        return None, "the body must be a JSON object, sent as application/json"
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    if first["type"] == "extra_forbidden":
        return name, f"this server knows no field `{name}`"
    return name, f"`{name}`: {message}"


_FIELD = re.compile(r"(?!(?:str|int|float|bool|none)$)[^A-Z\[]*")
"""Names of fields, not of the types that pydantic tries in turn."""
