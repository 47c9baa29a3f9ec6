"""The pages for people: files of this package, and the runs that whoever starts the server lets it show."""

from __future__ import annotations

from importlib.resources import files
from typing import Protocol

from fastapi import APIRouter, Response

from stages.inference.server.errors import Refusal

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "png": "image/png",
}
_JSON = "application/json"


class Runs(Protocol):
    """Where the data of /runs comes from; called from any thread."""

    def list_json(self) -> str:
        """A JSON array of runs, each with its `name`."""
        ...

    def view_json(self, name: str) -> str | None:
        """One run as JSON; None where no run of the list has that name."""
        ...


class NoRuns:
    """For a server that shows none."""

    def list_json(self) -> str:
        return "[]"

    def view_json(self, name: str) -> str | None:  # noqa: ARG002
        return None


def page_routes(runs: Runs) -> APIRouter:
    """The files are read once, here: no request names a path of this machine."""
    router = APIRouter(include_in_schema=False)
    kept = {
        entry.name: (entry.read_bytes(), _TYPES[entry.name.rpartition(".")[2]])
        for entry in (files("stages.inference") / "web").iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    }

    def page(name: str) -> Response:
        if name not in kept:
            raise Refusal(404, "there is no such file here")
        content, media_type = kept[name]
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    @router.get("/")
    async def chat() -> Response:
        return page("chat.html")

    @router.get("/runs")
    async def all_runs() -> Response:
        return page("runs.html")

    @router.get("/web/{name}")
    async def file(name: str) -> Response:
        return page(name)

    # Not async: reading logs takes a while, and a thread of the pool can wait for it.
    @router.get("/api/runs")
    def list_runs() -> Response:
        return Response(runs.list_json(), media_type=_JSON)

    @router.get("/api/runs/{name}")
    def view_run(name: str) -> Response:
        view = runs.view_json(name)
        if view is None:
            raise Refusal(404, f"there is no run {name!r}")
        return Response(view, media_type=_JSON)

    return router
