"""Row losses straight from hidden rows and the output weight: at no time do more than one block's logits exist.

For each block of rows, forward forms the logits once and takes from them the losses AND the gradients of hidden rows
and weight: three matrix products in all, no fourth to recompute logits in backward, which only scales what is there.

Why a few numbers a row are enough: let r = log sum exp of the logits outside the named ids, which are those that the
teacher kept and, if a loss wants them, the student's M best others. A row loss depends on the logits outside only
through r, and through r_T = log sum exp (z/T) where it is tempered. So there dL/dz_v = dL/dr * softmax(z)_v +
dL/dr_T * softmax(z/T)_v / T, and dL/dz at a named id or the label is that with respect to it. Differentiating with
respect to these few numbers is left to autograd, on narrow tensors. Nothing is taken as 1 - sum(q): no cancellation,
however little is left outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.distill.calibration import calibration_table
from stages.distill.losses.rows import RowLoss, Rows, StudentRows, TeacherRows
from stages.wide_topk import select_topk

# Rows whose full-width logits exist at once. More rows spread the cost of accumulating [V, D] over more of them.
BLOCK_ROWS = {"cpu": 256, "cuda": 1024}

Terms = Sequence[tuple[RowLoss, float]]
"""Losses and their weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowObjective:
    """What is computed of every row."""

    terms: Terms
    temperature: Callable[[StudentRows, TeacherRows], Tensor] | None = None
    """The temperature of each row, from the row at temperature 1; never differentiated. None: 1."""
    temper: Callable[[TeacherRows, Tensor], TeacherRows] | None = None
    """The teacher at it. None: no loss looks at the tempered sides, and no second softmax is computed."""
    hard_negatives: int = 0
    """M: how many of the student's best ids outside the kept ones `StudentRows.log_hard_NM` shows."""
    told: int = 0
    """Which of the terms `FusedRows.told_N` tells row by row."""


class FusedRows(NamedTuple):
    objective: Tensor
    """Sum over rows and terms of weight * loss; the one that can be differentiated."""
    sums: tuple[Tensor, ...]
    """Each term summed over rows: a scalar, or [C] of a loss that gives C numbers a row."""
    top1_N: Tensor
    """bool: the first kept id is the student's most probable too: the teacher's most probable, or of a sample the most
    probable one that was drawn."""
    told_N: Tensor
    """The value of one term, that of `RowObjective.told`, in each row; without a gradient."""
    top5_N: Tensor | None
    """bool: it is among the student's five most probable. Looked up only where gradients are switched off, because it
    costs half as much as the logits."""
    calibration_C3: Tensor | None
    """Looked up with it: the table of `stages.distill.calibration`, of the student's most probable id as a guess at the
    label."""


def fused_rows(
    hidden_ND: Tensor, weight_VD: Tensor, teacher: TeacherRows, what: RowObjective, *, block_rows: int | None = None
) -> FusedRows:
    """Losses of N rows whose logits are `hidden_ND @ weight_VD.T`, computed in fp32 or wider.

    Where gradients are switched off, only the first matrix product is done. Gradients of gradients do not exist.
    Raises ValueError where a row keeps the whole vocabulary: there is no rest to speak of.
    """
    if teacher.ids_NK.shape[1] >= weight_VD.shape[0]:
        raise ValueError(f"{teacher.ids_NK.shape[1]} kept ids of a vocabulary of {weight_VD.shape[0]} leave no rest")
    block_rows = block_rows or BLOCK_ROWS[hidden_ND.device.type]
    if torch.is_grad_enabled():
        objective, top1_N, told_N, *sums = _FusedRows.apply(hidden_ND, weight_VD, teacher, what, block_rows)
        return FusedRows(objective, tuple(sums), top1_N, told_N, None, None)
    sums, told, top1, top5, calibration = [], [], [], [], []
    for rows, logits_NV, spare_NV in _logits(hidden_ND, weight_VD, what, block_rows):
        block_teacher = teacher.rows(rows)
        first_N = logits_NV.gather(1, block_teacher.ids_NK[:, :1]).squeeze(1)
        best_N5, ids_N5 = logits_NV.topk(5, 1)
        top5.append(first_N >= best_N5[:, 4])
        confidence_N = (best_N5[:, 0] - logits_NV.logsumexp(1)).exp()
        calibration.append(calibration_table(confidence_N, ids_N5[:, 0] == block_teacher.labels_N))
        block = _Block(logits_NV, spare_NV, block_teacher, what)
        block_sums, told_N = _sums(block.rows(), what)
        sums.append(block_sums)
        told.append(told_N)
        top1.append(block.top1_N)
    totals, rows_told = _added(sums), (torch.cat(top1), torch.cat(told), torch.cat(top5))
    return FusedRows(_weighted(totals, what), totals, *rows_told, torch.stack(calibration).sum(0))


