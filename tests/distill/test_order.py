"""Which records form a step is a function of seed and step alone; ranks and micro-batches only divide it (T2)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.distill.order import TrainingOrder, sharded_pass, share_of_rank

DIVISORS_OF_48 = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def make_order(records: int = 200, seed: int = 0, global_batch: int = 48) -> TrainingOrder:
    lengths = np.random.default_rng(1).integers(2, 500, records)
    return TrainingOrder(lengths=lengths, seed=seed, global_batch=global_batch, epochs=3)


@given(seed=st.integers(0, 2**32), step=st.integers(0, 11), micro_batch=st.integers(1, 20))
def test_T2_every_world_size_trains_on_the_same_records_in_the_same_steps(
    seed: int, step: int, micro_batch: int
) -> None:
    order = make_order(seed=seed)
    want = sorted(order.global_batch_of(step).tolist())
    assert len(set(want)) == 48
    for world in DIVISORS_OF_48:
        share = share_of_rank(48, micro_batch, world)
        assert share.micro_batch <= micro_batch
        assert share.micro_batch * share.accumulation * world == 48
        plan = order.micro_batches(step, share)
        assert plan.shape == (share.accumulation, world, share.micro_batch)
        assert sorted(plan.ravel().tolist()) == want


def test_T2_other_world_sizes_are_refused_with_those_that_divide() -> None:
    for world in set(range(1, 60)) - set(DIVISORS_OF_48):
        with pytest.raises(ValueError, match=r"these do: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48$"):
            share_of_rank(48, 4, world)


def test_the_micro_batch_is_the_largest_divisor_that_fits() -> None:
    assert share_of_rank(48, 4, 3).accumulation == 4
    assert share_of_rank(48, 7, 2).micro_batch == 6
    assert share_of_rank(48, 100, 2).micro_batch == 24
    assert share_of_rank(46, 4, 2).micro_batch == 1


def test_every_epoch_is_another_permutation_without_repeats() -> None:
    order = make_order()
    assert (order.steps_per_epoch, order.steps) == (4, 12)
    epochs = [np.concatenate([order.global_batch_of(4 * e + s) for s in range(4)]) for e in range(3)]
    assert all(np.unique(records).size == 4 * 48 for records in epochs)
    assert len({tuple(sorted(records.tolist())) for records in epochs}) == 3  # what is left out differs, too
    assert make_order(seed=1).global_batch_of(0).tolist() != order.global_batch_of(0).tolist()


def test_micro_batches_hold_records_of_like_length() -> None:
    order = make_order()
    share = share_of_rank(48, 4, 2)
    lengths = order.lengths[order.micro_batches(0, share)]
    padded = (lengths.max(2) * 4).sum()
    assert padded < 1.15 * lengths.sum()
    assert (np.diff(lengths.max((1, 2))) >= 0).all()  # ranks meet the long ones together


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="47 records do not fill a global batch of 48"):
        make_order(records=47)


@given(records=st.integers(1, 60), micro_batch=st.integers(1, 9), world=st.integers(1, 5))
def test_a_sharded_pass_visits_every_record_once_with_equally_many_turns_a_rank(
    records: int, micro_batch: int, world: int
) -> None:
    lengths = np.random.default_rng(2).integers(2, 50, records)
    parts = [sharded_pass(lengths, micro_batch, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = np.concatenate([turn for part in parts for turn in part])
    assert sorted(seen.tolist()) == list(range(records))
