"""The coder: streams of any numbers come back, cost about their entropy, and any bytes are safe to decode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import Corrupt
from shards.planes.numbers import WIDE_FROM, to_symbols
from shards.planes.rans import (
    INVERSES,
    LEAST_STATE,
    STATES,
    TOTAL,
    Code,
    Coder,
    Stream,
    are_frequencies,
    learn_frequencies,
)

NOTHING_LEARNT: Code = np.zeros((2, 256), np.uint16)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 2, 7, 8, 9, 100, 5_000, 200_000]),
    st.sampled_from([1, 3, 30, 191, 192, 5_000, WIDE_FROM + 5, 1 << 24]),
)
def test_streams_of_any_length_and_range_come_back(seed: int, count: int, bound: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (bound * rng.random(count) ** 4).astype(np.int32)
    symbols = to_symbols(numbers)[0]
    near = np.bincount(symbols, minlength=256) + (np.arange(256) < 3)
    for counts in (None, near, 1000 // (1 + np.arange(256))):
        code = NOTHING_LEARNT.copy()
        if counts is not None:
            code[1] = learn_frequencies(counts)
        coder = Coder({"a": code, "b": NOTHING_LEARNT})
        contexts = rng.integers(0, 2, count, np.uint16)
        cell = coder.pack([Stream("a", numbers, contexts), Stream("b", numbers[:3])])
        reader = coder.reader(cell)
        np.testing.assert_array_equal(reader.take("a", count, contexts), numbers)
        np.testing.assert_array_equal(reader.take("b", min(3, count)), numbers[:3])
        reader.end()


def test_a_learnt_code_comes_close_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    shares = np.exp(-np.arange(90) / 12)
    numbers = rng.choice(90, 20_000, p=shares / shares.sum())
    counts = np.bincount(numbers, minlength=256)
    code = learn_frequencies(counts)[None]
    assert are_frequencies(code)
    used = counts[counts > 0] / counts.sum()
    entropy = float(-(used * np.log2(used)).sum()) * len(numbers) / 8
    cell = Coder({"a": code}).pack([Stream("a", numbers)])
    assert entropy < len(cell) < 1.001 * entropy + 4 * STATES + 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=256) | st.lists(st.just(7), max_size=256))
def test_frequencies_of_any_counts_are_a_code_that_no_single_step_betters(counts: list[int]) -> None:
    array = np.zeros(256, np.int64)
    array[: len(counts)] = counts
    code = learn_frequencies(array).astype(np.int64)
    array[255] = max(1, array[255])
    assert code.sum() == TOTAL
    assert ((code > 0) == (array > 0)).all()

    def bits(frequencies: np.ndarray) -> float:
        return float(-(array[array > 0] * np.log2(frequencies[array > 0] / TOTAL)).sum())

    used = np.flatnonzero(array)
    for more, less in np.random.default_rng(0).choice(used, (12, 2)):
        other = code.copy()
        other[more] += 1
        other[less] -= 1
        assert other[less] == 0 or bits(other) >= bits(code) - 1e-6


def test_R5_the_compiled_decoder_stays_within_any_bytes() -> None:
    """Bytes of every kind before and after a cell: nothing beyond its ends is read, whatever states and words say."""
    rng = np.random.default_rng(0)
    numbers = (20_000_000 * rng.random(3_000) ** 12).astype(np.int32).clip(0, (1 << 24) - 1)
    code = learn_frequencies(np.bincount(to_symbols(numbers)[0], minlength=256))
    coder = Coder({"a": code[None], "b": NOTHING_LEARNT})
    cell = coder.pack([Stream("a", numbers)])
    tried = refused = 0
    for size in [*range(40), *rng.integers(0, len(cell), 100).tolist(), len(cell) - 1, len(cell)]:
        for fill in (None, 0, 255):
            found = []
            for around in (0, 170):
                room = np.full(len(cell) + 4_000, around, np.uint8)
                room[2_000 : 2_000 + size] = np.frombuffer(cell, np.uint8)[:size] if fill is None else fill
                try:
                    reader = coder.reader(room[2_000 : 2_000 + size].data)
                    found.append(np.concatenate([reader.take("a", 3_000), reader.take("b", 70_000)]))
                except Corrupt:
                    found.append(None)
                    continue
                with pytest.raises(Corrupt, match="do not fill it"):
                    reader.end()
            tried, refused = tried + 1, refused + (found[0] is None)
            np.testing.assert_array_equal(*found)
    assert refused < tried / 2


def test_a_cell_of_other_states_or_left_over_bytes_is_corrupt() -> None:
    coder = Coder({"a": NOTHING_LEARNT})
    cell = coder.pack([Stream("a", np.arange(0, 5_000, 7))])
    for damaged in (
        cell + b"\0",
        cell[:-1],
        cell[: 4 * STATES] + b"\0\0" + cell[4 * STATES :],
        cell[:2] + b"\xff" + cell[3:],
    ):
        reader = coder.reader(damaged)
        reader.take("a", 715)
        with pytest.raises(Corrupt, match="do not fill it"):
            reader.end()
    with pytest.raises(Corrupt, match="no writer leaves"):
        coder.reader((LEAST_STATE - 1).to_bytes(4, "little") + cell[4:])
    with pytest.raises(Corrupt, match="no room"):
        coder.reader(cell[: 4 * STATES - 1])


def test_division_by_multiplication_is_exact() -> None:
    """At the largest states of each frequency, and around multiples of it."""
    frequencies = np.arange(1, TOTAL + 1, dtype=np.uint64)
    for quotient in (0, 1, 2, 1_000, (1 << 20) - 2, (1 << 20) - 1):
        for rest in (np.zeros_like(frequencies), frequencies // np.uint64(2), frequencies - np.uint64(1)):
            x = np.uint64(quotient) * frequencies + rest
            assert ((x + np.uint64(1)) * INVERSES[1:] >> np.uint64(44) == quotient).all()
