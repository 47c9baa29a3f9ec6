"""Row losses straight from hidden rows and the output weight: at no time do more than one block's logits exist.

For each block of rows, forward forms the logits once and takes from them the losses AND the gradients of hidden rows
and weight: three matrix products in all, no fourth to recompute logits in backward, which only scales what is there.

Why K + 2 numbers a row are enough: let r = log sum exp of the logits outside the kept ids. A row loss depends on the
rest only through r, so dL/dz_v = dL/dr * softmax(z outside)_v there, dL/dz_k at a kept id, plus dL/dz_label at the
label. Differentiating with respect to (z_kept, r, z_label) is left to autograd, on tensors of width K + 2. Nothing is
taken as 1 - sum(q): no cancellation, however little is left outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.distill.losses.rows import RowLoss, StudentRows, TeacherRows

# Rows whose full-width logits exist at once. More rows spread the cost of accumulating [V, D] over more of them.
BLOCK_ROWS = {"cpu": 256, "cuda": 1024}


class FusedRows(NamedTuple):
    objective: Tensor
    """Sum over rows and terms of weight * loss; the one that can be differentiated."""
    loss_sums: Tensor
    """The loss of each term, summed over rows."""
    top1_N: Tensor
    """bool: the teacher's most probable id is the student's too."""
    top5_N: Tensor | None
    """bool: it is among the student's five most probable. Looked up only where gradients are switched off, because it
    costs half as much as the logits."""


Terms = Sequence[tuple[RowLoss, float]]
"""Losses and their weights."""


def fused_rows(
    hidden_ND: Tensor, weight_VD: Tensor, teacher: TeacherRows, terms: Terms, *, block_rows: int | None = None
) -> FusedRows:
    """Losses of N rows whose logits are `hidden_ND @ weight_VD.T`, computed in fp32 or wider.

    Where gradients are switched off, only the first matrix product is done. Gradients of gradients do not exist.
    Raises ValueError where a row keeps the whole vocabulary: there is no rest to speak of.
    """
    if teacher.ids_NK.shape[1] >= weight_VD.shape[0]:
        raise ValueError(f"{teacher.ids_NK.shape[1]} kept ids of a vocabulary of {weight_VD.shape[0]} leave no rest")
    block_rows = block_rows or BLOCK_ROWS[hidden_ND.device.type]
    if torch.is_grad_enabled():
        objective, loss_sums, top1_N = _FusedRows.apply(hidden_ND, weight_VD, teacher, terms, block_rows)
        return FusedRows(objective, loss_sums, top1_N, None)
    sums, top1, top5 = [], [], []
    for rows, logits_NV in _logits(hidden_ND, weight_VD, block_rows):
        block_teacher = teacher.rows(rows)
        first_N = logits_NV.gather(1, block_teacher.ids_NK[:, :1]).squeeze(1)
        top5.append(first_N >= logits_NV.topk(5, 1, sorted=False).values.amin(1))
        buckets = _into_buckets(logits_NV, block_teacher)
        sums.append(_losses(buckets, block_teacher, terms))
        top1.append(buckets.top1_N)
    loss_sums = torch.stack(sums).sum(0)
    return FusedRows(_weighted(loss_sums, terms), loss_sums, torch.cat(top1), torch.cat(top5))


class _FusedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, teacher: TeacherRows, terms: Terms, block_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype))
        sums, top1 = [], []
        for rows, logits_NV in _logits(hidden_ND, weight_VD, block_rows):
            block_teacher = teacher.rows(rows)
            buckets = _into_buckets(logits_NV, block_teacher)
            loss_sums, gradient = _differentiate(buckets, block_teacher, terms)
            grad_NV = _spread(gradient, buckets, block_teacher).to(hidden_ND.dtype)
            torch.mm(grad_NV, weight_VD, out=grad_hidden_ND[rows])
            _add_outer(grad_weight_VD, grad_NV, hidden_ND[rows])
            sums.append(loss_sums)
            top1.append(buckets.top1_N)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        loss_sums, top1_N = torch.stack(sums).sum(0), torch.cat(top1)
        ctx.mark_non_differentiable(loss_sums, top1_N)
        return _weighted(loss_sums, terms), loss_sums, top1_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = (grad_weight_VD * grad_objective).to(ctx.weight_dtype)
        return grad_hidden_ND * grad_objective.to(grad_hidden_ND.dtype), grad_weight_VD, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buckets:
    """A block's logits as K kept ones, one for all the rest, and the label's."""

    kept_NK: Tensor
    rest_N: Tensor
    """log sum exp of the logits outside the kept ids."""
    label_N: Tensor
    top1_N: Tensor
    within_rest_NV: Tensor
    """exp(z - max z) outside the kept ids, 0 at them. It is the block's buffer."""
    total_N: Tensor
    """Row sums of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradient:
    """A block's gradient with respect to its bucket logits."""

    kept_NK: Tensor
    rest_N: Tensor
    label_N: Tensor


