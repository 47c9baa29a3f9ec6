"""Watching a run: its log, its lock and this machine, as one view that is plain data, and that view kept up to date.

The run need not run: a stopped, failed or finished one is shown as it was left, and one that starts again goes on.
"""

from __future__ import annotations

import math
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.alarms import Scene, alarms
from pipeline.event_log import EventReader
from pipeline.history import Curve, History, StageHistory
from pipeline.json_output import json_text
from pipeline.load import Load, LoadMeter
from pipeline.measured import summary_of_this_model
from pipeline.run import RunFolder
from pipeline.runs import RunFacts, run_facts
from pipeline.turn import read_turn
from shards.errors import ShardError
from shards.reader import ShardReader

REFRESH_S = 1.0
_FIRST_CURVES = (
    *("val_kl", "kl", "loss", "kd", "ce", "kept", "temperature", "hard_share", "hard_mass", "attention", "encoder"),
    *("top1", "tokens_per_s", "data_wait", "grad_norm", "lr"),
)
_NEWEST_SHARDS = 4
_SAMPLES, _NOTES = 2, 4
_MEASURE_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """Progress of one stage; times in seconds."""

    stage: str
    done: float
    total: float
    unit: str
    rate: float | None
    """Units a second lately; over all its reports, where the stage is done."""
    left: float | None
    """Seconds to the end at that rate; None for a run that stands still."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveView:
    """One metric of one stage."""

    stage: str
    name: str
    newest: float
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteView:
    time: float
    stage: str
    text: str
    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerView:
    """An answer to a validation prompt."""

    prompt: str
    answer: str
    label: str
    step: int | None
    """Training steps before it; None of the finished student's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that the monitor shows; `pipeline.json_output.json_text` turns it into JSON."""

    time: float
    facts: RunFacts
    warnings: tuple[str, ...]
    stages: tuple[StageView, ...]
    curves: tuple[CurveView, ...]
    coverage: float | None
    """Mean kept probability mass of the newest shards."""
    load: Load
    notes: tuple[NoteView, ...]
    samples: tuple[AnswerView, ...]
    """Of the newest evaluation; before one, of the newest validation within training."""


class Watcher:
    """Looks at one run again and again, reading only what is new."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._meter = LoadMeter()
        self._coverages: dict[Path, tuple[float, int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._reader, self._history = EventReader(self._run.events), History()

    def look(self, now: float | None = None) -> RunView:
        """The run as it is now."""
        logged = self._reader.read()
        if self._reader.restarts:  # another log lies there now
            self._begin()
            logged = self._reader.read()
        self._history.take(logged)
        now = time.time() if now is None else now
        facts, turn = run_facts(self._run), read_turn(self._run.path)
        here = turn is not None and turn.host == socket.gethostname() and facts.state == "running"
        load = self._meter.read(self._run.path, turn.process if turn and here else None)
        coverage = self._coverage()
        began = turn.began if turn else 0.0
        scene = Scene(history=self._history, facts=facts, began=began, now=now, coverage=coverage, load=load)
        stages = self._history.stages
        return RunView(
            time=now,
            facts=facts,
            warnings=tuple(alarms(scene)),
            stages=tuple(view for name, stage in stages.items() if (view := _stage(name, stage, facts, began))),
            curves=tuple(
                _curve(name, metric, stage.curves[metric])
                for name, stage in stages.items()
                for metric in sorted(stage.curves, key=_rank)
            ),
            coverage=coverage,
            load=load,
            notes=tuple(
                NoteView(time=when, stage=note.stage, text=note.text, level=note.level)
                for when, note in list(self._history.notes)[-_NOTES:]
            ),
            samples=self._samples(),
        )

    def _coverage(self) -> float | None:
        """Of the newest shards, whose plain columns say it; a shard is read once."""
        paths = sorted(self._run.shards.glob("*.arrow"), key=lambda path: (path.stat().st_mtime, path.name))
        for path in paths[-_NEWEST_SHARDS:]:
            if path not in self._coverages:
                try:
                    with ShardReader.open(path) as shard:
                        positions = shard.numbers("positions").astype(np.int64)
                        mass = float(shard.numbers("mean_coverage").astype(np.float64) @ positions)
                        self._coverages[path] = (mass, int(positions.sum()))
                except (ShardError, OSError):  # verify-shards says what is wrong with it
                    continue
        newest = [self._coverages[path] for path in paths[-_NEWEST_SHARDS:] if path in self._coverages]
        known = [(mass, count) for mass, count in newest if math.isfinite(mass)]  # a set without probabilities has none
        return sum(mass for mass, _ in known) / sum(count for _, count in known) if known else None

    def _samples(self) -> tuple[AnswerView, ...]:
        try:
            told = summary_of_this_model(self._run)["evaluate"]["samples"][:_SAMPLES]
            return tuple(
                AnswerView(**{name: str(sample[name]) for name in ("prompt", "answer", "label")}, step=None)
                for sample in told
            )
        except (OSError, ValueError, KeyError, TypeError):
            newest = [answers[-1][1] for answers in self._history.answers.values()]
            return tuple(
                AnswerView(prompt=event.prompt, answer=event.answer, label=event.label, step=event.step)
                for event in newest[:_SAMPLES]
            )


def monitor(run: RunFolder, *, once: bool, as_json: bool) -> list[str]:
    """Show a run until Ctrl-C, or once: for scripts, and where the output is no terminal. Returns lines to print."""
    from pipeline.terminal.dashboard import live, rendered

    watcher = Watcher(run)
    if as_json or once or not sys.stdout.isatty():
        watcher.look()
        time.sleep(_MEASURE_S)  # shares of CPU are measured between two looks
        view = watcher.look()
        return [json_text(view)] if as_json else [rendered(view)]
    live(watcher.look, every=REFRESH_S)
    return []


def _rank(name: str) -> tuple[int, str]:
    known = _FIRST_CURVES.index(name) if name in _FIRST_CURVES else len(_FIRST_CURVES)
    return known, name


def _stage(name: str, stage: StageHistory, facts: RunFacts, began: float) -> StageView | None:
    if stage.progress is None:
        return None
    progress = stage.progress
    running = facts.state == "running" and not stage.is_done
    rate = stage.rate(began if running else 0.0)
    return StageView(
        stage=name,
        done=progress.done,
        total=progress.total,
        unit=progress.unit,
        rate=rate,
        left=(progress.total - progress.done) / rate if running and rate else None,
        bytes=progress.bytes,
    )


def _curve(stage: str, name: str, curve: Curve) -> CurveView:
    steps, values = zip(*curve.points, strict=True)
    return CurveView(stage=stage, name=name, newest=curve.newest, steps=steps, values=values)
