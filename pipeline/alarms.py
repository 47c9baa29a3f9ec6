"""What a watcher should worry about: each rule is a function from a run's history to sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from pipeline import figures
from pipeline.history import Curve, History, StageHistory
from pipeline.load import Load
from pipeline.runs import RunFacts

RISE = 1.05
"""A validation KL this far above its best, or a mean training KL above the one before, rises."""
WINDOW = 20
"""Steps of a mean of training values; two of them are compared."""
LOW_COVERAGE = 0.8
"""Kept probability mass below which the teacher's distribution is mostly in the tail bucket."""
HIGH_WAIT = 0.2
"""Share of a step's time spent waiting for data."""
STALL_S, STALL_PAUSES, START_S = 120.0, 10.0, 900.0
"""A stage is silent when it says nothing for ten usual pauses and two minutes; loading a teacher may take longer."""
FULL_MEMORY, FULL_DISK = 0.95, 2_000_000_000
_MEMBER = re.compile(r"(.+?)[\s/:#\[]*(?:replica|rank|worker)[\s/:#-]*\d+\]?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the rules look at. Times in seconds since 1970."""

    history: History
    facts: RunFacts
    began: float
    """When the newest turn began; 0 where that is not known."""
    now: float
    coverage: float | None
    """Mean kept mass of the newest shards."""
    load: Load | None


def alarms(scene: Scene) -> list[str]:
    """Every sentence that applies, the gravest first."""
    rules = (_outcome, _silent, _not_finite, _rising, _coverage, _waiting, _machine, _said)
    return list(dict.fromkeys(sentence for rule in rules for sentence in rule(scene)))


def _outcome(scene: Scene) -> Iterator[str]:
    if scene.facts.state == "failed":
        yield f"`{scene.facts.verb}` failed: {scene.facts.message}"


def _silent(scene: Scene) -> Iterator[str]:
    """The whole run, or one of several replicas that work side by side while the others go on."""
    if scene.facts.state != "running" or scene.history.updated is None:
        return
    living = {name: stage for name, stage in scene.history.stages.items() if stage.updated >= scene.began}
    silent = {name: scene.now - stage.updated for name, stage in living.items() if _is_silent(stage, scene)}
    newest = max(living.values(), key=lambda stage: stage.updated, default=None)
    since = scene.now - max(scene.history.updated, scene.began)
    if (newest is None and since > START_S) or (newest is not None and since > _patience(newest, scene)):
        yield f"nothing heard for {figures.age(since)}: the run may be stalled"
        return
    for name, pause in silent.items():
        if member := _MEMBER.fullmatch(name):
            family = [other for other in living if other != name and other.startswith(member[1])]
            if any(other not in silent for other in family):
                yield f"{name} is silent for {figures.age(pause)} while others go on: it may be dead"


def _is_silent(stage: StageHistory, scene: Scene) -> bool:
    return not stage.is_done and scene.now - stage.updated > _patience(stage, scene)


def _patience(stage: StageHistory, scene: Scene) -> float:
    pause = stage.usual_pause(scene.began)
    return START_S if pause is None or stage.is_done else max(STALL_S, STALL_PAUSES * pause)


def _not_finite(scene: Scene) -> Iterator[str]:
    for stage, name, curve in _curves(scene):
        if not math.isfinite(curve.newest):
            yield f"{stage}: {name} is {curve.newest} at step {curve.points[-1][0]}"


def _rising(scene: Scene) -> Iterator[str]:
    for stage, name, curve in _curves(scene):
        if name == "val_kl":
            best_step, best = min(curve.points, key=lambda point: (not math.isfinite(point[1]), point[1]))
            if curve.newest > RISE * best and curve.points[-1][0] > best_step:
                yield (
                    f"{stage}: validation KL rises: {figures.number(curve.newest)} after {figures.number(best)} "
                    f"at step {best_step}"
                )
        elif name == "kl" and len(curve.recent) >= 2 * WINDOW:
            values = [value for _, value in curve.recent][-2 * WINDOW :]
            before, after = fmean(values[:WINDOW]), fmean(values[WINDOW:])
            if after > RISE * before:
                yield (
                    f"{stage}: KL rises: mean {figures.number(after)} over {WINDOW} steps, "
                    f"{figures.number(before)} over those before"
                )


def _coverage(scene: Scene) -> Iterator[str]:
    """Of the shards, at temperature 1; what training tells of it is at the temperature of its loss."""
    if scene.coverage is not None and scene.coverage < LOW_COVERAGE:
        yield (
            f"coverage is low: the newest shards at {scene.coverage:.2f}; "
            "more kept ids (cache.k) keep more of the teacher"
        )


def _waiting(scene: Scene) -> Iterator[str]:
    for stage, name, curve in _curves(scene):
        if name == "data_wait" and (wait := fmean([value for _, value in curve.recent][-WINDOW:])) > HIGH_WAIT:
            yield f"{stage}: {wait:.0%} of a step is spent waiting for data"


def _machine(scene: Scene) -> Iterator[str]:
    if scene.load is None:
        return
    if scene.load.memory_used > FULL_MEMORY * scene.load.memory_total:
        yield f"memory is nearly full: {figures.size(scene.load.memory_total - scene.load.memory_used)} left"
    if scene.load.disk_free < FULL_DISK:
        yield f"the disk is nearly full: {figures.size(scene.load.disk_free)} left"


def _said(scene: Scene) -> Iterator[str]:
    for when, note in scene.history.notes:
        if note.level == "warning" and when >= scene.began:
            yield f"{note.stage}: {note.text}"


def _curves(scene: Scene) -> Iterator[tuple[str, str, Curve]]:
    for stage, history in scene.history.stages.items():
        for name, curve in history.curves.items():
            yield stage, name, curve
