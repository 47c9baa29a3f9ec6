"""Schedules and parameter groups: who learns how fast, and when."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from stages.distill.optimizer import LIQUID_RATE, make_optimizer, parameter_groups, set_rates
from stages.distill.schedules import attention_factor, learning_rate_factor, weight_factor
from stages.distill.settings import DistillSettings
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape


@pytest.fixture(scope="module")
def student() -> MiniCodformerForConditionalGeneration:
    small = StudentShape(hidden_size=16, encoder_layers=2, decoder_layers=2, heads=2, intermediate_size=24)
    return build_student(small, vocab_size=50, start_token_id=0, end_token_id=1, seed=0)


def test_the_rate_rises_linearly_then_falls_to_its_final_share() -> None:
    rates = [learning_rate_factor(step, 100, warmup=0.1, final=0.05) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[10 + 89 // 2] == pytest.approx(0.5 * (1 + 0.05), abs=0.02)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_rates_too(total: int) -> None:
    rates = [learning_rate_factor(step, total, warmup=0.05, final=0.05) for step in range(total)]
    assert rates[0] == 1.0
    assert all(0.05 <= rate <= 1 for rate in rates)


def test_attention_fades_out_by_half_of_the_run() -> None:
    factors = [attention_factor(step, 40) for step in range(40)]
    assert factors[0] == 1.0
    assert factors[10] == 0.5
    assert not any(factors[20:])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.5, 3.0])
def test_a_terms_weight_goes_from_all_of_it_to_its_final_share(shape: str, final: float) -> None:
    shares = [weight_factor(step, 41, final=final, shape=shape) for step in range(41)]
    assert shares[0] == 1.0
    assert shares[-1] == pytest.approx(final)
    assert shares[20] == pytest.approx((1 + final) / 2)
    assert sorted(shares, reverse=final < 1) == shares
    assert (shares[10] == pytest.approx(1 + (final - 1) / 4)) == (shape == "linear")
    assert weight_factor(0, 1, final=final, shape=shape) == 1.0


def test_every_parameter_is_in_one_group_at_the_rate_of_its_depth(
    student: MiniCodformerForConditionalGeneration,
) -> None:
    settings = DistillSettings(learning_rate=1.0, layer_decay=0.5, embedding_rate=0.25, weight_decay=0.1)
    groups = parameter_groups(student, settings)
    placed = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters())) == len(placed)

    def rate_and_decay(name: str) -> tuple[float, float]:
        group = placed[id(student.get_parameter(name))]
        assert group["lr"] == group["peak"]
        return group["lr"], group["weight_decay"]

    assert rate_and_decay("model.encoder.embed_tokens.weight") == (0.25, 0.1)
    assert rate_and_decay("model.encoder.layers.0.mlp.down.weight") == (0.125, 0.1)
    assert rate_and_decay("model.decoder.layers.1.mlp.down.weight") == (1.0, 0.1)
    assert rate_and_decay("model.decoder.layers.1.mlp_norm.weight") == (1.0, 0.0)
    assert rate_and_decay("model.decoder.layers.0.mixer.recurrence.rho") == (0.5 * LIQUID_RATE, 0.0)
    assert rate_and_decay("model.decoder.layers.0.mixer.recurrence.conductance_bias") == (0.5 * LIQUID_RATE, 0.0)


def test_set_rates_scales_each_group_by_its_own_peak(student: MiniCodformerForConditionalGeneration) -> None:
    optimizer = make_optimizer(student, dataclasses.replace(DistillSettings(), layer_decay=0.5))
    set_rates(optimizer.param_groups, 0.5)
    set_rates(optimizer.param_groups, 0.1)
    assert all(group["lr"] == pytest.approx(0.1 * group["peak"]) for group in optimizer.param_groups)
    assert len({group["lr"] for group in optimizer.param_groups}) > 3
