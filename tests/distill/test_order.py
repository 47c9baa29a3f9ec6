"""Which records form a step is a function of seed and step alone; ranks and micro-batches only divide it (T2)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.distill.order import Indices, TrainingOrder, sharded_pass, share_of_rank

DIVISORS_OF_48 = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def padding_share(lengths_N2: Indices, micro_batches: Indices) -> float:
    """The share of a step's tokens that are padding, each micro-batch (the last axis) padded to its own longest."""
    tokens = lengths_N2[micro_batches]
    padded = tokens.max(-2).sum() * micro_batches.shape[-1]
    return 1.0 - float(tokens.sum() / padded)


def make_order(records: int = 200, seed: int = 0, global_batch: int = 48, bucket_batches: int = 4) -> TrainingOrder:
    lengths = np.random.default_rng(1).integers(2, 500, (records, 2))
    return TrainingOrder(
        lengths_N2=lengths, seed=seed, global_batch=global_batch, epochs=3, bucket_batches=bucket_batches
    )


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


def test_T2_a_step_is_the_same_whatever_was_asked_for_before() -> None:
    walked, asked = make_order(records=2000), make_order(records=2000)
    steps = [walked.global_batch_of(step).tolist() for step in range(walked.steps)]
    for step in np.random.default_rng(0).permutation(walked.steps):
        assert asked.global_batch_of(int(step)).tolist() == steps[step]


def log_normal_lengths(records: int) -> np.ndarray:
    """Prompts and responses that know nothing of each other, the hardest case for padding."""
    rng = np.random.default_rng(3)
    return np.stack([rng.lognormal(5, 0.5, records), rng.lognormal(5.5, 0.5, records)], 1).astype(np.int64) + 8


def test_batches_by_length_pad_less_than_a_tenth() -> None:
    lengths = log_normal_lengths(8000)
    share = share_of_rank(48, 4, 3)

    def padding(bucket_batches: int) -> float:
        order = TrainingOrder(lengths_N2=lengths, seed=0, global_batch=48, epochs=1, bucket_batches=bucket_batches)
        steps = [order.micro_batches(step, share) for step in range(order.steps)]
        return padding_share(lengths, np.concatenate(steps))

    assert padding(16) < 0.1 < padding(1)


def test_padding_is_what_assembled_batches_hold_beyond_their_tokens() -> None:
    lengths = np.array([[3, 5], [1, 9], [4, 4], [2, 2]])
    plan = np.array([[[0, 1]], [[2, 3]]])  # [accumulation, world, micro-batch]
    padded = 2 * (3 + 9) + 2 * (4 + 4)
    assert padding_share(lengths, plan) == pytest.approx(1 - 30 / padded)


def test_long_and_short_batches_take_turns() -> None:
    order = TrainingOrder(lengths_N2=log_normal_lengths(8000), seed=0, global_batch=48, epochs=1, bucket_batches=16)
    means = [order.lengths_N2[order.global_batch_of(step)].sum(1).mean() for step in range(order.steps)]
    assert abs(np.corrcoef(np.arange(order.steps), means)[0, 1]) < 0.2
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_ranks_meet_long_records_together() -> None:
    order = TrainingOrder(lengths_N2=log_normal_lengths(8000), seed=0, global_batch=48, epochs=1, bucket_batches=1)
    longest = np.stack(
        [order.lengths_N2[order.micro_batches(step, share_of_rank(48, 4, 3))].sum(-1).max(-1) for step in range(100)]
    )  # [steps, accumulation, world]
    assert longest.std(axis=2).mean() < 0.6 * longest.std(axis=1).mean(), "more alike across ranks than across turns"


def test_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="47 records do not fill a global batch of 48"):
        make_order(records=47)


@given(records=st.integers(1, 60), micro_batch=st.integers(1, 9), world=st.integers(1, 5))
def test_a_sharded_pass_visits_every_record_once_with_equally_many_turns_a_rank(
    records: int, micro_batch: int, world: int
) -> None:
    lengths = np.random.default_rng(2).integers(2, 50, (records, 2))
    parts = [sharded_pass(lengths, micro_batch, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = np.concatenate([turn for part in parts for turn in part])
    assert sorted(seen.tolist()) == list(range(records))
