"""Attention matching against a float64 oracle that goes key by key."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from selections import SELECTIONS, record_of

from shards.record import Record
from stages.distill.batches import assemble
from stages.distill.losses.attention import TeacherAttention, attention_kl, encoder_attention_kl, student_layers


def oracle(student: list[list[float]], positions: list[int], weights: list[float], prompt: float, row: int) -> float:
    """One row of one layer."""
    if prompt == 0:
        return 0.0
    keys = student[row][1:]
    total = sum(keys)
    value, kept_p, kept_q = 0.0, 0.0, 0.0
    for position, weight in zip(positions, weights, strict=True):
        if position < 0:
            continue
        p, q = weight / prompt, student[row][position] / total
        value += p * math.log(p / q) if p > 0 else 0.0
        kept_p, kept_q = kept_p + p, kept_q + q
    rest = 1 - kept_p
    return prompt * (value + (rest * math.log(rest / (1 - kept_q)) if rest > 1e-6 else 0.0))


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_oracle_key_by_key(record: Callable[..., Record], seed: int) -> None:
    torch.manual_seed(seed)
    records = [record(index, seed) for index in range(20)]
    batch = assemble(records, 0)
    assert batch.attention is not None
    mask_NP = batch.prompt_mask_BP[batch.rows_N // batch.decoder_ids_BT.shape[1]]
    scores = [torch.randn(mask_NP.shape).masked_fill(~mask_NP, -torch.inf) for _ in range(2)]
    students = [score.softmax(1) for score in scores]
    want = sum(
        oracle(
            students[layer].double().tolist(),
            batch.attention.positions_LNM[layer, row].tolist(),
            batch.attention.weights_LNM[layer, row].tolist(),
            float(batch.attention.prompt_LN[layer, row]),
            row,
        )
        for layer in range(2)
        for row in range(batch.positions)
    )
    got = attention_kl(students, batch.attention)
    assert want > 1
    assert float(got) == pytest.approx(want / 2, rel=1e-4)


def test_the_encoders_term_is_the_mean_over_a_prompts_rows_key_by_key() -> None:
    torch.manual_seed(0)
    records = [record_of(index, SELECTIONS["topk"]) for index in range(20)]
    batch = assemble(records, 0)
    prompt = batch.encoder_attention
    assert prompt is not None
    width = batch.prompt_ids_BP.shape[1]
    attention_BPP = [torch.randn(len(records), width, width).softmax(2) for _ in range(2)]
    want = 0.0
    for b, one in enumerate(records):
        summary, rows = one.attention, max(one.prompt_ids_P.size - 2, 0)
        assert summary is not None
        for layer in range(2):
            for row in range(rows):
                t = row + 1  # the rows are those of positions 1 .. P-2; such a row sees keys 0 .. t
                seen = [[float(x) for x in attention_BPP[layer][b, t, : t + 1].double()]]
                cached = summary.positions_LNM[layer, row].tolist(), summary.weights_LNM[layer, row].tolist()
                value = oracle(seen, *cached, float(summary.prompt_LN[layer, row]), 0)
                want += value / 2 * one.positions / rows
    got = encoder_attention_kl([look.flatten(0, 1)[prompt.rows_N] for look in attention_BPP], prompt)
    assert want > 1
    assert float(got) == pytest.approx(want, rel=1e-4)


def teacher(positions: list[int], weights: list[float], prompt: float) -> TeacherAttention:
    return TeacherAttention(
        positions_LNM=torch.tensor([[positions]]),
        weights_LNM=torch.tensor([[weights]]),
        prompt_LN=torch.tensor([[prompt]]),
    )


def test_the_sinks_weight_does_not_matter_and_agreement_costs_nothing() -> None:
    cached = teacher([2, 1], [0.3, 0.1], 0.5)
    for sink in (0.0, 0.4, 0.9):
        keys = torch.tensor([0.2, 0.6, 0.15, 0.05]) * (1 - sink)  # 3 and 4 are the rest, 0.1 of 0.5
        student = torch.cat([torch.tensor([sink]), keys])[None].requires_grad_()
        value = attention_kl([student], cached)
        assert abs(value.item()) < 1e-6
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient[0, 0] == 0


def test_a_student_that_looks_nowhere_stays_finite() -> None:
    for cached in (teacher([1, -1], [0.4, 0.0], 0.6), teacher([-1, -1], [0.0, 0.0], 0.0)):
        student = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
        value = attention_kl([student], cached)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_teacher_layers_teach_the_decoder_layer_at_their_own_depth() -> None:
    assert student_layers(3, 3) == [0, 1, 2]
    assert student_layers(2, 6) == [2, 5]
    assert student_layers(3, 2) == [0, 1, 1]
    assert student_layers(1, 4) == [3]
