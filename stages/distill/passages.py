"""Prompts and responses, whether a teacher has read them or not, and the rows of the student that predict them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from shards.record import Int32
from stages.distill.batches import pad

if TYPE_CHECKING:
    from stages.student.model import MiniCodformerForConditionalGeneration


BLOCK_ROWS = 128
"""Positions whose logits exist at a time, unless told otherwise."""


class Text(Protocol):
    """What measuring a student takes: N positions of a response, from `first_position` on. A `Record` is one."""

    @property
    def prompt_ids_P(self) -> Int32: ...
    @property
    def response_ids_R(self) -> Int32: ...
    @property
    def first_position(self) -> int: ...
    @property
    def positions(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A text that nobody cached; every token of its response counts."""

    prompt_ids_P: Int32
    response_ids_R: Int32

    @property
    def first_position(self) -> int:
        return 0

    @property
    def positions(self) -> int:
        return self.response_ids_R.size


def load_for_measuring(folder: Path) -> MiniCodformerForConditionalGeneration:
    """A saved student in fp32, on a GPU where there is one; else it scans as in training on a CPU."""
    from stages.distill.compiled_scan import compile_scans
    from stages.student.model import MiniCodformerForConditionalGeneration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student: MiniCodformerForConditionalGeneration
    student = MiniCodformerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    student.eval().to(device)
    if device.type == "cpu":
        compile_scans(student)
    return student


def student_rows(student: MiniCodformerForConditionalGeneration, text: Text) -> Tensor:
    """What the output weight multiplies, where the student predicts the text's positions, [N, D]."""
    start = student.config.decoder_start_token_id
    prompt_1P, prompt_mask_1P = pad([text.prompt_ids_P])
    decoder_1T = torch.tensor([[start, *text.response_ids_R[:-1].tolist()]])
    hidden = student.hidden(
        prompt_1P.to(student.device), prompt_mask_1P.to(student.device), decoder_1T.to(student.device)
    )
    rows_ND = hidden.decoder_BTD[0, text.first_position : text.first_position + text.positions]
    return student.output_hidden(rows_ND)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover `count` of them."""
    for start in range(0, count, size):
        yield slice(start, start + size)
