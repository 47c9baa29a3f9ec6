"""Experiment trackers: where the numbers of a run go beside its own log.

TensorBoard files lie in runs/<name>/tensorboard. The two others are services of their own packages, which share one
interface; they are asked for by name and must be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.run import write_atomically
from pipeline.sinks import Sink
from stages.events import Event, Metric, Note

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRACKERS = ("tensorboard", "trackio", "wandb", "none")


def require_tracker(name: str) -> None:
    """Raise UsageError for a tracker that there is not, or whose package is not installed."""
    if name not in TRACKERS:
        raise UsageError(f"no tracker {name!r}", hint=f"there are {', '.join(TRACKERS)}")
    if name in ("trackio", "wandb") and importlib.util.find_spec(name) is None:
        raise UsageError(
            f"the tracker {name} is not installed",
            hint=f".venv/bin/python -m pip install {name}, or leave it at tensorboard, which is",
        )


def sinks(name: str, run: Path) -> Sequence[Sink]:
    """The sink of a tracker that `require_tracker` has let pass; none for "none"."""
    if name == "none":
        return ()
    return (TensorBoard(run / "tensorboard"),) if name == "tensorboard" else (Service(name, run),)


class TensorBoard:
    """Metrics as scalars named stage/metric, notes as text. A resumed run takes back what came after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # before any stage flushes denormals, which numpy remarks on

        self._open = partial(SummaryWriter, str(folder), flush_secs=10)
        self._writer: SummaryWriter | None = None
        self._step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metric):
            self._step = event.step
            for name, value in event.values.items():
                self._opened().add_scalar(f"{event.stage}/{name}", value, event.step)
        elif isinstance(event, Note) and self._writer is not None:
            self._writer.add_text(f"{event.stage}/notes", event.text, self._step)

    def _opened(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = self._open(purge_step=self._step)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Service:
    """wandb, or trackio, which has wandb's interface; a run that is started again goes on where it was."""

    def __init__(self, package: str, run: Path) -> None:
        self._package = importlib.import_module(package)
        known_by = {"id": _wandb_id(run)} if package == "wandb" else {}  # trackio knows a run by its name
        self._package.init(project="minicodformer", name=run.name, resume="allow", **known_by)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metric):
            values = {f"{event.stage}/{name}": value for name, value in event.values.items()}
            self._package.log(values, step=event.step)

    def close(self) -> None:
        self._package.finish()


def _wandb_id(run: Path) -> str:
    """The same for every start of a run, and another for a run of the same name elsewhere."""
    path = run / "wandb-id"
    if not path.is_file():
        write_atomically(path, f"{run.name}-{secrets.token_hex(4)}")
    return path.read_text(encoding="utf-8")
