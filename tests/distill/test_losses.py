"""Fused row losses against a dense float64 oracle that holds every logit and leaves the gradient to autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.distill.losses.fused import fused_rows
from stages.distill.losses.rows import TeacherRows
from stages.distill.objective import LOSSES


def teacher_of(logits_NV: Tensor, k: int, labels_N: Tensor | None = None) -> TeacherRows:
    log_p_NV = logits_NV.log_softmax(1)
    kept, ids = log_p_NV.topk(k, 1)
    rest = log_p_NV.scatter(1, ids, -torch.inf).logsumexp(1)
    labels = torch.randint(logits_NV.shape[1], logits_NV.shape[:1]) if labels_N is None else labels_N
    return TeacherRows(ids_NK=ids, log_kept_NK=kept, log_rest_N=rest, labels_N=labels)


def dense_tail_bucket_kl(log_q_NV: Tensor, teacher: TeacherRows) -> Tensor:
    p, kept = teacher.log_kept_NK.exp(), log_q_NV.gather(1, teacher.ids_NK)
    inside = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter(1, teacher.ids_NK, True)
    q_rest = log_q_NV.exp().masked_fill(inside, 0).sum(1)
    rest = teacher.log_rest_N.exp()
    return (p * (teacher.log_kept_NK - kept)).sum(1) + rest * (teacher.log_rest_N - q_rest.log())


def dense_renormalised(log_q_NV: Tensor, teacher: TeacherRows) -> Tensor:
    p = teacher.log_kept_NK.exp() / teacher.log_kept_NK.exp().sum(1, keepdim=True)
    return (p * (p.log() - log_q_NV.gather(1, teacher.ids_NK))).sum(1)


def dense_ce(log_q_NV: Tensor, teacher: TeacherRows) -> Tensor:
    return -log_q_NV[torch.arange(log_q_NV.shape[0]), teacher.labels_N]


ORACLES: dict[str, Callable[[Tensor, TeacherRows], Tensor]] = {
    "tail_bucket_kl": dense_tail_bucket_kl,
    "topk_kl_renormalised": dense_renormalised,
    "ce": dense_ce,
}


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(vocab, width, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(rows, vocab, dtype=dtype) * 2


def test_every_loss_of_the_table_has_an_oracle() -> None:
    assert set(LOSSES) == set(ORACLES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block_rows", [1, 5, 64])
def test_values_and_gradients_equal_the_dense_oracle(name: str, block_rows: int) -> None:
    hidden, weight, teacher_logits = problem(23, 8, 61)
    teacher = teacher_of(teacher_logits, 7)
    fused = fused_rows(hidden, weight, teacher, [(LOSSES[name], 0.7)], block_rows=block_rows)
    (fused.objective * 3).backward()
    got = hidden.grad, weight.grad
    dense = ORACLES[name]((hidden @ weight.T).log_softmax(1), teacher).sum()
    want = torch.autograd.grad(0.7 * 3 * dense, (hidden, weight))
    torch.testing.assert_close(fused.loss_sums, dense.detach()[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_several_losses_share_one_pass_and_add_up() -> None:
    hidden, weight, teacher_logits = problem(9, 4, 31)
    # Labels both inside and outside the kept ids: their gradients meet at the same logit in the first case.
    teacher = teacher_of(teacher_logits, 5)
    teacher = teacher_of(teacher_logits, 5, torch.where(torch.arange(9) < 5, teacher.ids_NK[:, 2], teacher.labels_N))
    weights = [1.0, 0.5, 0.1]
    terms = list(zip(map(LOSSES.get, ORACLES), weights, strict=True))
    fused_rows(hidden, weight, teacher, terms, block_rows=4).objective.backward()
    log_q = (hidden @ weight.T).log_softmax(1)
    dense = sum(w * oracle(log_q, teacher).sum() for w, oracle in zip(weights, ORACLES.values(), strict=True))
    torch.testing.assert_close((hidden.grad, weight.grad), torch.autograd.grad(dense, (hidden, weight)))


def test_gradcheck() -> None:
    hidden, weight, teacher_logits = problem(4, 3, 11)
    teacher = teacher_of(teacher_logits, 3)
    terms = list(zip(LOSSES.values(), [1.0, 0.3, 0.1], strict=True))
    assert torch.autograd.gradcheck(
        lambda h, w: fused_rows(h, w, teacher, terms, block_rows=3).objective, (hidden, weight)
    )


def test_all_ids_but_one_kept_is_the_whole_kl() -> None:
    hidden, weight, teacher_logits = problem(12, 6, 40)
    teacher = teacher_of(teacher_logits, 39)
    fused = fused_rows(hidden, weight, teacher, [(LOSSES["tail_bucket_kl"], 1.0)])
    log_p, log_q = teacher_logits.log_softmax(1), (hidden @ weight.T).log_softmax(1)
    whole = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(fused.objective, whole)
    fewer = fused_rows(hidden, weight, teacher_of(teacher_logits, 8), [(LOSSES["tail_bucket_kl"], 1.0)])
    assert 0 < fewer.objective < whole


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient() -> None:
    hidden, weight, _ = problem(12, 6, 40)
    teacher = teacher_of((hidden @ weight.T).detach(), 5)
    fused = fused_rows(hidden, weight, teacher, [(LOSSES["tail_bucket_kl"], 1.0)])
    fused.objective.backward()
    assert abs(fused.objective) < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12
    assert fused.top1_N.all()


def test_an_empty_rest_and_a_vanishing_rest_stay_finite() -> None:
    hidden, weight, teacher_logits = problem(6, 4, 30, torch.float32)
    teacher = teacher_of(teacher_logits, 4)
    nothing_left = TeacherRows(
        ids_NK=teacher.ids_NK,
        log_kept_NK=teacher.log_kept_NK.log_softmax(1),
        log_rest_N=torch.full_like(teacher.log_rest_N, -torch.inf),
        labels_N=teacher.labels_N,
    )
    # A student so sure of the kept ids that 1 - sum(q) is 0 in fp32: the rest must not be computed that way.
    sure = torch.zeros(30, 4).index_put_((teacher.ids_NK[0],), torch.tensor(50.0)).requires_grad_()
    ones = torch.ones(6, 4, requires_grad=True)
    for h, w, rows in ((hidden, weight, nothing_left), (ones, sure, teacher)):
        fused = fused_rows(h, w, rows, [(LOSSES["tail_bucket_kl"], 1.0)])
        grads = torch.autograd.grad(fused.objective, (h, w))
        assert all(tensor.isfinite().all() for tensor in (fused.objective, *grads))


def test_agreement_is_with_the_students_best_and_its_five_best() -> None:
    hidden, weight, teacher_logits = problem(200, 6, 40)
    teacher = teacher_of(teacher_logits, 5)
    with torch.no_grad():
        fused = fused_rows(hidden, weight, teacher, [(LOSSES["ce"], 1.0)], block_rows=64)
    assert fused.top5_N is not None
    best = (hidden @ weight.T).topk(5, 1).indices
    first = teacher.ids_NK[:, :1]
    assert torch.equal(fused.top1_N, best[:, 0] == first[:, 0])
    assert torch.equal(fused.top5_N, (best == first).any(1))
    assert 0 < fused.top1_N.sum() < fused.top5_N.sum()


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, weight, teacher_logits = problem(20, 6, 40)
    teacher = teacher_of(teacher_logits, 5)
    terms = list(zip(LOSSES.values(), [1.0, 0.2, 0.1], strict=True))
    with torch.no_grad():
        bare = fused_rows(hidden, weight, teacher, terms, block_rows=7)
    torch.testing.assert_close(bare[:3], tuple(fused_rows(hidden, weight, teacher, terms)[:3]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_types_stay_close_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, teacher_logits = problem(64, 32, 500)
    hidden, weight = (hidden / 6).to(dtype).detach().requires_grad_(), weight.to(dtype).detach().requires_grad_()
    teacher = teacher_of(teacher_logits.float(), 16)
    fused = fused_rows(hidden, weight, teacher, [(LOSSES["tail_bucket_kl"], 1.0)], block_rows=16)
    fused.objective.backward()
    assert fused.objective.dtype == torch.float32
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    dense = dense_tail_bucket_kl((wide[0] @ wide[1].T).log_softmax(1), teacher).sum()
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


def test_no_tensor_is_larger_than_one_block_of_logits() -> None:
    rows, vocab, block = 512, 3000, 32
    hidden, weight, teacher_logits = problem(rows, 8, vocab, torch.float32)
    teacher = teacher_of(teacher_logits, 7)
    with LargestTensor() as seen:
        terms = [(loss, 1.0) for loss in LOSSES.values()]
        fused_rows(hidden, weight, teacher, terms, block_rows=block).objective.backward()
    assert seen.elements == block * vocab


def test_keeping_the_whole_vocabulary_is_refused() -> None:
    hidden, weight, teacher_logits = problem(2, 3, 8)
    with pytest.raises(ValueError, match="leave no rest"):
        fused_rows(hidden, weight, teacher_of(teacher_logits, 8), [(LOSSES["ce"], 1.0)])
