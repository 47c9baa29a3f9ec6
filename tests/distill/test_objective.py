"""The combined objective on a small student: which positions learn, and what does not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from shards.record import Record
from stages.distill.batches import Batch, assemble
from stages.distill.objective import EVALUATION_SUMS, LOSSES, SUMS, DistillModule
from stages.distill.settings import ObjectiveSettings
from stages.student.model import build_student
from stages.student.shape import StudentShape


@pytest.fixture(scope="module")
def module(shape: StudentShape) -> DistillModule:
    student = build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0).double()
    return DistillModule(student, ObjectiveSettings())


def hidden_gradient(module: DistillModule, batch: Batch) -> torch.Tensor:
    """Gradient of the objective with respect to the decoder's output, [B, T, D]."""
    caught = {}
    hook = module.student.model.decoder.norm.register_full_backward_hook(
        lambda _module, _into, out: caught.update(gradient=out[0])
    )
    module(batch).objective.backward()
    hook.remove()
    return caught["gradient"]


def test_the_last_label_of_every_record_has_a_gradient_and_padding_has_none(
    module: DistillModule, record: Callable[..., Record]
) -> None:
    records = [record(index, 0) for index in range(16)]
    assert all(one.response_ids_R[-1] == 1 for one in records), "the end token, by which generation learns to stop"
    batch = assemble(records, 0)
    gradient_BTD = hidden_gradient(module, batch)
    learns_BT = gradient_BTD.abs().sum(2) > 0
    for b, one in enumerate(records):
        assert learns_BT[b, one.response_ids_R.size - 1]
    assert torch.equal(learns_BT, batch.decoder_mask_BT)


def test_a_record_costs_the_same_alone_and_padded_among_others(
    module: DistillModule, record: Callable[..., Record]
) -> None:
    records = [record(index, 0) for index in range(9)]
    together = module(assemble(records, 0), attention_factor=1.0).sums
    alone = sum(module(assemble([one], 0), attention_factor=1.0).sums for one in records)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kd", LOSSES)
def test_terms_are_weighted_scaled_and_reported_each_by_its_own_name(
    kd: str, module: DistillModule, record: Callable[..., Record]
) -> None:
    settings = ObjectiveSettings(kd=kd, kd_weight=0.7, ce_weight=0.2, attention_weight=0.4)
    batch = assemble([record(index, 0) for index in range(5)], 0)
    terms = DistillModule(module.student, settings)(batch, scale=0.5, attention_factor=0.25)
    sums = dict(zip(SUMS, terms.sums.tolist(), strict=True))
    want = 0.5 * (0.7 * sums["kd"] + 0.2 * sums["ce"] + 0.4 * 0.25 * sums["attention"])
    assert terms.objective.item() == pytest.approx(want, rel=1e-6)
    assert sums["positions"] == batch.positions
    assert sums["attention"] > 0
    names = {"tail_bucket_kl": "kl", "ce": "ce"}
    assert all((sums["kd"] == pytest.approx(sums[name])) == (kd == loss) for loss, name in names.items())


def test_without_gradients_the_five_best_are_counted_too(module: DistillModule, record: Callable[..., Record]) -> None:
    batch = assemble([record(index, 0) for index in range(30)], 0)
    with torch.no_grad():
        sums = module(batch).sums
    assert sums.shape == (len(EVALUATION_SUMS),)
    torch.testing.assert_close(sums[: len(SUMS)], module(batch).sums)


def test_attention_is_looked_at_only_while_it_weighs(module: DistillModule, record: Callable[..., Record]) -> None:
    batch = assemble([record(index, 0) for index in range(5)], 0)
    blind = dataclasses.replace(batch, attention=None)
    assert module(batch, attention_factor=0.0).sums[3] == 0
    torch.testing.assert_close(module(blind, attention_factor=1.0), module(batch, attention_factor=0.0))
