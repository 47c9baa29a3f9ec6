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
    """sum over rows and losses of weight * loss; the one that can be differentiated."""
    loss_sums: Tensor
    """Each loss summed over rows, [losses]."""
    top1_N: Tensor
    """bool: the teacher's most probable id is the student's too."""
    top5_N: Tensor
    """bool: it is among the student's five most probable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradient:
    """A block's gradient with respect to its bucket logits."""

    kept_NK: Tensor
    rest_N: Tensor
    label_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    rows: slice
    loss_sums: Tensor
    gradient: _Gradient
    rank_N: Tensor
    """How many ids the student puts above the teacher's most probable one."""
    rest_NV: Tensor
    """exp(z - max z) outside the kept ids, 0 at them; the block's buffer, free for the taker to overwrite."""
    rest_total_N: Tensor
    """Its row sums."""


def fused_rows(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher: TeacherRows,
    losses: Sequence[RowLoss],
    weights: Sequence[float],
    *,
    block_rows: int | None = None,
) -> FusedRows:
    """Losses of N rows whose logits are `hidden_ND @ weight_VD.T`, computed in fp32 or wider.

    Where gradients are switched off, only the first matrix product is done. Gradients of gradients do not exist.
    Raises ValueError where a row keeps the whole vocabulary: there is no rest to speak of.
    """
    if teacher.ids_NK.shape[1] >= weight_VD.shape[0]:
        raise ValueError(f"{teacher.ids_NK.shape[1]} kept ids of a vocabulary of {weight_VD.shape[0]} leave no rest")
    step = block_rows or BLOCK_ROWS[hidden_ND.device.type]
    if torch.is_grad_enabled():
        return FusedRows(*_FusedRows.apply(hidden_ND, weight_VD, teacher, losses, weights, step))
    blocks = _blocks(hidden_ND, weight_VD, teacher, losses, weights, step)
    return _collect([(block.loss_sums, block.rank_N) for block in blocks], weights)


class _FusedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teacher: TeacherRows,
        losses: Sequence[RowLoss],
        weights: Sequence[float],
        step: int,
    ) -> FusedRows:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype))
        results = []
        for block in _blocks(hidden_ND, weight_VD, teacher, losses, weights, step):
            grad_logits_NV = _grad_logits(block, teacher.rows(block.rows)).to(hidden_ND.dtype)
            torch.mm(grad_logits_NV, weight_VD, out=grad_hidden_ND[block.rows])
            _add_outer(grad_weight_VD, grad_logits_NV, hidden_ND[block.rows])
            results.append((block.loss_sums, block.rank_N))
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        fused = _collect(results, weights)
        ctx.mark_non_differentiable(*fused[1:])
        return fused

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = (grad_weight_VD * grad_objective).to(ctx.weight_dtype)
        return grad_hidden_ND * grad_objective.to(grad_hidden_ND.dtype), grad_weight_VD, None, None, None, None


def _blocks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher: TeacherRows,
    losses: Sequence[RowLoss],
    weights: Sequence[float],
    step: int,
) -> Iterator[_Block]:
    count = hidden_ND.shape[0]
    buffer = torch.empty(min(step, count), weight_VD.shape[0], dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        logits_NV = _logits(hidden_ND[rows], weight_VD, buffer[: rows.stop - rows.start])
        yield _reduce(rows, logits_NV, teacher.rows(rows), losses, weights)


def _reduce(
    rows: slice, logits_NV: Tensor, teacher: TeacherRows, losses: Sequence[RowLoss], weights: Sequence[float]
) -> _Block:
    """Turn a block's logits, in place, into what its losses and gradients need."""
    label_N = logits_NV.gather(1, teacher.labels_N[:, None]).squeeze(1)
    kept_NK = logits_NV.gather(1, teacher.ids_NK)
    rank_N = (logits_NV > kept_NK[:, :1]).sum(1)
    rest_NV = logits_NV.scatter_(1, teacher.ids_NK, -torch.inf)
    peak_N1 = rest_NV.amax(1, keepdim=True)
    rest_NV.sub_(peak_N1).exp_()
    total_N = rest_NV.sum(1)
    rest_N = peak_N1.squeeze(1) + total_N.log()
    loss_sums, gradient = _differentiate(kept_NK, rest_N, label_N, teacher, losses, weights)
    return _Block(
        rows=rows, loss_sums=loss_sums, gradient=gradient, rank_N=rank_N, rest_NV=rest_NV, rest_total_N=total_N
    )


def _differentiate(
    kept_NK: Tensor,
    rest_N: Tensor,
    label_N: Tensor,
    teacher: TeacherRows,
    losses: Sequence[RowLoss],
    weights: Sequence[float],
) -> tuple[Tensor, _Gradient]:
    logits = [tensor.requires_grad_() for tensor in (kept_NK, rest_N, label_N)]
    with torch.enable_grad():
        log_total_N = torch.logsumexp(torch.cat([kept_NK, rest_N[:, None]], 1), 1)
        student = StudentRows(
            log_kept_NK=kept_NK - log_total_N[:, None],
            log_rest_N=rest_N - log_total_N,
            log_label_N=label_N - log_total_N,
        )
        loss_sums = torch.stack([loss(student, teacher).sum() for loss in losses])
        objective = loss_sums @ loss_sums.new_tensor(weights)
        kept, rest, label = torch.autograd.grad(objective, logits, materialize_grads=True)
    return loss_sums.detach(), _Gradient(kept_NK=kept, rest_N=rest, label_N=label)


def _grad_logits(block: _Block, teacher: TeacherRows) -> Tensor:
    """dL/dz over the whole width, in the block's buffer."""
    grad_NV = block.rest_NV.mul_((block.gradient.rest_N / block.rest_total_N)[:, None])
    grad_NV.scatter_(1, teacher.ids_NK, block.gradient.kept_NK)
    return grad_NV.scatter_add_(1, teacher.labels_N[:, None], block.gradient.label_N[:, None])


def _logits(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    if hidden_ND.dtype == out_NV.dtype:
        return torch.mm(hidden_ND, weight_VD.t(), out=out_NV)
    if hidden_ND.is_cuda:
        return torch.mm(hidden_ND, weight_VD.t(), out_dtype=out_NV.dtype, out=out_NV)
    # The CPU has no product of 16-bit factors with a 32-bit result: the logits themselves are rounded to 16 bits here.
    return out_NV.copy_(torch.mm(hidden_ND, weight_VD.t()))


def _add_outer(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    if total_VD.dtype == hidden_ND.dtype:
        total_VD.addmm_(grad_NV.t(), hidden_ND)
    else:
        total_VD.add_(torch.mm(grad_NV.t(), hidden_ND))


def _collect(results: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> FusedRows:
    sums, ranks = zip(*results, strict=True)
    loss_sums, rank_N = torch.stack(sums).sum(0), torch.cat(ranks)
    return FusedRows(loss_sums @ loss_sums.new_tensor(weights), loss_sums, rank_N < 1, rank_N < 5)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which losses are computed and gradients of the weight are summed."""
    return torch.promote_types(dtype, torch.float32)
