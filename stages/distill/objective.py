"""What stage two minimises: the one place that combines the terms.

    L = kd_weight * KD + ce_weight * CE + attention_weight * f(step) * attention

each a mean over the predicted positions of the GLOBAL batch, so that no term depends on ranks or micro-batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from stages.distill.batches import Batch
from stages.distill.losses.attention import TeacherAttention, attention_kl, student_layers
from stages.distill.losses.cross_entropy import cross_entropy
from stages.distill.losses.distillation import tail_bucket_kl, topk_kl_renormalised
from stages.distill.losses.fused import fused_rows
from stages.distill.losses.rows import RowLoss
from stages.distill.settings import ObjectiveSettings

if TYPE_CHECKING:
    from stages.student.model import MiniCodformerForConditionalGeneration

LOSSES: dict[str, RowLoss] = {
    "tail_bucket_kl": tail_bucket_kl,
    "topk_kl_renormalised": topk_kl_renormalised,
    "ce": cross_entropy,
}
"""What `objective.kd` can name."""

SUMS = ("kd", "ce", "kl", "attention", "top1", "positions")
"""What `LossTerms.sums` holds, each summed over positions; `kl` is tail_bucket_kl, whatever `kd` is."""
EVALUATION_SUMS = (*SUMS, "top5")
"""What it holds where gradients are switched off."""


class LossTerms(NamedTuple):
    objective: Tensor
    """Weighted sum over this batch's positions, times the scale that was asked for."""
    sums: Tensor
    """The numbers that SUMS names, or EVALUATION_SUMS; fp64, without gradients."""


class DistillModule(nn.Module):
    """Student and loss in one forward: the tied embedding is whole there, whatever partitions the parameters.

    Raises ValueError for a loss that LOSSES does not have.
    """

    def __init__(self, student: MiniCodformerForConditionalGeneration, settings: ObjectiveSettings) -> None:
        super().__init__()
        if settings.kd not in LOSSES:
            raise ValueError(f"objective.kd is {settings.kd!r}; there are {', '.join(LOSSES)}")
        self.student = student
        self._kd = LOSSES[settings.kd]
        self._settings = settings

    def forward(self, batch: Batch, *, scale: float = 1.0, attention_factor: float = 0.0) -> LossTerms:
        """`scale` is 1 / positions of the global batch, times what the engine divides gradients by."""
        attention_weight = self._settings.attention_weight * attention_factor
        matched = batch.attention if attention_weight > 0 else None
        hidden = self.student.hidden(
            batch.prompt_ids_BP,
            batch.prompt_mask_BP,
            batch.decoder_ids_BT,
            batch.decoder_mask_BT,
            need_attention=matched is not None,
        )
        weight_VD = self.student.output_weight()
        assert weight_VD.shape[0] == self.student.config.vocab_size, "the tied embedding is partitioned"
        fused = fused_rows(
            self.student.output_hidden(hidden.decoder_BTD.flatten(0, 1)[batch.rows_N]),
            weight_VD,
            batch.teacher,
            ((self._kd, self._settings.kd_weight), (cross_entropy, self._settings.ce_weight), (tail_bucket_kl, 0.0)),
        )
        objective, attention = fused.objective, fused.objective.new_zeros(())
        if matched is not None:
            assert hidden.cross_attention is not None
            attention = _match(hidden.cross_attention, batch.rows_N, matched)
            objective = objective + attention_weight * attention
        found = (*fused.loss_sums, attention, fused.top1_N.sum(), torch.tensor(batch.positions))
        top5 = [] if fused.top5_N is None else [fused.top5_N.sum()]
        sums = torch.stack([tensor.detach().double().to(weight_VD.device) for tensor in (*found, *top5)])
        return LossTerms(objective * scale, sums)


def _match(cross_attention: tuple[Tensor, ...], rows_N: Tensor, teacher: TeacherAttention) -> Tensor:
    taught = student_layers(teacher.positions_LNM.shape[0], len(cross_attention))
    return attention_kl([cross_attention[layer].flatten(0, 1)[rows_N] for layer in taught], teacher)
