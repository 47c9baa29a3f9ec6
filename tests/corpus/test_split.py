from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.split import divide, rank

prompt_lists = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=60)


@given(prompt_lists, st.integers(0, 2**63 - 1), st.randoms())
def test_the_ranking_does_not_depend_on_the_order_of_the_rows(prompts: list[int], seed: int, random) -> None:
    rows = [(1_000 + number // 2, prompts[number // 2]) for number in range(2 * len(prompts))]  # each row twice
    shuffled = rows.copy()
    random.shuffle(shuffled)

    def ranked(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
        samples, keys = (np.array([row[i] for row in rows], dtype=np.uint64) for i in (0, 1))
        return [rows[index] for index in rank(samples, keys, seed=seed)]

    order = ranked(rows)
    assert ranked(shuffled) == order
    assert sorted(order) == sorted(set(rows))
    prompts_in_order = [prompt for _, prompt in order]
    changes = sum(a != b for a, b in itertools.pairwise(prompts_in_order))
    assert changes == max(0, len(set(prompts_in_order)) - 1), "rows of one prompt must stand together"


def test_adding_a_row_does_not_reshuffle_the_others() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, size=200, dtype=np.uint64)
    before = keys[:-1][rank(keys[:-1], keys[:-1], seed=3)]
    after = keys[rank(keys, keys, seed=3)]
    np.testing.assert_array_equal(before, after[after != keys[-1]])


def test_the_seed_decides_the_order() -> None:
    keys = np.arange(1_000, dtype=np.uint64)
    first, second = rank(keys, keys, seed=0), rank(keys, keys, seed=1)
    assert (first != second).mean() > 0.99


@given(prompt_lists.filter(bool), st.integers(1, 100), st.integers(1, 40))
def test_no_prompt_is_on_both_sides_and_no_size_is_exceeded(prompts: list[int], train: int, val: int) -> None:
    keys = np.array(sorted(prompts), dtype=np.uint64)[: train + val]
    split = divide(keys, train_size=train, val_size=val)
    assert not set(keys[split.train]) & set(keys[split.dev])
    assert len(split.train) <= train
    assert 1 <= len(split.dev) <= val
    assert not set(split.train) & set(split.dev)


@pytest.mark.parametrize(("rows", "sides"), [(1_100, (1_000, 100)), (550, (500, 50)), (5, (4, 1))])
def test_less_data_keeps_the_ratio(rows: int, sides: tuple[int, int]) -> None:
    split = divide(np.arange(rows, dtype=np.uint64), train_size=1_000, val_size=100)
    assert (len(split.train), len(split.dev)) == sides


def test_prompts_too_large_for_validation_lend_it_a_part_of_the_smallest() -> None:
    keys = np.repeat(np.array([1, 2], dtype=np.uint64), (7, 5))
    split = divide(keys, train_size=10, val_size=2)
    assert split.dev.tolist() == [7, 8]
    assert split.train.tolist() == list(range(7))