def _logits(hidden_ND: Tensor, weight_VD: Tensor, block_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Each block of rows with its logits, which are the taker's to overwrite: all blocks share one buffer."""
    count = hidden_ND.shape[0]
    shape = min(block_rows, count), weight_VD.shape[0]
    buffer = torch.empty(shape, dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
    for start in range(0, count, block_rows):
        rows = slice(start, min(start + block_rows, count))
        out_NV = buffer[: rows.stop - start]
        if hidden_ND.dtype == out_NV.dtype:
            torch.mm(hidden_ND[rows], weight_VD.t(), out=out_NV)
        elif hidden_ND.is_cuda:
            torch.mm(hidden_ND[rows], weight_VD.t(), out_dtype=out_NV.dtype, out=out_NV)
        else:
            # The CPU has no product of 16-bit factors with a 32-bit result: logits are rounded to 16 bits on the way.
            out_NV.copy_(torch.mm(hidden_ND[rows], weight_VD.t()))
        yield rows, out_NV


def _into_buckets(logits_NV: Tensor, teacher: TeacherRows) -> _Buckets:
    """Overwrites the logits."""
    label_N = logits_NV.gather(1, teacher.labels_N[:, None]).squeeze(1)
    kept_NK = logits_NV.gather(1, teacher.ids_NK)
    rest_NV = logits_NV.scatter_(1, teacher.ids_NK, -torch.inf)
    peak_N1 = rest_NV.amax(1, keepdim=True)
    within_rest_NV = rest_NV.sub_(peak_N1).exp_()
    total_N, peak_N = within_rest_NV.sum(1), peak_N1.squeeze(1)
    return _Buckets(
        kept_NK=kept_NK,
        rest_N=peak_N + total_N.log(),
        label_N=label_N,
        top1_N=kept_NK[:, 0] >= torch.maximum(kept_NK.amax(1), peak_N),
        within_rest_NV=within_rest_NV,
        total_N=total_N,
    )


def _losses(buckets: _Buckets, teacher: TeacherRows, terms: Terms) -> Tensor:
    log_total_N = torch.logsumexp(torch.cat([buckets.kept_NK, buckets.rest_N[:, None]], 1), 1)
    student = StudentRows(
        log_kept_NK=buckets.kept_NK - log_total_N[:, None],
        log_rest_N=buckets.rest_N - log_total_N,
        log_label_N=buckets.label_N - log_total_N,
    )
    return torch.stack([loss(student, teacher).sum() for loss, _ in terms])


def _differentiate(buckets: _Buckets, teacher: TeacherRows, terms: Terms) -> tuple[Tensor, _Gradient]:
    logits = [tensor.requires_grad_() for tensor in (buckets.kept_NK, buckets.rest_N, buckets.label_N)]
    with torch.enable_grad():
        loss_sums = _losses(buckets, teacher, terms)
        kept, rest, label = torch.autograd.grad(_weighted(loss_sums, terms), logits, materialize_grads=True)
    return loss_sums.detach(), _Gradient(kept_NK=kept, rest_N=rest, label_N=label)


def _spread(gradient: _Gradient, buckets: _Buckets, teacher: TeacherRows) -> Tensor:
    """The gradient with respect to all V logits, in the block's buffer."""
    grad_NV = buckets.within_rest_NV.mul_((gradient.rest_N / buckets.total_N)[:, None])
    grad_NV.scatter_(1, teacher.ids_NK, gradient.kept_NK)
    return grad_NV.scatter_add_(1, teacher.labels_N[:, None], gradient.label_N[:, None])


def _weighted(loss_sums: Tensor, terms: Terms) -> Tensor:
    return loss_sums @ loss_sums.new_tensor([weight for _, weight in terms])


def _add_outer(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    if total_VD.dtype == hidden_ND.dtype:
        total_VD.addmm_(grad_NV.t(), hidden_ND)
    else:
        total_VD.add_(torch.mm(grad_NV.t(), hidden_ND))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which losses are computed and gradients of the weight are summed."""
    return torch.promote_types(dtype, torch.float32)
