"""One training step: a global batch, micro-batch by micro-batch, up to the update of the weights.

The objective is a mean over the positions of the global batch. Their number is known from the plan, so it is divided
out before any gradient is taken, and neither ranks nor micro-batches show in the result but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.distill.batches import Batch, Prefetcher
from stages.distill.engine import Engine
from stages.distill.memory import peak_bytes
from stages.distill.objective import SUMS, Emphasis
from stages.distill.order import Indices
from stages.distill.temperature import Difficulty
from stages.distill.world import World
from stages.errors import StageError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    step: int
    """0-based."""
    micro_batches: Indices
    """Record numbers, [accumulation, ranks, micro-batch]."""
    positions: NDArray[np.int64]
    """Predicted positions of each of them."""
    emphasis: Emphasis


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What every rank knows after a step."""

    means: dict[str, float]
    """Each term of SUMS, as a mean over the positions of the global batch."""
    records: Indices
    """Those of the plan's micro-batches."""
    record_kl: NDArray[np.float64]
    """Mean KL of each of them over its positions."""
    difficulty: Difficulty | None
    """Of the global batch, where temperatures depend on it."""
    positions: int
    grad_norm: float
    """Before clipping."""
    data_wait: float
    """Seconds that a rank stood waiting for records, mean over ranks."""
    memory: float
    """The most bytes that any rank has taken so far: of its GPU; without one, of the machine."""
    seconds: float
    stop: bool
    """Some rank was asked to stop."""


def take_step(
    plan: StepPlan,
    engine: Engine,
    batches: Prefetcher[Indices, Batch],
    world: World,
    *,
    stop: Callable[[], bool],
    sample_ids: Callable[[Indices], list[str]],
) -> StepReport:
    """Train on one global batch; a collective operation.

    Raises StageError naming step and records where a loss or the gradient is not finite. A loss is found out before the
    weights change; the caller must not save anything after either.
    """
    start, waited = time.perf_counter(), batches.waited
    positions = int(plan.positions.sum())
    sums = torch.zeros(*plan.micro_batches.shape[:2], len(SUMS), dtype=torch.float64)
    record_kl = torch.zeros(plan.micro_batches.shape, dtype=torch.float64)
    score_counts = torch.zeros(1, dtype=torch.float64)  # broadcast: its length is the module's to know
    # The engine takes a mean over ranks and micro-batches, whatever each of them holds: undo it.
    scale = sums.shape[0] * sums.shape[1] / positions
    for turn in range(sums.shape[0]):
        if turn:
            engine.step()  # between micro-batches it counts, and no more
        terms = engine.forward(next(batches), scale=scale, emphasis=plan.emphasis)
        engine.backward(terms.objective)
        sums[turn, world.rank] = terms.sums.to(sums.device)
        record_kl[turn, world.rank] = terms.record_kl_B.to(sums.device)
        score_counts = score_counts + terms.score_counts.to(sums.device)
    asides = torch.tensor([batches.waited - waited, float(stop())], dtype=torch.float64)
    memory = torch.zeros(world.size, dtype=torch.float64)
    memory[world.rank] = peak_bytes(world.device)
    parts = [sums.flatten(), record_kl.flatten(), score_counts, asides, memory]
    together = world.total(torch.cat(parts))
    sums_flat, record_kl_flat, score_counts, asides, memory = together.split([part.numel() for part in parts])
    sums = sums_flat.view_as(sums)
    _require_finite(sums, plan, sample_ids)
    grad_norm = engine.step()
    if not (engine.may_overflow or torch.tensor(grad_norm).isfinite()):
        raise _diverged(f"the gradient of step {plan.step} is not finite", sample_ids(plan.micro_batches.ravel()))
    means = (sums.sum((0, 1)) / positions).tolist()
    return StepReport(
        means=dict(zip(SUMS, means, strict=True)),
        records=plan.micro_batches,
        record_kl=record_kl_flat.view_as(record_kl).numpy() / plan.positions,
        difficulty=Difficulty.of(score_counts),
        positions=positions,
        grad_norm=grad_norm,
        data_wait=float(asides[0]) / world.size,
        memory=float(memory.max()),
        seconds=time.perf_counter() - start,
        stop=bool(asides[1] > 0),
    )


def _require_finite(sums: Tensor, plan: StepPlan, sample_ids: Callable[[Indices], list[str]]) -> None:
    broken = ~sums.isfinite().all(2)
    if broken.any():
        records = plan.micro_batches[broken.numpy()].ravel()
        raise _diverged(f"the loss of step {plan.step} is not finite", sample_ids(records))


def _diverged(what: str, records: list[str]) -> StageError:
    shown = ", ".join(records[:8]) + (f" and {len(records) - 8} more" if len(records) > 8 else "")
    return StageError(
        f"{what}, among records {shown}",
        hint="the last checkpoint is untouched; lower distill.learning_rate, or look at these records",
    )
