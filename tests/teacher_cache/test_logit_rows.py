"""Rows of logits reduced by loops, and by tensor operations, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.teacher_cache import logit_rows
from stages.teacher_cache.draws import BLOCK
from stages.teacher_cache.logit_loops import sum_tails
from stages.teacher_cache.logit_rows import LogitRows, LoopedRows, TensorRows

DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("loops", "tensors")
NODES = (0.5, 0.25)


def made(way: str, logits_NV: Tensor, padding: int = 0) -> LogitRows:
    """The rows, behind each of them `padding` columns of what would outweigh everything."""
    padded = torch.nn.functional.pad(logits_NV, (0, padding), value=1e4)
    width = logits_NV.shape[1]
    return LoopedRows(padded, width) if way == "loops" else TensorRows(padded[:, :width].float())


def random_logits(rows: int, width: int, seed: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def stable(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The truth of `LogitRows.largest`, in float64."""
    values, columns = logits_NV.double().sort(dim=-1, descending=True, stable=True)
    return values[:, :count].float(), columns[:, :count]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(8, 3_000),
    count=st.integers(1, 8),
    padding=st.sampled_from([0, 5, 64]),
    dtype=st.sampled_from(DTYPES),
    coarse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_largest_are_exact_and_of_equal_ones_the_first(
    rows: int, width: int, count: int, padding: int, dtype: torch.dtype, coarse: bool, seed: int
) -> None:
    logits = random_logits(rows, width, seed, dtype)
    logits = logits.round() if coarse else logits
    values, columns = made("loops", logits, padding).largest(count)
    true_values, true_columns = stable(logits, count)
    assert torch.equal(values, true_values)
    assert torch.equal(columns, true_columns)
    assert torch.equal(made("tensors", logits, padding).largest(count)[0], true_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [[0.0, -0.0] * 300, [-0.0, -1.0] * 300, [5.0] * 600, [-torch.inf] * 599 + [-3e38]])
def test_rows_of_few_values_are_sorted_like_any(logits: list[float], dtype: torch.dtype) -> None:
    """Zeros of either sign are equal; nothing overflows where all are."""
    row = torch.tensor([logits], dtype=dtype)
    for count in (1, 5, 64, 600):
        values, columns = made("loops", row).largest(count)
        assert torch.equal(values, stable(row, count)[0])
        assert torch.equal(columns, stable(row, count)[1])


