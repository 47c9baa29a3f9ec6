"""The runs that whoever starts the server lets it show."""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter, Response

from stages.inference.server.errors import Refusal

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
    """The data of the runs."""
    router = APIRouter(include_in_schema=False)

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
