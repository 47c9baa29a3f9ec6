"""The runs under a folder, each with its state: facts as plain data, for the command line, the page and scripts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.event_log import EventReader, Logged
from pipeline.run import RUNS, RunFolder
from pipeline.turn import Turn, is_held, read_turn
from stages.events import Metric, Progress

State = Literal["running", "finished", "stopped", "failed"]
_TAIL_BYTES = 1 << 18
"""How much of the end of events.jsonl is read for the newest figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run. `dataclasses.asdict` of it is JSON as it stands; what is not known is None or empty."""

    name: str
    path: str
    state: State
    """Of the newest verb: "running" while a process holds the run's lock, "finished" where the verb came to its end,
    "stopped" where it was asked to stop before, "failed" where it raised an error or its process vanished."""
    verb: str
    """The newest verb."""
    message: str
    """Why it failed, or how to go on."""
    stage: str
    """The part of the verb that reported progress last."""
    done: float | None
    total: float | None
    unit: str
    step: int | None
    """Newest training step that reported a number."""
    kl: float | None
    """Newest training KL, in nats; None where it is not finite."""
    validation_kl: float | None
    """Newest KL on the validation split, in nats."""
    teacher: str
    has_shards: bool
    """Whether the run's own shard set is complete."""
    has_model: bool
    updated: float | None
    """When the run said something last, in seconds since 1970."""


def list_runs(root: Path) -> list[RunFacts]:
    """Every run under `root`, the newest first. A folder without recipe, events and model is no run."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    runs = [RunFolder(path) for path in folders if not path.name.startswith(".")]
    facts = [run_facts(run) for run in runs if _is_run(run)]
    return sorted(facts, key=lambda run: (run.state == "running", run.updated or 0.0, run.name), reverse=True)


def run_facts(run: RunFolder) -> RunFacts:
    """What can be said of one run; a damaged file in it costs only the facts that it held."""
    logged = EventReader(run.events, newest_bytes=_TAIL_BYTES).read()
    turn, held = read_turn(run.path), is_held(run.path)
    summary = _summary(run)
    progress = _newest_progress(logged, since=turn.began if turn else 0.0)
    state, message = _state(run, turn, held, summary, progress)
    step, kl = _newest(logged, "kl")
    return RunFacts(
        name=run.path.name,
        path=str(run.path),
        state=state,
        verb=turn.verb if turn else "",
        message=message,
        stage=progress.stage if progress else "",
        done=progress.done if progress else None,
        total=progress.total if progress else None,
        unit=progress.unit if progress else "",
        step=step,
        kl=kl,
        validation_kl=_newest(logged, "val_kl")[1],
        teacher=_teacher(run),
        has_shards=(run.shards / "manifest.json").is_file(),
        has_model=run.final_model.is_dir(),
        updated=logged[-1].time if logged else None,
    )


def find_run(name: str | None, root: Path = RUNS) -> RunFolder:
    """A run by name or path; without one, the running or else the newest. Raises PipelineError."""
    if name is None:
        runs = list_runs(root)
        if not runs:
            raise PipelineError(f"no run under {root.resolve()}", hint="start one: make demo, or make teacher-cache")
        return RunFolder(Path(runs[0].path))
    run = next((run for run in (RunFolder(root / name), RunFolder(Path(name))) if _is_run(run)), None)
    if run is None:
        known = ", ".join(facts.name for facts in list_runs(root)) or "none"
        raise PipelineError(f"no run {name!r} under {root.resolve()}", hint=f"there is {known}")
    return run


def finished_run(name: str | None, root: Path = RUNS) -> RunFolder:
    """A run with a final model, by name or path; without one, that of the newest. Raises PipelineError, StageError."""
    if name is None:
        from stages.inference.loading import newest_model

        return RunFolder(newest_model(root).parent)
    run = find_run(name, root)
    run.require_model()
    return run


def _is_run(run: RunFolder) -> bool:
    return run.recipe_file.is_file() or run.events.is_file() or run.final_model.is_dir()


def run_lines(runs: Sequence[RunFacts], now: float | None = None) -> list[str]:
    """A table of runs, a line each."""
    now = time.time() if now is None else now
    rows = [("run", "state", "verb", "progress", "KL", "val. KL", "last said", "")]
    for run in runs:
        share = "" if not run.total or run.done is None else f"{run.done / run.total:.0%} {run.stage}"
        rows.append(
            (
                run.name,
                run.state,
                run.verb or "?",
                share,
                "" if run.kl is None else figures.number(run.kl),
                "" if run.validation_kl is None else figures.number(run.validation_kl),
                "" if run.updated is None else f"{figures.age(now - run.updated)} ago",
                run.message,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _state(
    run: RunFolder, turn: Turn | None, held: bool, summary: dict[str, Any], progress: Progress | None
) -> tuple[State, str]:
    if held:
        return "running", ""
    if turn is None:  # a copy without its lock file
        whole = run.final_model.is_dir() or (progress is not None and progress.done >= progress.total)
        return ("finished", "") if whole else ("stopped", "")
    again = f"run `{turn.verb}` again to go on"
    match turn.outcome:
        case "failed":
            return "failed", turn.error
        case "running":
            return "failed", f"process {turn.process} vanished (killed, or out of memory); {again}"
        case "interrupted":
            return "stopped", again
    asked_to_stop = turn.verb == "distill" and not summary.get("distill", {}).get("finished", True)
    return ("stopped", again) if asked_to_stop else ("finished", "")


def _newest(logged: Sequence[Logged], name: str) -> tuple[int | None, float | None]:
    """Step and value of a metric's newest report."""
    for entry in reversed(logged):
        if isinstance(entry.event, Metric) and name in entry.event.values:
            value = entry.event.values[name]
            return entry.event.step, value if math.isfinite(value) else None
    return None, None


def _newest_progress(logged: Sequence[Logged], since: float) -> Progress | None:
    """Of the turn that began at `since`: what an earlier verb reported last says nothing about this one."""
    reported = (entry.event for entry in reversed(logged) if entry.time >= since)
    return next((event for event in reported if isinstance(event, Progress)), None)


def _summary(run: RunFolder) -> dict[str, Any]:
    try:
        return run.summary()
    except (OSError, ValueError):
        return {}


def _teacher(run: RunFolder) -> str:
    try:
        return run.recipe().teacher.model
    except (PipelineError, OSError):
        return ""
