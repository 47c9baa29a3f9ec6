"""Fused row losses against dense float64 oracles that hold every logit and leave the gradient to autograd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from dense import BETA, NODES, ORACLES, Side, coarse, cross_entropy, teacher_of, tempered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.distill.losses import cross_entropy as ours
from stages.distill.losses.fused import RowObjective, fused_rows
from stages.distill.losses.hard_negatives import hard_mass, hard_share
from stages.distill.losses.partition import tempered_teacher
from stages.distill.losses.rows import RowLoss, Rows, StudentRows, TeacherRows, plain
from stages.distill.losses.table import LOSSES
from stages.distill.settings import ObjectiveSettings
from stages.distill.temperature import SCORES, Difficulty, row_temperatures

VOCAB, K = 61, 7
CE = plain(ours.cross_entropy)
SETTINGS = ObjectiveSettings(beta=BETA)
DIFFICULTY = Difficulty(median=0.6, spread=0.2)
CAP, CONTRAST, BASE = 1.5, 0.4, 1.2


def loss(name: str) -> RowLoss:
    return LOSSES[name].build(SETTINGS)


def objective(*terms: tuple[str, float], **changes: object) -> RowObjective:
    negatives = 1000 if any(LOSSES[name].hard_negatives for name, _ in terms) else 0
    built = RowObjective(terms=[(loss(name), weight) for name, weight in terms], hard_negatives=negatives)
    return dataclasses.replace(built, **changes)  # type: ignore[arg-type]


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(vocab, width, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(rows, vocab, dtype=dtype) * 2


def side_of(name: str, logits_NV: Tensor, **changes: object) -> Side:
    """A cache of the selection that the loss is for."""
    draws = 9 if LOSSES[name].draws else 0
    return teacher_of(logits_NV, K, draws=draws, **changes)  # type: ignore[arg-type]


def one_of(_: StudentRows, teacher: TeacherRows, value: float) -> Tensor:
    return torch.full_like(teacher.log_rest_N, value)


def by_score(student: StudentRows, teacher: TeacherRows, mode: str) -> Tensor:
    scores = SCORES[mode](student, teacher, VOCAB)
    return row_temperatures(scores, BASE, DIFFICULTY, contrast=CONTRAST, cap=CAP)


def naive_temperatures(mode: str, logits_NV: Tensor, side: Side) -> Tensor:
    """The formula of `stages.distill.temperature`, from full distributions, a row at a time."""
    p, q = coarse(side.log_p_NV, side), coarse(logits_NV.log_softmax(1), side)
    found = []
    for n in range(len(p)):
        entropy = -sum(x * math.log(x) for x in side.log_p_NV[n].exp().tolist()) / math.log(VOCAB)
        distance = math.sqrt(0.5 * sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p[n], q[n], strict=True)))
        score = {"entropy": entropy, "adaptive": distance}[mode]
        raw = BASE * math.exp(-CONTRAST * math.tanh((score - DIFFICULTY.median) / DIFFICULTY.spread))
        found.append(min(max(raw, 1.0), CAP))
    return torch.tensor(found, dtype=torch.float64)


TEMPERATURES: dict[str, Callable[[StudentRows, TeacherRows], Tensor] | None] = {
    "none": None,
    "fixed": partial(one_of, value=1.4),
    "entropy": partial(by_score, mode="entropy"),
    "adaptive": partial(by_score, mode="adaptive"),
}


def test_every_loss_of_the_table_has_an_oracle() -> None:
    assert set(LOSSES) == set(ORACLES)


@pytest.mark.parametrize("mode", TEMPERATURES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_at_every_temperature_equals_the_oracle_from_full_distributions(name: str, mode: str) -> None:
    hidden, weight, teacher_logits = problem(23, 8, VOCAB)
    kept_N = torch.arange(23) % K + 1  # rows that keep fewer than K, as adaptive selections do
    side = side_of(name, teacher_logits, kept_N=kept_N)
    whole = partial(tempered_teacher, nodes=NODES, vocab_size=VOCAB) if mode != "none" and LOSSES[name].curve else None
    what = objective((name, 0.7), temperature=TEMPERATURES[mode], temper=whole)
    fused = fused_rows(hidden, weight, side.rows, what, block_rows=5)
    (fused.objective * 3).backward()
    logits = hidden @ weight.T
    fixed = torch.full((23,), {"none": 1.0, "fixed": 1.4}.get(mode, 0.0), dtype=torch.float64)
    temperature_N = naive_temperatures(mode, logits.detach(), side) if mode in SCORES else fixed
    assert mode not in SCORES or len(set(temperature_N.tolist())) > 5
    dense = ORACLES[name](logits, side, temperature_N).sum()
    want = torch.autograd.grad(0.7 * 3 * dense, (hidden, weight))
    exact = mode == "none" or not LOSSES[name].curve
    rtol = 1e-9 if exact else 1e-6  # the curve's error, at these dense nodes
    torch.testing.assert_close(fused.sums[0], dense.detach(), rtol=rtol, atol=1e-12)
    torch.testing.assert_close((hidden.grad, weight.grad), want, rtol=rtol, atol=1e-11 if exact else 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_a_gpu_equals_the_oracle_on_the_cpu(name: str) -> None:
    hidden, weight, teacher_logits = problem(23, 8, VOCAB)
    side = side_of(name, teacher_logits)
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight)]
    rows = {field.name: getattr(side.rows, field.name) for field in dataclasses.fields(side.rows)}
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in rows.items()}
    fused = fused_rows(*on_gpu, TeacherRows(**moved), objective((name, 1.0)), block_rows=5)
    dense = ORACLES[name](hidden @ weight.T, side, torch.ones(23, dtype=torch.float64)).sum()
    want = torch.autograd.grad(dense, (hidden, weight))
    torch.testing.assert_close(fused.sums[0].cpu(), dense.detach(), rtol=1e-9, atol=1e-12)
    found = [gradient.cpu() for gradient in torch.autograd.grad(fused.objective, on_gpu)]
    torch.testing.assert_close(found, list(want), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block_rows", [1, 5, 64])
def test_blocks_do_not_show(block_rows: int) -> None:
    hidden, weight, teacher_logits = problem(23, 8, VOCAB)
    side = side_of("water_filled_kl", teacher_logits)
    changes = {"temperature": TEMPERATURES["adaptive"], "temper": partial(tempered_teacher, nodes=NODES, vocab_size=61)}
    found = []
    for rows in (block_rows, 23):
        fused = fused_rows(hidden, weight, side.rows, objective(("water_filled_kl", 1.0), **changes), block_rows=rows)
        found.append((fused.objective, fused.top1_N, *torch.autograd.grad(fused.objective, (hidden, weight))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_several_losses_share_one_pass_and_add_up() -> None:
    hidden, weight, teacher_logits = problem(9, 4, 31)
    # Labels both inside and outside the kept ids: their gradients meet at the same logit in the first case.
    side = teacher_of(teacher_logits, 5)
    labels = torch.where(torch.arange(9) < 5, side.rows.ids_NK[:, 2], side.rows.labels_N)
    side = teacher_of(teacher_logits, 5, labels_N=labels)
    weights = {"tail_bucket_kl": 1.0, "reverse_kl": 0.5, "residual_to_label": 0.2}
    what = objective(*weights.items())
    what = dataclasses.replace(what, terms=[*what.terms, (CE, 0.1)])
    fused_rows(hidden, weight, side.rows, what, block_rows=4).objective.backward()
    logits, ones = hidden @ weight.T, torch.ones(9, dtype=torch.float64)
    dense = sum(share * ORACLES[name](logits, side, ones).sum() for name, share in weights.items())
    dense = dense + 0.1 * cross_entropy(logits, side, ones).sum()
    torch.testing.assert_close((hidden.grad, weight.grad), torch.autograd.grad(dense, (hidden, weight)))


def test_gradcheck() -> None:
    hidden, weight, teacher_logits = problem(4, 3, 11)
    side = teacher_of(teacher_logits, 3)
    what = objective(("tail_bucket_kl", 1.0), ("jensen_shannon", 0.3), ("topk_kl_renormalised", 0.1))
    what = dataclasses.replace(
        what,
        temperature=TEMPERATURES["fixed"],
        temper=partial(tempered_teacher, nodes=NODES, vocab_size=11),
        hard_negatives=4,
    )
    assert torch.autograd.gradcheck(
        lambda h, w: fused_rows(h, w, side.rows, what, block_rows=3).objective, (hidden, weight)
    )


WHOLE = {
    "tail_bucket_kl": lambda p, q: (p * (p / q).log()).sum(),
    "water_filled_kl": lambda p, q: (p * (p / q).log()).sum(),
    "ghost_kl": lambda p, q: (p * (p / q).log()).sum(),
    "conditional_kl": lambda p, q: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(),
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_all_ids_but_one_kept_is_the_whole_divergence_and_fewer_a_lower_bound(name: str) -> None:
    hidden, weight, teacher_logits = problem(12, 6, 40)
    p, q = teacher_logits.softmax(1), (hidden @ weight.T).softmax(1)
    whole = WHOLE[name](p, q)
    values = [fused_rows(hidden, weight, teacher_of(teacher_logits, k).rows, objective((name, 1.0))) for k in (39, 8)]
    torch.testing.assert_close(values[0].objective, whole)
    assert 0 < values[1].objective < whole


@pytest.mark.parametrize("mode", TEMPERATURES)
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sampled_kl", "residual_to_label", "topk_kl_renormalised"}))
def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(name: str, mode: str) -> None:
    hidden, weight, _ = problem(12, 6, 40)
    side = teacher_of((hidden @ weight.T).detach(), 5)
    whole = partial(tempered_teacher, nodes=NODES, vocab_size=40) if mode != "none" and LOSSES[name].curve else None
    what = objective((name, 1.0), temperature=TEMPERATURES[mode], temper=whole)
    fused = fused_rows(hidden, weight, side.rows, what)
    fused.objective.backward()
    curve = 1e-6 if whole else 1e-12
    if name == "total_variation":  # it has a kink there
        assert abs(fused.objective) < max(curve, 1e-10)
        return
    assert abs(fused.objective) < curve
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < max(curve, 1e-11)
    assert fused.top1_N.all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sampled_kl"}))
def test_an_empty_rest_and_a_vanishing_rest_stay_finite(name: str) -> None:
    hidden, weight, teacher_logits = problem(6, 4, 30, torch.float32)
    teacher = teacher_of(teacher_logits, 4).rows
    nothing_left = dataclasses.replace(
        teacher,
        log_kept_NK=teacher.log_kept_NK.log_softmax(1),
        log_rest_N=torch.full_like(teacher.log_rest_N, -torch.inf),
        log_tail_N=torch.full_like(teacher.log_rest_N, -torch.inf),
        curve_NJ=torch.full((6, 2 * len(NODES)), -torch.inf),
    )
    # A student so sure of the kept ids that 1 - sum(q) is 0 in fp32: the rest must not be computed that way.
    sure = torch.zeros(30, 4).index_put_((teacher.ids_NK[0],), torch.tensor(50.0)).requires_grad_()
    ones = torch.ones(6, 4, requires_grad=True)
    for mode in ("none", "fixed"):
        whole = partial(tempered_teacher, nodes=NODES, vocab_size=30) if mode == "fixed" else None
        what = objective((name, 1.0), temperature=TEMPERATURES[mode], temper=whole)
        for h, w, rows in ((hidden, weight, nothing_left), (ones, sure, teacher)):
            fused = fused_rows(h, w, rows, what)
            grads = torch.autograd.grad(fused.objective, (h, w))
            assert all(tensor.isfinite().all() for tensor in (fused.objective, *grads))


def test_agreement_is_with_the_students_best_and_its_five_best() -> None:
    hidden, weight, teacher_logits = problem(200, 6, 40)
    side = teacher_of(teacher_logits, 5)
    best = (hidden @ weight.T).topk(5, 1).indices
    first = side.rows.ids_NK[:, :1]
    for negatives in (0, 4):
        with torch.no_grad():
            fused = fused_rows(
                hidden, weight, side.rows, RowObjective(terms=[(CE, 1.0)], hard_negatives=negatives), block_rows=64
            )
        assert fused.top5_N is not None
        assert torch.equal(fused.top1_N, best[:, 0] == first[:, 0])
        assert torch.equal(fused.top5_N, (best == first).any(1))
        assert 0 < fused.top1_N.sum() < fused.top5_N.sum()


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, weight, teacher_logits = problem(20, 6, 40)
    side = teacher_of(teacher_logits, 5)
    what = objective(("water_filled_kl", 1.0), ("reverse_kl", 0.2))
    with torch.no_grad():
        bare = fused_rows(hidden, weight, side.rows, what, block_rows=7)
    torch.testing.assert_close(bare[:3], tuple(fused_rows(hidden, weight, side.rows, what)[:3]))


def test_a_term_that_weighs_nothing_is_measured_and_has_no_part_in_the_gradient() -> None:
    hidden, weight, teacher_logits = problem(20, 6, 40)
    side = teacher_of(teacher_logits, 5)

    def broken(rows: Rows) -> Tensor:
        return rows.student.log_rest_N * math.nan

    what = RowObjective(terms=[(CE, 1.0), (broken, 0.0)])
    fused = fused_rows(hidden, weight, side.rows, what)
    fused.objective.backward()
    assert fused.sums[1].isnan()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["tail_bucket_kl", "water_filled_kl"])
def test_narrow_types_stay_close_to_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, teacher_logits = problem(64, 32, 500)
    hidden, weight = (hidden / 6).to(dtype).detach().requires_grad_(), weight.to(dtype).detach().requires_grad_()
    side = teacher_of(teacher_logits.float(), 16)
    fused = fused_rows(hidden, weight, side.rows, objective((name, 1.0)), block_rows=16)
    fused.objective.backward()
    assert fused.objective.dtype == torch.float32
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    full = Side(log_p_NV=side.log_p_NV.double(), rows=side.rows)
    dense = ORACLES[name](wide[0] @ wide[1].T, full, torch.ones(64, dtype=torch.float64)).sum()
    want = torch.autograd.grad(dense, wide)
    assert abs(fused.objective - dense) / dense < tolerance
    for got, exact in zip((hidden.grad, weight.grad), want, strict=True):
        assert got is not None
        assert got.dtype == dtype
        assert (got.double() - exact).norm() / exact.norm() < tolerance


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return result


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sampled_kl"}))
def test_no_tensor_is_larger_than_one_block_of_logits(name: str) -> None:
    rows, vocab, block = 512, 3000, 32
    hidden, weight, teacher_logits = problem(rows, 8, vocab, torch.float32)
    side = teacher_of(teacher_logits, 7)
    what = objective((name, 1.0), temperature=TEMPERATURES["adaptive"])
    what = dataclasses.replace(
        what,
        temper=partial(tempered_teacher, nodes=NODES, vocab_size=vocab),
        terms=[*what.terms, (hard_share, 0.0), (hard_mass, 0.0)],
        hard_negatives=32,
    )
    with LargestTensor() as seen:
        fused_rows(hidden, weight, side.rows, what, block_rows=block).objective.backward()
    assert seen.elements == block * vocab


def test_keeping_the_whole_vocabulary_is_refused() -> None:
    hidden, weight, teacher_logits = problem(2, 3, 8)
    with pytest.raises(ValueError, match="leave no rest"):
        fused_rows(hidden, weight, teacher_of(teacher_logits, 8).rows, objective(("tail_bucket_kl", 1.0)))


def test_the_oracle_tempers_every_id() -> None:
    log_p = torch.randn(3, 20, dtype=torch.float64).log_softmax(1)
    power = log_p.exp() ** 0.5
    torch.testing.assert_close(tempered(log_p, torch.full((3,), 2.0)).exp(), power / power.sum(1, keepdim=True))
