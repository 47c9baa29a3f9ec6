"""The combined objective on a small student: which positions learn, what it refuses, and what does not matter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from selections import SELECTIONS, contract_of, record_of, without_prompt_rows

from shards.record import Record
from stages.distill.batches import Batch, assemble
from stages.distill.calibration import CALIBRATION_BINS
from stages.distill.losses.table import LOSSES, DistillationLoss, require_supported
from stages.distill.objective import EVALUATION_SUMS, SUMS, DistillModule, Emphasis, left_out, told_names
from stages.distill.settings import TEMPERATURE_MODES, ObjectiveSettings
from stages.distill.temperature import BINS, Difficulty
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape

ANY_CURVE = contract_of(SELECTIONS["topk"])
NO_CURVE = contract_of(SELECTIONS["topk"], curve=())
SUITED = {name: "hybrid" if loss.draws else "adaptive" for name, loss in LOSSES.items()}
"""A selection that the loss can be computed from."""


@pytest.fixture(scope="module")
def student(shape: StudentShape) -> MiniCodformerForConditionalGeneration:
    return build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0).double()


@pytest.fixture(scope="module")
def module(student: MiniCodformerForConditionalGeneration) -> DistillModule:
    return DistillModule(student, ObjectiveSettings(), ANY_CURVE)


def batch_of(selection: str, count: int = 12) -> Batch:
    return assemble([record_of(index, SELECTIONS[selection]) for index in range(count)], 0)


def at_start(settings: ObjectiveSettings) -> Emphasis:
    return Emphasis.at(settings, 0, 10)


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


@pytest.mark.parametrize("name", LOSSES)
def test_a_record_costs_the_same_alone_and_padded_among_others(
    name: str, student: MiniCodformerForConditionalGeneration
) -> None:
    selection = SELECTIONS[SUITED[name]]
    settings = ObjectiveSettings(kd=name, temperature=1.3, temperature_mode="adaptive")
    module = DistillModule(student, settings, contract_of(selection))
    emphasis = dataclasses.replace(at_start(settings), difficulty=Difficulty(median=0.4, spread=0.1))
    records = [record_of(index, selection) for index in range(9)]
    assert len({one.ids_NK.shape[1] for one in records}) > 1, "their rows keep different numbers of ids"
    together = module(assemble(records, 0), emphasis=emphasis)
    alone = [module(assemble([one], 0), emphasis=emphasis) for one in records]
    torch.testing.assert_close(together.sums, sum(one.sums for one in alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(together.score_counts, sum(one.score_counts for one in alone))
    assert together.score_counts.shape == (BINS,)
    assert together.score_counts.sum() == sum(one.positions for one in records)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_weighted_scaled_and_reported_each_by_its_own_name(
    name: str, student: MiniCodformerForConditionalGeneration
) -> None:
    settings = ObjectiveSettings(kd=name, kd_weight=0.7, ce_weight=0.2, attention_weight=0.4, encoder_weight=0.3)
    module = DistillModule(student, settings, contract_of(SELECTIONS[SUITED[name]]))
    batch = batch_of(SUITED[name])
    terms = module(batch, scale=0.5, emphasis=Emphasis.at(settings, 2, 8))
    sums = dict(zip(SUMS, terms.sums.tolist(), strict=True))
    want = 0.7 * sums["kd"] + 0.2 * sums["ce"] + 0.5 * (0.4 * sums["attention"] + 0.3 * sums["encoder"])
    assert terms.objective.item() == pytest.approx(0.5 * want, rel=1e-6)
    assert Emphasis.at(settings, 2, 8).loss(sums) == pytest.approx(want, rel=1e-6)
    assert sums["positions"] == sums["temperature"] == batch.positions
    assert min(sums["attention"], sums["encoder"]) > 0
    assert sums["kept"] == pytest.approx(batch.teacher.log_kept_NK.exp().sum().item(), rel=1e-6)
    assert (sums["kd"] == pytest.approx(sums["kl"])) == (
        name in ("tail_bucket_kl", "ghost_kl", "conditional_kl")  # which are one thing at temperature 1
    )
    assert (0 < sums["hard_share"] <= batch.positions) == (name == "water_filled_kl")
    assert (0 < sums["hard_mass"] < sums["hard_share"]) == (name == "water_filled_kl")


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_can_be_measured_and_trained_on(
    selection: str, student: MiniCodformerForConditionalGeneration
) -> None:
    kd = "sampled_kl" if selection in ("hybrid", "sample", "counts") else "tail_bucket_kl"
    settings, contract = ObjectiveSettings(kd=kd), contract_of(SELECTIONS[selection])
    module = DistillModule(student, settings, contract)
    terms = module(batch_of(selection), emphasis=at_start(settings))
    assert terms.sums.isfinite().all()
    gradients = torch.autograd.grad(terms.objective, list(student.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    baseline = DistillModule(student, ObjectiveSettings(kd_weight=0.0), contract)
    with torch.no_grad():
        measured = baseline(batch_of(selection)).sums
    assert measured.isfinite().all()
    kl = SUMS.index("kl")
    assert measured[kl].item() == pytest.approx(terms.sums[kl].item(), rel=1e-6), "whatever is trained on"
    assert ("kept" in told_names(settings, contract)) == (selection != "counts")


@pytest.mark.parametrize(
    ("changes", "selection", "reason"),
    [
        ({"kd": "magic"}, "topk", "there are tail_bucket_kl"),
        ({"kd": "water_filled_kl"}, "hybrid", "'water_filled_kl' needs the most probable ids"),
        ({"kd": "water_filled_kl"}, "sample", "'water_filled_kl' needs the most probable ids"),
        ({"kd": "sampled_kl"}, "topk", "estimates from drawn ids; a selection 'topk' has none"),
        ({}, "counts", "this selection 'sample' keeps none: take 'sampled_kl'"),
        ({"kd": "sampled_kl", "temperature": 1.2}, "counts", "needs log-probabilities"),
        ({"kd": "sampled_kl", "temperature_mode": "adaptive"}, "counts", "needs log-probabilities"),
        ({"temperature": 4.5, "temperature_cap": 4.5}, "topk", "partition curve ends at 4"),
    ],
)
def test_what_a_selection_cannot_support_is_refused_with_the_reason(
    changes: dict[str, object], selection: str, reason: str
) -> None:
    settings, contract = ObjectiveSettings(**changes), contract_of(SELECTIONS[selection])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        require_supported(settings, contract)
    require_supported(dataclasses.replace(settings, kd_weight=0.0, kd="tail_bucket_kl"), contract)


@pytest.mark.parametrize("mode", TEMPERATURE_MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_without_a_curve_only_losses_that_need_none_are_tempered(name: str, mode: str) -> None:
    bare = dataclasses.replace(contract_of(SELECTIONS[SUITED[name]]), curve=())
    warm = ObjectiveSettings(kd=name, temperature=1.2, temperature_mode=mode)
    require_supported(warm, contract_of(SELECTIONS[SUITED[name]]))
    require_supported(ObjectiveSettings(kd=name), bare)
    if LOSSES[name].curve:
        with pytest.raises(ValueError, match="needs the tail's partition curve"):
            require_supported(warm, bare)
    else:
        require_supported(warm, bare)


def test_an_unknown_tail_is_refused_by_all_losses_that_look_at_it() -> None:
    unknown = contract_of(dataclasses.replace(SELECTIONS["topk"], tail_known=False), curve=())
    for name, loss in LOSSES.items():
        if loss.tail:
            with pytest.raises(ValueError, match="which these shards do not know"):
                require_supported(ObjectiveSettings(kd=name), unknown)
    with pytest.raises(ValueError, match="least_entropy needs the teacher's entropy"):
        require_supported(ObjectiveSettings(kd="topk_kl_renormalised", least_entropy=0.5), unknown)
    require_supported(ObjectiveSettings(kd="topk_kl_renormalised"), unknown)


@pytest.mark.parametrize("kd", ["tail_bucket_kl", "sampled_kl"])
def test_a_teacher_that_is_sure_teaches_nothing_where_least_entropy_says_so(
    kd: str, student: MiniCodformerForConditionalGeneration
) -> None:
    contract, batch = contract_of(SELECTIONS[SUITED[kd]]), batch_of(SUITED[kd])
    entropy_N = batch.teacher.entropy_N
    least = float(entropy_N.sort().values[len(entropy_N) // 3])  # which that position reaches
    alone = ObjectiveSettings(kd=kd, ce_weight=0.0)
    settings = dataclasses.replace(alone, least_entropy=least)
    chosen = DistillModule(student, settings, contract)
    unsure = batch.teacher.rows(entropy_N >= least)  # type: ignore[arg-type]  # a mask picks rows as a slice does
    few = dataclasses.replace(batch, rows_N=batch.rows_N[entropy_N >= least], teacher=unsure)
    assert 0 < few.positions < batch.positions
    whole = DistillModule(student, alone, contract)
    torch.testing.assert_close(hidden_gradient(chosen, batch), hidden_gradient(whole, few))
    kd_sum, kl_sum = (chosen(batch).sums[SUMS.index(name)] for name in ("kd", "kl"))
    torch.testing.assert_close(kd_sum, whole(few).sums[SUMS.index("kd")])
    torch.testing.assert_close(kl_sum, whole(batch).sums[SUMS.index("kl")])  # the yardstick is over all


def test_without_gradients_the_five_best_are_counted_too(module: DistillModule, record: Callable[..., Record]) -> None:
    batch = assemble([record(index, 0) for index in range(30)], 0)
    with torch.no_grad():
        sums = module(batch).sums
    assert sums.shape == (len(EVALUATION_SUMS) + 3 * CALIBRATION_BINS,)
    torch.testing.assert_close(sums[: len(SUMS)], module(batch).sums)


def test_attention_is_looked_at_only_while_it_weighs(module: DistillModule) -> None:
    batch = batch_of("topk")
    fading = at_start(ObjectiveSettings())
    gone = Emphasis.at(ObjectiveSettings(), 5, 10)
    assert (gone.attention, gone.encoder) == (0, 0)
    assert {name for name in SUMS if fading.measures(name)} == set(SUMS)
    assert {name for name in SUMS if not gone.measures(name)} == {"attention", "encoder"}
    positions = [SUMS.index(name) for name in ("attention", "encoder")]
    assert (module(batch, emphasis=fading).sums[positions] > 0).all()
    assert (module(batch, emphasis=gone).sums[positions] == 0).all()
    blind = dataclasses.replace(batch, attention=None, encoder_attention=None)
    torch.testing.assert_close(module(blind, emphasis=fading).sums, module(batch, emphasis=gone).sums)


def test_terms_that_the_shards_cannot_feed_are_left_out_and_named() -> None:
    settings, response = ObjectiveSettings(), contract_of(SELECTIONS["topk"], rows="response")
    assert list(left_out(settings, ANY_CURVE)) == []
    assert "the encoder's attention is not taught" in "".join(left_out(settings, response))
    assert "carry no attention" in "".join(left_out(settings, dataclasses.replace(response, attention=None)))
    assert "encoder" in told_names(settings, ANY_CURVE)
    assert "encoder" not in told_names(settings, response)
    records = [without_prompt_rows(record_of(index, SELECTIONS["topk"])) for index in range(5)]
    assert assemble(records, 0).encoder_attention is None


def test_a_prompts_rows_teach_the_encoder_alone(student: MiniCodformerForConditionalGeneration) -> None:
    settings = ObjectiveSettings(kd_weight=0.0, ce_weight=1e-12, attention_weight=0.0, encoder_weight=1.0)
    terms = DistillModule(student, settings, ANY_CURVE)(batch_of("topk"), emphasis=at_start(settings))
    gradients = torch.autograd.grad(terms.objective, list(student.parameters()), allow_unused=True)
    size = {
        name: 0.0 if gradient is None else gradient.abs().max().item()
        for (name, _), gradient in zip(student.named_parameters(), gradients, strict=True)
    }
    assert size["model.encoder.layers.1.attention.query_key_value.weight"] > 1e-4
    assert size["model.decoder.layers.1.cross.query.weight"] < 1e-9


def test_the_document_says_of_every_loss_what_the_table_says_and_names_every_metric() -> None:
    document = (Path(__file__).parents[2] / "docs" / "objective.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in document.splitlines() if "|" in line
    ]
    told = {row[0].strip("`"): row[2:] for row in rows if len(row) == 6 and row[0].startswith("`")}
    told.pop("objective.kd")

    def words(loss: DistillationLoss) -> list[str]:
        ids = "most probable" if loss.exact else "drawn" if loss.draws else "any"
        asked = "yes" if loss.log_probabilities else "only if T ≠ 1"
        return [asked, "yes" if loss.tail else "no", ids, "yes" if loss.curve else "no"]

    assert told == {name: words(loss) for name, loss in LOSSES.items()}
    metrics = {name for row in rows if len(row) == 2 for name in re.findall(r"`(\w+)`", row[0])}
    assert metrics >= {*SUMS, "loss"} - {"positions"}
    assert metrics >= set(TEMPERATURE_MODES)
