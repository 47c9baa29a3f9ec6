"""Rank counts: the possible ones pass, the others are refused with the counts that can work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.launch import Machine, check_ranks, count_replicas, default_ranks


@given(count=st.integers(-2, 200), gpus=st.integers(0, 16), batch=st.integers(1, 96))
def test_a_count_passes_exactly_when_every_rank_gets_a_device_and_an_equal_share(
    count: int, gpus: int, batch: int
) -> None:
    here = Machine(gpus=gpus, cores=2)
    possible = count >= 1 and batch % count == 0 and (gpus == 0 or count <= gpus)
    if possible:
        check_ranks(count, here, batch)
        return
    with pytest.raises(UsageError) as caught:
        check_ranks(count, here, batch)
    offered = [int(word) for word in caught.value.hint.removeprefix("GPUS can be ").split(", ")]
    assert offered
    for other in offered:
        check_ranks(other, here, batch)


def test_the_default_uses_every_gpu_and_a_process_a_core_without() -> None:
    assert default_ranks(Machine(gpus=3, cores=64), 48) == 3
    assert default_ranks(Machine(gpus=0, cores=64), 48) == 2
    assert default_ranks(Machine(gpus=0, cores=1), 48) == 1


@given(gpus=st.integers(0, 16), cores=st.integers(1, 4), batch=st.integers(1, 96))
def test_the_default_is_never_refused_and_one_rank_more_is(gpus: int, cores: int, batch: int) -> None:
    here = Machine(gpus=gpus, cores=cores)
    count = default_ranks(here, batch)
    check_ranks(count, here, batch)
    for more in range(count + 1, (gpus or min(2, cores)) + 1):
        with pytest.raises(UsageError):
            check_ranks(more, here, batch)


@given(
    gpus=st.none() | st.integers(-1, 20),
    tensor_parallel=st.integers(1, 9),
    there=st.integers(0, 16),
    sizes=st.sets(st.integers(2, 16)),
)
def test_replicas_are_as_many_as_devices_allow_and_another_count_is_refused_with_those(
    gpus: int | None, tensor_parallel: int, there: int, sizes: set[int]
) -> None:
    here, allowed = Machine(gpus=there, cores=2), sorted({1, *sizes})
    fits = tensor_parallel in allowed and (there == 0 or tensor_parallel <= there)
    whole = gpus is None or (gpus >= 1 and gpus % tensor_parallel == 0 and (there == 0 or gpus <= there))
    if fits and whole:
        count = count_replicas(gpus, tensor_parallel, here, allowed)
        assert count == ((there or tensor_parallel) if gpus is None else gpus) // tensor_parallel
        return
    with pytest.raises(UsageError) as caught:
        count_replicas(gpus, tensor_parallel, here, allowed)
    named, offered = caught.value.hint.rsplit(" can be ", 1)
    for other in map(int, offered.split(", ")):
        if named == "TP":
            assert count_replicas(None, other, here, allowed) >= 1
        else:
            assert count_replicas(other, tensor_parallel, here, allowed) >= 1
