"""The ranks of a run: who am I, how many are we, and the few things we must agree on.

The launcher's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_WORLD_SIZE of torch's launcher,
LOCAL_SIZE of DeepSpeed's) say it; without them a run is one process that opens no port.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    rank: int
    size: int
    local_size: int
    """Ranks on this machine."""
    device: torch.device

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same on each; a collective operation."""
        summed = tensor.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def same_everywhere(self, number: int) -> bool:
        """Whether all ranks came with the same number; a collective operation."""
        ends = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return int(ends[0]) == number == -int(ends[1])

    def least(self, *numbers: int) -> list[int]:
        """The smallest of each number that a rank came with; a collective operation."""
        smallest = torch.tensor(numbers, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        found: list[int] = smallest.tolist()
        return found

    def barrier(self) -> None:
        self.total(torch.zeros(1))


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the launcher's ranks and leave them at the end. A group that was joined before is used, and left joined."""
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joined_here = not dist.is_initialized()
    if joined_here:
        _join("nccl" if device.type == "cuda" else "gloo")
    try:
        size = dist.get_world_size()
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
        world = World(rank=dist.get_rank(), size=size, local_size=local_size, device=device)
        world.barrier()  # a rank that finds nothing to do, or an error, must not be gone while another still joins
        yield world
    finally:
        if joined_here:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
