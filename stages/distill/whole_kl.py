"""How close a student is to the teacher itself: KL over every id of the vocabulary, with the teacher at hand.

Both sides' logits exist for one block of positions at a time; the teacher's body runs once a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.distill.passages import BLOCK_ROWS, Text, blocks, load_for_measuring, student_rows
from stages.errors import StageError
from stages.events import Emit, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeReport:
    """Means over positions; nats."""

    positions: int
    kl: float
    """KL(teacher || student) over the whole vocabulary at temperature 1."""
    teacher_entropy: float
    top1_agreement: float


class WholeTeacher:
    """A causal language model from a folder, split into body and head. Raises StageError where it cannot be."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self._model.eval().to(device)
        self._check()

    @property
    def vocab_size(self) -> int:
        """Ids that its head has a row for, padding included."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def rows(self, text: Text) -> Tensor:
        """The body's output where it predicts the text's positions, [N, width]."""
        tokens = torch.tensor([[*text.prompt_ids_P.tolist(), *text.response_ids_R.tolist()]])
        first = text.prompt_ids_P.size - 1 + text.first_position
        body_1SW = self._model.base_model(tokens.to(self._model.device)).last_hidden_state
        rows_NW: Tensor = body_1SW[0, first : first + text.positions]
        return rows_NW

    def logits(self, rows_NW: Tensor) -> Tensor:
        """fp32, [N, V]."""
        logits_NV: Tensor = self._model.get_output_embeddings()(rows_NW).float()
        return logits_NV

    @torch.inference_mode()
    def _check(self) -> None:
        """Some models do more to their logits than the head does: soft caps, scales."""
        tokens = torch.tensor([[1, 2, 3]], device=self._model.device)
        whole_SV = self._model(tokens).logits[0].float()
        parts_SV = self.logits(self._model.base_model(tokens).last_hidden_state[0])
        if not torch.allclose(whole_SV, parts_SV, rtol=1e-3, atol=1e-3):
            raise StageError(
                "this teacher's logits are not those of its head alone",
                hint="leave --teacher out: the KL over its kept ids needs no teacher",
            )


@torch.inference_mode()
def whole_kl(
    model_folder: Path,
    teacher_folder: Path,
    texts: Sequence[Text],
    *,
    block_rows: int = BLOCK_ROWS,
    emit: Emit = silent,
) -> WholeReport:
    """Measure a saved student on every position of some texts, in this process.

    Raises StageError for a teacher whose logits cannot be taken block by block, or whose vocabulary is smaller.
    """
    student = load_for_measuring(model_folder)
    teacher = WholeTeacher(teacher_folder, device=student.device)
    width = student.config.vocab_size
    if teacher.vocab_size < width:
        raise StageError(
            f"the teacher knows {teacher.vocab_size} ids, the student {width}",
            hint="name the teacher whose shards the student was trained on",
        )
    sums = torch.zeros(4, dtype=torch.float64)
    for done, text in enumerate(texts, 1):
        rows_NW, rows_ND = teacher.rows(text), student_rows(student, text)
        for block in blocks(text.positions, block_rows):
            log_p_NV = teacher.logits(rows_NW[block])[:, :width].log_softmax(1)
            sums += _compared(log_p_NV, student.lm_head(rows_ND[block]).float())
        emit(Progress(stage="evaluate", done=done, total=len(texts), unit="texts beside the teacher"))
    positions, *totals = sums.tolist()
    kl, entropy, agreed = (total / positions for total in totals)
    return WholeReport(positions=int(positions), kl=kl, teacher_entropy=entropy, top1_agreement=agreed)


def _compared(log_p_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Positions, KL, entropy of p and agreements, each summed."""
    log_q_NV = logits_NV.log_softmax(1)
    p_NV = log_p_NV.exp()
    kl = (p_NV * (log_p_NV - log_q_NV)).sum(dtype=torch.float64)
    entropy = -(p_NV * log_p_NV).sum(dtype=torch.float64)
    agreed = (log_p_NV.argmax(1) == log_q_NV.argmax(1)).sum()
    return torch.stack([kl.new_tensor(len(p_NV)), kl, entropy, agreed.double()]).cpu()