def taken_out(
    rows: LogitRows, logits_NV: Tensor, kept: int, nodes: tuple[float, ...] = NODES
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reference, sums and masses with the first `kept` of kept + 3 candidates taken out."""
    values, columns = stable(logits_NV, kept + 3)
    reference = values[:, kept].contiguous()
    mask = (torch.arange(kept + 3) < kept).expand_as(columns)
    return reference, *rows.take_out(columns, mask, reference, nodes, masses=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(24, 1_500),
    kept=st.integers(0, 20),
    padding=st.sampled_from([0, 5, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(0.01, 40.0),
    way=st.sampled_from(WAYS),
    nodes=st.sampled_from([(), NODES, (0.7, 0.5, 0.35, 0.25), (0.9,), (0.125,)]),
    seed=st.integers(0, 2**31),
)
def test_sums_and_masses_of_the_rest_against_float64(
    rows: int,
    width: int,
    kept: int,
    padding: int,
    dtype: torch.dtype,
    scale: float,
    way: str,
    nodes: tuple[float, ...],
    seed: int,
) -> None:
    logits = random_logits(rows, width, seed, dtype, scale)
    reference, sums, masses = taken_out(made(way, logits, padding), logits, kept, nodes)
    assert masses is not None
    delta = logits.double() - reference[:, None].double()
    outside = delta.scatter(1, stable(logits, kept)[1], -torch.inf)
    for index, node in enumerate((1.0, *nodes)):
        power = (node * outside).exp()
        moment = (power * delta).sum(dim=-1)
        assert torch.allclose(sums[:, index, 0].double(), power.sum(dim=-1), rtol=3e-6)
        assert torch.allclose(sums[:, index, 1].double(), moment, rtol=5e-6, atol=1e-6)
    blocks = torch.stack([block.exp().sum(dim=-1) for block in outside.split(BLOCK, dim=1)], dim=1)
    assert masses.shape == (rows, width // BLOCK + 1)
    assert torch.allclose(masses[:, : blocks.shape[1]], blocks, rtol=3e-6, atol=1e-30)
    assert not masses[:, blocks.shape[1] :].any()


def exponentials(x_N: Tensor) -> Tensor:
    """What the loops make of numbers at or below zero, each the one column of a row."""
    sums, no_mass = np.empty((len(x_N), 1, 2)), np.empty((len(x_N), 0))
    nothing = np.zeros((len(x_N), 0), np.int64), np.zeros((len(x_N), 0), np.bool_)
    bits, zeros, one = x_N[:, None].numpy().view(np.uint32), np.zeros(len(x_N), np.float32), np.ones(1, np.float32)
    sum_tails(bits, 0, 1, *nothing, zeros, one, np.zeros(1, np.bool_), sums, no_mass)
    return torch.from_numpy(sums[:, 0, 0])


def test_an_exponential_is_right_to_the_stated_bound() -> None:
    x = torch.cat([torch.linspace(-87.6, 0, 1_000_001), -torch.logspace(-40, 1.9, 200_001)])
    found, truth = exponentials(x), x.double().exp()
    assert ((found - truth).abs() / truth).max().item() <= 2.0**-23
    low = exponentials(torch.tensor([-87.7, -88.0, -1e3, -1e4, -3e38, -torch.inf]))
    assert not low.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_does_not_pass_for_one(dtype: torch.dtype) -> None:
    logits = random_logits(3, 700, 1, dtype)
    logits[1, 300] = torch.nan
    values, columns = made("loops", logits).largest(4)
    assert values.isnan().any(dim=-1).tolist() == [False, True, False]
    kept = torch.zeros_like(columns, dtype=torch.bool)
    sums, _ = made("loops", logits).take_out(columns, kept, values[:, -1].contiguous(), NODES, masses=False)
    assert sums.isnan().flatten(1).all(dim=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_minus_infinity_weigh_nothing(dtype: torch.dtype) -> None:
    """A model that rules ids out."""
    logits = random_logits(2, 700, 2, dtype)
    with_more = torch.cat([logits, torch.full((2, 300), -torch.inf, dtype=dtype)], dim=1)
    _, sums, _ = taken_out(made("loops", logits), logits, 5)
    _, same, _ = taken_out(made("loops", with_more), with_more, 5)
    assert torch.allclose(sums, same, rtol=1e-6)


SPREAD = """
import os, sys, torch
from stages.teacher_cache import logit_rows

given = sorted(os.sched_getaffinity(0))
if sys.argv[1] == "bound":  # as OpenMP binds its threads, the first of which makes ours
    torch.set_num_threads(2)
    torch.ones(1_000_000).add_(1)
    os.sched_setaffinity(0, {given[0]})
logits = torch.randn(200, 3_000, generator=torch.Generator().manual_seed(0))
seen, loop = set(), logit_rows.select_largest
def watched(*args):
    seen.add(tuple(sorted(os.sched_getaffinity(0))))
    loop(*args)
logit_rows.select_largest = watched
def reduce(threads):
    torch.set_num_threads(threads)
    rows = logit_rows.LoopedRows(logits.clone(), 3_000)
    values, columns = rows.largest(9)
    kept = torch.ones_like(columns, dtype=torch.bool)
    return values, columns, *rows.take_out(columns, kept, values[:, -1].contiguous(), (0.5, 0.3), masses=True)
several, cores = reduce(3), set(seen)
assert all(map(torch.equal, several, reduce(1)))
print(cores == {tuple(given)} or cores)
"""


@pytest.mark.parametrize("start", ["free", "bound"])
def test_several_threads_give_the_same_bits_on_all_cores(start: str) -> None:
    done = subprocess.run([sys.executable, "-c", SPREAD, start], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stdout + done.stderr


def test_cores_are_found_while_other_threads_of_the_process_end() -> None:
    done = threading.Event()

    def spawn() -> None:
        while not done.is_set():
            threading.Thread(target=os.getpid).start()

    spawner = threading.Thread(target=spawn)
    spawner.start()
    try:
        found = [logit_rows._allowed() for _ in range(100)]
    finally:
        done.set()
        spawner.join()
    assert all(cores == os.sched_getaffinity(0) for cores in found)