class _FusedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, teacher: TeacherRows, what: RowObjective, block_rows: int
    ) -> tuple[Tensor, ...]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype))
        sums, told, top1 = [], [], []
        for rows, logits_NV, spare_NV in _logits(hidden_ND, weight_VD, what, block_rows):
            block = _Block(logits_NV, spare_NV, teacher.rows(rows), what)
            block_sums, told_N, grad_NV = _differentiate(block, what)
            grad_NV = grad_NV.to(hidden_ND.dtype)
            torch.mm(grad_NV, weight_VD, out=grad_hidden_ND[rows])
            _add_outer(grad_weight_VD, grad_NV, hidden_ND[rows])
            sums.append(block_sums)
            told.append(told_N)
            top1.append(block.top1_N)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        totals, top1_N, told_N = _added(sums), torch.cat(top1), torch.cat(told)
        ctx.mark_non_differentiable(top1_N, told_N, *totals)
        return _weighted(totals, what), top1_N, told_N, *totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = (grad_weight_VD * grad_objective).to(ctx.weight_dtype)
        return grad_hidden_ND * grad_objective.to(grad_hidden_ND.dtype), grad_weight_VD, None, None, None


def rows_from_logits(logits_NV: Tensor, teacher: TeacherRows, what: RowObjective) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same objective, and each term's sum, of logits that are there already: of a model that is not ours.

    Only the objective can be differentiated, once, with respect to the logits.
    """
    objective, *sums = _RowsFromLogits.apply(logits_NV, teacher, what)
    return objective, tuple(sums)


class _RowsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, teacher: TeacherRows, what: RowObjective) -> tuple[Tensor, ...]:
        grad_NV = torch.empty_like(logits_NV)
        sums = []
        for start in range(0, logits_NV.shape[0], BLOCK_ROWS[logits_NV.device.type]):
            rows = slice(start, start + BLOCK_ROWS[logits_NV.device.type])
            buffer_NV = logits_NV[rows].to(_wide(logits_NV.dtype), copy=True)
            spare_NV = None if what.temper is None else torch.empty_like(buffer_NV)
            block_sums, _, block_grad_NV = _differentiate(_Block(buffer_NV, spare_NV, teacher.rows(rows), what), what)
            grad_NV[rows] = block_grad_NV.to(grad_NV.dtype)
            sums.append(block_sums)
        ctx.save_for_backward(grad_NV)
        totals = _added(sums)
        ctx.mark_non_differentiable(*totals)
        return _weighted(totals, what), *totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad_objective.to(grad_NV.dtype), None, None


@dataclass(slots=True)
class _Leaves:
    """The few numbers a row that losses depend on: logits of the named ids and the label, r, and r_T if tempered."""

    kept_NK: Tensor
    hard_NM: Tensor
    label_N: Tensor
    rest_N: Tensor
    tempered_rest_N: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        found = (self.kept_NK, self.hard_NM, self.label_N, self.rest_N, self.tempered_rest_N)
        return [tensor for tensor in found if tensor is not None]


class _Block:
    """A block's logits, reduced to leaves. Both buffers, that of the logits and the spare one, are overwritten.

    Afterwards `_outside` holds softmax numerators of the ids outside (0 at named ones) at the temperature of each row,
    and `_plain_outside` those at temperature 1, the same tensor where nothing is tempered.
    """

    def __init__(self, logits_NV: Tensor, spare_NV: Tensor | None, teacher: TeacherRows, what: RowObjective) -> None:
        self._teacher = teacher
        label_N = logits_NV.gather(1, teacher.labels_N[:, None]).squeeze(1)
        kept_NK = logits_NV.gather(1, teacher.ids_NK)
        logits_NV.scatter_(1, teacher.ids_NK, -torch.inf)
        # One id at least stays outside, for r to be a number.
        candidates = min(what.hard_negatives, logits_NV.shape[1] - teacher.ids_NK.shape[1] - 1)
        hard_NM, self._hard_ids_NM = kept_NK[:, :0], teacher.ids_NK[:, :0]
        if candidates > 0:
            hard_NM, self._hard_ids_NM = select_topk(logits_NV, candidates)
            logits_NV.scatter_(1, self._hard_ids_NM, -torch.inf)
        peak_N1 = logits_NV.amax(1, keepdim=True)
        self._outside = logits_NV.sub_(peak_N1)
        peak_N = peak_N1.squeeze(1)
        best_N = torch.cat([kept_NK, hard_NM, peak_N1], 1).amax(1)
        self.top1_N = kept_NK[:, 0] >= best_N
        self._plain_outside = torch.exp(self._outside, out=self._outside if spare_NV is None else spare_NV)
        self._plain_total_N = self._total_N = self._plain_outside.sum(1)
        self.leaves = _Leaves(kept_NK, hard_NM, label_N, peak_N + self._plain_total_N.log())
        self._temperature_N = torch.ones_like(label_N)
        if what.temperature is not None:
            self._temperature_N = what.temperature(self._student(1.0, self.leaves.rest_N), teacher)
        self._tempered_teacher = teacher
        if what.temper is not None:
            self._tempered_teacher = what.temper(teacher, self._temperature_N)
            self._outside.div_(self._temperature_N[:, None]).exp_()
            self._total_N = self._outside.sum(1)
            self.leaves.tempered_rest_N = peak_N / self._temperature_N + self._total_N.log()

    def rows(self) -> Rows:
        student = warm = self._student(1.0, self.leaves.rest_N)
        if self.leaves.tempered_rest_N is not None:
            warm = self._student(self._temperature_N[:, None], self.leaves.tempered_rest_N)
        return Rows(
            student=student,
            teacher=self._teacher,
            temperature_N=self._temperature_N,
            tempered_student=warm,
            tempered_teacher=self._tempered_teacher,
        )

    def gradient(self, by: _Leaves) -> Tensor:
        """With respect to all V logits, from that with respect to the leaves; in the block's buffer."""
        if by.tempered_rest_N is None:
            grad_NV = self._outside.mul_((by.rest_N / self._total_N)[:, None])
        else:
            grad_NV = self._outside.mul_((by.tempered_rest_N / (self._temperature_N * self._total_N))[:, None])
            grad_NV.addcmul_(self._plain_outside, (by.rest_N / self._plain_total_N)[:, None])
        ids_NJ = torch.cat([self._teacher.ids_NK, self._hard_ids_NM, self._teacher.labels_N[:, None]], 1)
        return grad_NV.scatter_add_(1, ids_NJ, torch.cat([by.kept_NK, by.hard_NM, by.label_N[:, None]], 1))

    def _student(self, temperature: Tensor | float, rest_N: Tensor) -> StudentRows:
        kept_NK, hard_NM, label_N1 = (
            logits / temperature for logits in (self.leaves.kept_NK, self.leaves.hard_NM, self.leaves.label_N[:, None])
        )
        everything_NJ = [kept_NK.masked_fill(~self._teacher.present_NK, -torch.inf), hard_NM, rest_N[:, None]]
        log_total_N1 = torch.cat(everything_NJ, 1).logsumexp(1, keepdim=True)
        return StudentRows(
            log_kept_NK=kept_NK - log_total_N1,
            log_hard_NM=hard_NM - log_total_N1,
            log_rest_N=torch.cat(everything_NJ[1:], 1).logsumexp(1) - log_total_N1.squeeze(1),
            log_easy_N=rest_N - log_total_N1.squeeze(1),
            log_label_N=(label_N1 - log_total_N1).squeeze(1),
        )


