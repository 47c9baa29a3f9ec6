"""Which students a server offers and under what names, and the runs that its page shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.json_output import json_text
from pipeline.monitor import Watcher
from pipeline.run import RUNS, RunFolder
from pipeline.runs import finished_run, list_runs
from pipeline.steps import silence_loading_bars


def serve(models: Sequence[str], say: Callable[[str], None], **options: Any) -> None:
    """Serve students until SIGTERM or Ctrl-C.

    A model is a run's name or folder, or NAME=FOLDER; without any, the newest finished run. `options` are the fields of
    `ServerSettings`. Raises UsageError, PipelineError and StageError before anything listens.
    """
    from stages.inference.server.models import ServedModel
    from stages.inference.server.process import serve as serve_process
    from stages.inference.server.settings import ServerSettings

    try:
        settings = ServerSettings(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    silence_loading_bars()
    served = [ServedModel.load(name, folder) for name, folder in _table(models).items()]
    names = ", ".join(model.name for model in served)

    def listening(address: str) -> None:
        say(f"serving {names} at {address} (a page; OpenAI's protocol below {address}/v1); Ctrl-C stops it")
        if not settings.only_this_machine and settings.api_key is None:
            say("warning: anyone who reaches this machine may use it; set MINICODFORMER_API_KEY to ask for a key")

    serve_process(served, settings, ShownRuns(RUNS), listening)


def _table(models: Sequence[str]) -> dict[str, Path]:
    """Folder of each name."""
    table: dict[str, Path] = {}
    for name, path in map(_named, models) if models else [_named(None)]:
        if name in table:
            raise UsageError(f"two models are called {name!r}", hint="give one of them another name: NAME=FOLDER")
        table[name] = path
    return table


def _named(model: str | None) -> tuple[str, Path]:
    """What a model is called, and its folder."""
    name, equals, folder = (model or "").partition("=")
    if equals:
        return name, Path(folder)
    run = finished_run(model)
    return run.path.name.lower(), run.final_model


class ShownRuns:
    """The runs under a folder as JSON, the same data that `runs --json` and `monitor --json` print.

    Each run that was looked at keeps its watcher, which reads only what is new and measures load between two looks.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._watchers: dict[str, Watcher] = {}
        self._looking = threading.Lock()

    def list_json(self) -> str:
        return json_text(list_runs(self._root))

    def view_json(self, name: str) -> str | None:
        """None where no run of the list has that name, so that no name leads out of the folder."""
        with self._looking:
            if name not in {facts.name for facts in list_runs(self._root)}:
                self._watchers.pop(name, None)
                return None
            if name not in self._watchers:
                self._watchers[name] = Watcher(RunFolder(self._root / name))
            return json_text(self._watchers[name].look())
