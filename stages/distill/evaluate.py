"""How close a student is to its teacher's cached distributions, over every predicted position of a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shards.reader import ShardSet, Split
from stages.distill.batches import Batch, Prefetcher, assemble
from stages.distill.calibration import CALIBRATION_BINS, calibration_error
from stages.distill.objective import EVALUATION_SUMS, DistillModule, LossTerms
from stages.distill.order import Indices, record_lengths, sharded_pass
from stages.distill.passages import load_for_measuring
from stages.distill.settings import ObjectiveSettings
from stages.events import Emit, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Means over positions; losses in nats."""

    positions: int
    kl: float
    """KL(teacher || student) by the set's yardstick: `what_kl_is` says in words what that is."""
    cross_entropy: float
    """Of the records' own tokens."""
    perplexity: float
    top1_agreement: float
    """How often the student's most probable token is the teacher's; of a sample, the most probable drawn one."""
    top5_agreement: float
    """How often that token of the teacher is among the student's five most probable."""
    ece: float
    """Expected calibration error of the student's most probable token, as a guess at the record's own."""


def perplexity(cross_entropy: float) -> float:
    """exp(cross_entropy), as far as a number goes."""
    return math.exp(min(cross_entropy, 700.0))


def evaluate(
    forward: Callable[[Batch], LossTerms],
    split: Split,
    *,
    records: int | None = None,
    start_token_id: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    emit: Emit = silent,
    unit: str = "batches",
) -> EvaluationReport:
    """Measure `forward` on a split or its first `records`, each rank on its part; `total` adds up what the ranks found.

    Sums and counts are added, never means: the report is the same for every world size, up to rounding.
    """
    parts = sharded_pass(record_lengths(split)[:records], micro_batch, rank, world)

    def load(part: Indices) -> Batch:
        chosen = part if part.size else [0]  # all ranks run the model equally often: see sharded_pass
        return assemble([split[int(index)] for index in chosen], start_token_id)

    sums = torch.zeros(len(EVALUATION_SUMS) + 3 * CALIBRATION_BINS, dtype=torch.float64)
    with closing(Prefetcher(load, parts)) as batches:
        for done, (part, batch) in enumerate(zip(parts, batches, strict=True), 1):
            found = forward(batch).sums.to(sums.device)
            if part.size:
                sums += found
            emit(Progress(stage="evaluate", done=done, total=len(parts), unit=unit))
    named, calibration = total(sums).split([len(EVALUATION_SUMS), 3 * CALIBRATION_BINS])
    totals = dict(zip(EVALUATION_SUMS, named.tolist(), strict=True))
    positions = totals.pop("positions")
    mean = {name: value / positions for name, value in totals.items()}
    return EvaluationReport(
        positions=int(positions),
        kl=mean["kl"],
        cross_entropy=mean["ce"],
        perplexity=perplexity(mean["ce"]),
        top1_agreement=mean["top1"],
        top5_agreement=mean["top5"],
        ece=calibration_error(calibration.view(CALIBRATION_BINS, 3)),
    )


def evaluate_model(
    model_folder: Path,
    shards: ShardSet,
    *,
    split: str = "dev",
    records: int | None = None,
    micro_batch: int = 8,
    emit: Emit = silent,
) -> EvaluationReport:
    """Measure a saved student in this process, without DeepSpeed; on the first `records` of the split, if given."""
    student = load_for_measuring(model_folder)
    module = DistillModule(student, ObjectiveSettings(kd_weight=0.0), shards.contract).eval()
    with torch.no_grad():
        return evaluate(
            lambda batch: module(batch.to(student.device)),
            shards.split(split),
            records=records,
            start_token_id=shards.contract.start_token_id,
            micro_batch=micro_batch,
            emit=emit,
            unit=f"{split} batches",
        )
