"""The list of what is left: nothing is lost and nothing doubled, whoever dies over what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import StageError
from stages.teacher_cache.plan import plan_units
from stages.teacher_cache.worklist import Complete, WorkList


def run(units: int, size: int, poison: set[int], chance: list[bool], replicas: int) -> tuple[list[Complete], int]:
    """Drive a list with `replicas` at once; a part that holds a poison kills, any other where `chance` says so."""
    work = WorkList((unit, range(unit.start, unit.stop)) for unit in plan_units({"train": range(units * size)}, size))
    done: list[Complete] = []
    out: list = []
    deaths, chance = 0, list(chance)
    while work.is_open():
        while len(out) < replicas and work.is_open() and (part := _take(work)):
            out.append(part)
        part = out.pop(0)
        if poison & set(part.indices) or (chance and chance.pop() and part.patience > part.deaths + 1):
            deaths += 1
            complete = work.died(part, "killed")
        else:
            complete = work.finish(part, [SimpleNamespace(index=index) for index in part.indices])  # type: ignore[misc]
        done += [complete] if complete else []
    assert not out
    return done, deaths


def _take(work: WorkList):  # type: ignore[no-untyped-def]
    """Without waiting: this test has no other threads."""
    return work.take() if work._waiting else None


@given(
    units=st.integers(1, 4),
    size=st.integers(1, 9),
    replicas=st.integers(1, 3),
    poison=st.sets(st.integers(0, 35), max_size=2),
    chance=st.lists(st.booleans(), max_size=10),
)
def test_every_record_comes_back_once_or_is_rejected_and_only_poison_is(
    units: int, size: int, replicas: int, poison: set[int], chance: list[bool]
) -> None:
    done, _ = run(units, size, poison, chance, replicas)
    poison &= set(range(units * size))
    assert len({complete.unit.name for complete in done}) == len(done) == units
    for complete in done:
        captured = [record.index for record in complete.records]  # type: ignore[attr-defined]
        rejected = [reject.index for reject in complete.rejects]
        assert captured == sorted(set(captured))
        assert rejected == sorted(poison & set(range(complete.unit.start, complete.unit.stop)))
        assert sorted(captured + rejected) == list(range(complete.unit.start, complete.unit.stop))


def test_a_poison_is_found_by_halving() -> None:
    _, deaths = run(1, 256, {77}, [], 1)
    assert deaths == 3 + 7 + 3, "the unit, seven halves of 128 to 2 records, the record"


def test_replicas_that_die_whatever_they_are_given_end_the_run() -> None:
    with pytest.raises(StageError, match="24 replicas died one after the other"):
        run(1, 256, set(range(256)), [], 1)


def test_many_poisons_do_not_end_a_run_that_captures_in_between() -> None:
    done, deaths = run(10, 2, set(range(0, 20, 2)), [], 1)
    assert deaths == 10 * (3 + 3)
    assert [len(complete.records) for complete in done] == [1] * 10


def test_an_abandoned_list_hands_out_nothing() -> None:
    work = WorkList((unit, range(unit.start, unit.stop)) for unit in plan_units({"train": range(4)}, 2))
    work.take()
    work.abandon()
    assert work.take() is None
    assert not work.is_open()