def _logits(
    hidden_ND: Tensor, weight_VD: Tensor, what: RowObjective, block_rows: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Each block of rows with its logits and, for tempering, a second buffer like it.

    Both are the taker's to overwrite: all blocks share them.
    """
    count = hidden_ND.shape[0]
    shape = min(block_rows, count), weight_VD.shape[0]
    buffer = torch.empty(shape, dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
    spare = None if what.temper is None else torch.empty_like(buffer)
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
        yield rows, out_NV, None if spare is None else spare[: rows.stop - start]


def _differentiate(block: _Block, what: RowObjective) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Sums of the terms, the term that is told row by row, and the gradient with respect to the logits."""
    gradients: tuple[Tensor, ...]
    leaves = [tensor.requires_grad_() for tensor in block.leaves.tensors()]
    with torch.enable_grad():
        sums, told_N = _sums(block.rows(), what)
        objective = _weighted(sums, what)
        if objective.requires_grad:
            gradients = torch.autograd.grad(objective, leaves, materialize_grads=True)
        else:  # nothing weighs
            gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return tuple(total.detach() for total in sums), told_N, block.gradient(_Leaves(*gradients))


def _sums(rows: Rows, what: RowObjective) -> tuple[tuple[Tensor, ...], Tensor]:
    values = [loss(rows) for loss, _ in what.terms]
    return tuple(value.sum(0) for value in values), values[what.told].detach()


def _added(sums: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(found).sum(0) for found in zip(*sums, strict=True))


def _weighted(sums: Sequence[Tensor], what: RowObjective) -> Tensor:
    """A term that weighs nothing has no part in the gradient, not even where it is not finite."""
    weighing = [weight * total for (_, weight), total in zip(what.terms, sums, strict=True) if weight]
    return torch.stack(weighing).sum() if weighing else sums[0].new_zeros(())


def _add_outer(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    if total_VD.dtype == hidden_ND.dtype:
        total_VD.addmm_(grad_NV.t(), hidden_ND)
    else:
        total_VD.add_(torch.mm(grad_NV.t(), hidden_ND))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which losses are computed and gradients of the weight are summed."""
    return torch.promote_types(dtype, torch.float32)
