"""How well a student foretells text that nobody cached: measured against the text's own tokens, without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.distill.calibration import CALIBRATION_BINS, calibration_error, calibration_table
from stages.distill.evaluate import perplexity
from stages.distill.passages import BLOCK_ROWS, Text, blocks, load_for_measuring, student_rows
from stages.events import Emit, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    """Means over the responses' tokens; nats."""

    positions: int
    cross_entropy: float
    perplexity: float
    top1_accuracy: float
    """How often the student's most probable token is the text's."""
    top5_accuracy: float
    """How often the text's token is among the student's five."""
    ece: float
    """Expected calibration error of the student's most probable token."""


@torch.inference_mode()
def evaluate_text(
    model_folder: Path, texts: Sequence[Text], *, block_rows: int = BLOCK_ROWS, emit: Emit = silent
) -> TextReport:
    """Measure a saved student in this process; logits exist for one block of positions at a time."""
    student = load_for_measuring(model_folder)
    sums = torch.zeros(3, dtype=torch.float64)
    calibration_C3 = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64)
    for done, text in enumerate(texts, 1):
        rows_ND = student_rows(student, text)
        first = text.first_position
        labels_N = torch.from_numpy(text.response_ids_R[first : first + text.positions]).long().to(student.device)
        for block in blocks(text.positions, block_rows):
            log_q_NV = student.lm_head(rows_ND[block]).float().log_softmax(1)
            found, table_C3 = _measured(log_q_NV, labels_N[block])
            sums += found.cpu()
            calibration_C3 += table_C3.cpu()
        emit(Progress(stage="evaluate", done=done, total=len(texts), unit="texts"))
    positions = sum(text.positions for text in texts)
    loss, top1, top5 = (sums / positions).tolist()
    return TextReport(
        positions=positions,
        cross_entropy=loss,
        perplexity=perplexity(loss),
        top1_accuracy=top1,
        top5_accuracy=top5,
        ece=calibration_error(calibration_C3),
    )


def _measured(log_q_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and hits among one and among five, each summed, and the table of calibration."""
    best = log_q_NV.topk(5, dim=1)
    hits_N5 = best.indices == labels_N[:, None]
    loss = -log_q_NV.gather(1, labels_N[:, None]).sum(dtype=torch.float64)
    table_C3 = calibration_table(best.values[:, 0].exp().double(), hits_N5[:, 0])
    return torch.stack([loss, hits_N5[:, 0].sum(), hits_N5.sum()]), table_C3
