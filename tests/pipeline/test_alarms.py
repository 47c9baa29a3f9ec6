"""Every alarm rings for what it is about, and for nothing of a healthy run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from pipeline.alarms import Scene, alarms
from pipeline.event_log import Logged
from pipeline.history import ANSWERS, CURVE_POINTS, Curve, History
from pipeline.load import Load
from pipeline.runs import RunFacts
from stages.events import Answered, Event, Metric, Note, Progress

FACTS = RunFacts(
    name="r",
    path="runs/r",
    state="running",
    verb="distill",
    message="",
    stage="distill",
    done=1,
    total=9,
    unit="steps",
    step=1,
    kl=1.0,
    validation_kl=None,
    teacher="t",
    has_shards=True,
    has_model=False,
    updated=0.0,
)
LOAD = Load(
    cpu=0.5,
    cores=2,
    memory_used=5 * 10**9,
    memory_total=10**10,
    disk_free=10**11,
    processes=1,
    run_cores=1.0,
    run_memory=10**9,
    gpus=(),
)


def scene(events: Iterable[tuple[float, Event]], *, now: float, **changes: object) -> Scene:
    history = History()
    history.take(Logged(time=when, event=event) for when, event in events)
    healthy = Scene(history=history, facts=FACTS, began=0.0, now=now, coverage=0.97, load=LOAD)
    return dataclasses.replace(healthy, **changes)  # type: ignore[arg-type]


def steps(count: int, every: float = 1.0, stage: str = "distill") -> list[tuple[float, Event]]:
    return [(n * every, Progress(stage=stage, done=n, total=1000, unit="steps")) for n in range(count)]


def metrics(name: str, values: Iterable[float]) -> list[tuple[float, Event]]:
    return [(float(n), Metric(stage="distill", step=n, values={name: value})) for n, value in enumerate(values)]


def test_a_healthy_run_rings_nothing() -> None:
    falling = metrics("kl", [5 / (1 + n) for n in range(60)])
    validations = metrics("val_kl", [4.0, 3.0, 2.5, 2.52])
    waits = metrics("data_wait", [0.01] * 30)
    assert alarms(scene([*steps(60), *falling, *validations, *waits], now=61)) == []


@pytest.mark.parametrize(
    ("events", "changes", "said"),
    [
        (metrics("val_kl", [4.0, 3.0, 3.4]), {}, "validation KL rises: 3.400 after 3.000 at step 1"),
        (metrics("kl", [1.0] * 20 + [1.2] * 20), {}, "KL rises: mean 1.200 over 20 steps, 1.000"),
        (metrics("loss", [1.0, float("nan")]), {}, "loss is nan at step 1"),
        (metrics("data_wait", [0.5] * 20), {}, "50% of a step is spent waiting for data"),
        ([], {"coverage": 0.5}, "coverage is low: the newest shards at 0.50"),
        ([(0.0, Note(stage="s", text="no attention", level="warning"))], {}, "s: no attention"),
        ([], {"load": dataclasses.replace(LOAD, memory_used=98 * 10**8)}, "memory is nearly full: 200.0 MB left"),
        ([], {"load": dataclasses.replace(LOAD, disk_free=10**9)}, "disk is nearly full: 1.0 GB left"),
        ([], {"facts": dataclasses.replace(FACTS, state="failed", message="no space")}, "`distill` failed: no space"),
    ],
)
def test_each_rule_rings_alone(events: list[tuple[float, Event]], changes: dict[str, object], said: str) -> None:
    (sentence,) = alarms(scene([*steps(60), *events], now=61, **changes))
    assert said in sentence


def test_silence_is_measured_by_the_stages_own_pauses() -> None:
    assert alarms(scene(steps(30), now=29 + 100)) == []
    assert "may be stalled" in alarms(scene(steps(30), now=29 + 130))[0]
    slow = steps(30, every=60)
    assert alarms(scene(slow, now=29 * 60 + 500)) == []
    assert "may be stalled" in alarms(scene(slow, now=29 * 60 + 700))[0]
    stopped = dataclasses.replace(FACTS, state="stopped")
    assert alarms(scene(steps(30), now=10**6, facts=stopped)) == []


def test_a_teacher_may_take_its_time_to_load() -> None:
    fetched: list[tuple[float, Event]] = [
        (float(n), Progress(stage="fetch", done=n, total=9, unit="files")) for n in range(10)
    ]
    assert alarms(scene(fetched, now=9 + 600)) == []
    assert "may be stalled" in alarms(scene(fetched, now=9 + 1000))[0]


@pytest.mark.parametrize("name", ["teacher-cache/replica-{}", "teacher-cache replica {}", "cache[rank:{}]"])
def test_a_replica_that_is_silent_while_others_go_on_may_be_dead(name: str) -> None:
    both = [*steps(300, stage=name.format(0)), *steps(30, stage=name.format(1))]
    (sentence,) = alarms(scene(sorted(both, key=lambda entry: entry[0]), now=300))
    assert sentence.startswith(f"{name.format(1)} is silent for 5 min while others go on")
    done = [*steps(300, stage=name.format(0)), *steps(30, stage=name.format(1))]
    done.append((30.0, Progress(stage=name.format(1), done=1000, total=1000, unit="steps")))
    assert alarms(scene(sorted(done, key=lambda entry: entry[0]), now=300)) == []


def test_what_was_said_before_this_turn_is_not_repeated() -> None:
    early = [(0.0, Note(stage="s", text="old news", level="warning"))]
    assert alarms(scene([*early, *steps(60)], now=61, began=1.0)) == []


def test_a_curve_is_bounded_keeps_its_newest_and_forgets_what_was_taken_back() -> None:
    curve = Curve()
    for step in range(10 * CURVE_POINTS):
        curve.add(step, float(step))
        assert curve.newest == step
        assert len(curve.points) <= CURVE_POINTS
    kept = [step for step, _ in curve.points]
    assert kept == sorted(set(kept))
    assert kept[0] < CURVE_POINTS
    curve.add(100, -1.0)
    assert curve.points[-1] == (100, -1.0)
    assert all(step < 100 for step, _ in curve.points[:-1])


def test_a_rate_counts_what_this_start_did() -> None:
    history = History()
    events = [*steps(10), *((1000.0 + 2 * n, event) for n, (_, event) in enumerate(steps(20)[5:]))]
    history.take(Logged(time=when, event=event) for when, event in events)
    assert history.stages["distill"].rate(since=999) == pytest.approx(0.5)
    assert history.stages["distill"].usual_pause(since=999) == 2
    assert history.stages["distill"].rate(since=2000) is None


def test_of_many_answers_to_a_prompt_the_first_and_the_newest_are_kept() -> None:
    history = History()
    for step in range(0, 1000, 7):
        event = Answered(stage="distill", step=step, prompt="6 x 7?", answer=str(step), label="42")
        history.take([Logged(time=float(step), event=event)])
        kept = [when for when, _ in history.answers["6 x 7?"]]
        assert (kept[0], kept[-1]) == (0, step)
        assert len(kept) <= ANSWERS
    assert all(event.answer == str(when) for when, event in history.answers["6 x 7?"])
