"""Evaluation adds up the same sums however the split is dealt to ranks, empty turns included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shards.reader import ShardSet
from stages.distill.batches import Batch, Prefetcher, assemble
from stages.distill.evaluate import evaluate
from stages.distill.objective import DistillModule, LossTerms
from stages.distill.order import record_lengths, sharded_pass
from stages.distill.settings import ObjectiveSettings
from stages.student.model import build_student
from stages.student.shape import StudentShape


@pytest.mark.parametrize(("micro_batch", "world"), [(3, 3), (4, 2), (6, 4)])
def test_ranks_find_in_sum_what_one_rank_finds(micro_batch: int, world: int, shards: Path, shape: StudentShape) -> None:
    split = ShardSet(shards).split("dev")
    student = build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0).double()
    module = DistillModule(student, ObjectiveSettings(), ShardSet(shards).contract)
    found: dict[int, Tensor] = {}

    def measure(rank: int, ranks: int, size: int) -> Tensor:
        def keep(sums: Tensor) -> Tensor:
            found[rank] = sums.clone()
            return sums.clamp_min(1e-9)  # a rank of its own may have found nothing at all

        with torch.no_grad():
            evaluate(module, split, start_token_id=0, micro_batch=size, rank=rank, world=ranks, total=keep)
        return found[rank]

    turns = [sharded_pass(record_lengths(split), micro_batch, rank, world) for rank in range(world)]
    assert any(not turn.size for rank in turns for turn in rank), "some rank has a turn with nothing in it"
    together = torch.stack([measure(rank, world, micro_batch) for rank in range(world)]).sum(0)
    torch.testing.assert_close(together, measure(0, 1, 1), rtol=1e-5, atol=1e-5)


def test_calibration_is_what_dense_probabilities_say(shards: Path, shape: StudentShape) -> None:
    split = ShardSet(shards).split("dev")
    student = build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0).double()
    with torch.no_grad():
        student.output_weight().mul_(6)  # confident, so that several bins are filled
    module = DistillModule(student, ObjectiveSettings(), ShardSet(shards).contract)
    with torch.no_grad():
        found = evaluate(module, split, start_token_id=0, micro_batch=4)
        confidence, hits = [], []
        for record in split:
            batch = assemble([record], 0)
            hidden = student.hidden(
                batch.prompt_ids_BP, batch.prompt_mask_BP, batch.decoder_ids_BT, batch.decoder_mask_BT
            )
            logits = student.output_hidden(hidden.decoder_BTD)[0] @ student.output_weight().T
            best = logits.softmax(1).max(1)
            confidence += best.values.tolist()
            hits += (best.indices == torch.from_numpy(record.response_ids_R)).tolist()
    bins = [min(int(value * 15), 14) for value in confidence]
    assert len(set(bins)) > 4
    gaps = [
        abs(sum(c - h for c, h, b in zip(confidence, hits, bins, strict=True) if b == chosen)) for chosen in range(15)
    ]
    assert found.ece == pytest.approx(sum(gaps) / len(confidence), rel=1e-5)


def test_a_failure_on_the_way_closes_what_reads_ahead(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Prefetcher[Any, Any]] = []
    true_close = Prefetcher.close

    def close(batches: Prefetcher[Any, Any]) -> None:
        closed.append(batches)
        true_close(batches)

    def fail(batch: Batch) -> LossTerms:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Prefetcher, "close", close)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(fail, ShardSet(shards).split("dev"), start_token_id=0, micro_batch=1)
    assert len(closed) == 1


def test_the_first_records_of_a_split_can_be_measured_alone(shards: Path, shape: StudentShape) -> None:
    split = ShardSet(shards).split("train")
    module = DistillModule(
        build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0),
        ObjectiveSettings(),
        ShardSet(shards).contract,
    )
    with torch.no_grad():
        report = evaluate(module, split, records=7, start_token_id=0, micro_batch=4)
    assert report.positions == split.positions[:7].sum()
