"""What stage two minimises: the one place that combines the terms.

    L = kd_weight * KD + ce_weight * CE + attention_weight * attention + encoder_weight * encoder attention

each a mean over the predicted positions of the GLOBAL batch, so that no term depends on ranks or micro-batches. What
changes from step to step, weights and temperature, is an `Emphasis`: a function of the step and, where temperatures
follow difficulty, of the batch before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from shards.contract import Contract
from stages.distill.batches import Batch
from stages.distill.losses.attention import TeacherAttention, attention_kl, encoder_attention_kl, student_layers
from stages.distill.losses.cross_entropy import cross_entropy
from stages.distill.losses.fused import RowObjective, fused_rows
from stages.distill.losses.hard_negatives import hard_mass, hard_share
from stages.distill.losses.partition import tempered_teacher
from stages.distill.losses.rows import Rows, StudentRows, TeacherRows, plain
from stages.distill.losses.table import LOSSES, distillation_term, require_supported, yardstick
from stages.distill.schedules import attention_factor, weight_factor
from stages.distill.settings import ObjectiveSettings
from stages.distill.temperature import SCORES, Difficulty, base_temperature, count_scores, row_temperatures

if TYPE_CHECKING:
    from stages.student.model import MiniCodformerForConditionalGeneration

SUMS = (
    *("kd", "ce", "kl", "kept", "temperature", "hard_share", "hard_mass"),
    *("top1", "attention", "encoder", "positions"),
)
"""What `LossTerms.sums` holds, each summed over positions; docs/objective.md says what each is."""
EVALUATION_SUMS = (*SUMS, "top5")
"""What it holds where gradients are switched off, before the table of `FusedRows.calibration_C3`, row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emphasis:
    """The objective of one step."""

    kd: float
    """Weights of the terms."""
    ce: float
    attention: float
    encoder: float
    temperature: float
    """The base: of every position, or before the position's own difficulty moves it."""
    difficulty: Difficulty | None
    """Of the batch before; None at the first step, and where no temperature asks for it."""

    @classmethod
    def at(cls, settings: ObjectiveSettings, step: int, total: int, difficulty: Difficulty | None = None) -> Emphasis:
        """At 0-based `step` of `total`."""

        def factor(final: float) -> float:
            return weight_factor(step, total, final=final, shape=settings.weight_shape)

        fade = attention_factor(step, total)
        return cls(
            kd=settings.kd_weight * factor(settings.kd_final),
            ce=settings.ce_weight * factor(settings.ce_final),
            attention=settings.attention_weight * fade,
            encoder=settings.encoder_weight * fade,
            temperature=base_temperature(settings, step, total),
            difficulty=difficulty,
        )

    def measures(self, term: str) -> bool:
        """Whether a step finds out this one of SUMS: attention is not looked at where it weighs nothing."""
        return {"attention": self.attention, "encoder": self.encoder}.get(term, 1.0) > 0

    def loss(self, means: Mapping[str, float]) -> float:
        """The objective's value, from the means of its terms."""
        weights = {"kd": self.kd, "ce": self.ce, "attention": self.attention, "encoder": self.encoder}
        return sum(weight * means[name] for name, weight in weights.items())


class LossTerms(NamedTuple):
    objective: Tensor
    """Weighted sum over this batch's positions, times the scale that was asked for."""
    sums: Tensor
    """The numbers that SUMS names, or those of EVALUATION_SUMS and the calibration; fp64, without gradients."""
    record_kl_B: Tensor
    """fp64: `kl` of SUMS, of each record of the batch by itself."""
    score_counts: Tensor
    """fp64, the histogram of `stages.distill.temperature`; empty where no temperature depends on difficulty."""


class DistillModule(nn.Module):
    """Student and loss in one forward: the tied embedding is whole there, whatever partitions the parameters.

    Raises ValueError for an objective that the shards of this contract cannot support.
    """

    def __init__(
        self, student: MiniCodformerForConditionalGeneration, settings: ObjectiveSettings, contract: Contract
    ) -> None:
        super().__init__()
        require_supported(settings, contract)
        self.student = student
        self._settings, self._contract = settings, contract
        self._loss = LOSSES[settings.kd]
        self._score = SCORES.get(settings.temperature_mode) if settings.kd_weight else None

    def forward(self, batch: Batch, *, scale: float = 1.0, emphasis: Emphasis | None = None) -> LossTerms:
        """`scale` is 1 / positions of the global batch, times what the engine divides gradients by.

        Without an emphasis: as at the first step, but for attention, which is not looked at.
        """
        if emphasis is None:
            emphasis = dataclasses.replace(Emphasis.at(self._settings, 0, 1), attention=0.0, encoder=0.0)
        attention = batch.attention if emphasis.attention else None
        encoder_attention = batch.encoder_attention if emphasis.encoder else None
        hidden = self.student.hidden(
            batch.prompt_ids_BP,
            batch.prompt_mask_BP,
            batch.decoder_ids_BT,
            batch.decoder_mask_BT,
            need_attention=attention is not None or encoder_attention is not None,
        )
        weight_VD = self.student.output_weight()
        assert weight_VD.shape[0] == self.student.config.vocab_size, "the tied embedding is partitioned"
        fused = fused_rows(
            self.student.output_hidden(hidden.decoder_BTD.flatten(0, 1)[batch.rows_N]),
            weight_VD,
            batch.teacher,
            self._row_objective(emphasis),
        )
        zero = fused.objective.new_zeros(())
        crossed = encoded = zero
        if attention is not None:
            assert hidden.cross_attention is not None
            crossed = attention_kl(_taught(hidden.cross_attention, batch.rows_N, attention), attention)
        if encoder_attention is not None:
            assert hidden.encoder_attention is not None
            taught = _taught(hidden.encoder_attention, encoder_attention.rows_N, encoder_attention.teacher)
            encoded = encoder_attention_kl(taught, encoder_attention)
        objective = fused.objective + emphasis.attention * crossed + emphasis.encoder * encoded
        *row_sums, score_counts = fused.sums if self._score else (*fused.sums, zero.new_zeros(0))
        found = [*row_sums, fused.top1_N.sum(), crossed, encoded, torch.tensor(batch.positions)]
        if fused.top5_N is not None and fused.calibration_C3 is not None:
            found += [fused.top5_N.sum(), *fused.calibration_C3.flatten()]
        sums = torch.stack([tensor.detach().double().to(weight_VD.device) for tensor in found])
        records, width = batch.decoder_ids_BT.shape
        record_kl_B = sums.new_zeros(records).index_add_(0, batch.rows_N // width, fused.told_N.double())
        return LossTerms(objective * scale, sums, record_kl_B, score_counts.double())

    def _row_objective(self, emphasis: Emphasis) -> RowObjective:
        """Terms in the order of SUMS, then the histogram of scores."""
        settings, negatives = self._settings, self._loss.hard_negatives
        kept = _kept if self._contract.selection.logprobs else _nothing
        shares = (hard_share, hard_mass) if negatives else (_nothing, _nothing)
        measured = [yardstick(self._contract), kept, _temperature, *shares, *([self._count] if self._score else [])]
        tempers = bool(settings.kd_weight) and (self._score is not None or emphasis.temperature > 1)
        return RowObjective(
            terms=(
                (distillation_term(settings, self._contract), emphasis.kd),
                (plain(cross_entropy), emphasis.ce),
                *((measure, 0.0) for measure in measured),
            ),
            temperature=partial(self._temperatures, emphasis=emphasis) if tempers else None,
            temper=self._temper if tempers and self._loss.curve else None,
            hard_negatives=settings.hard_negatives if negatives else 0,
            told=SUMS.index("kl"),
        )

    def _temperatures(self, student: StudentRows, teacher: TeacherRows, *, emphasis: Emphasis) -> Tensor:
        if self._score is None:
            return torch.full_like(student.log_rest_N, emphasis.temperature)
        return row_temperatures(
            self._score(student, teacher, self._contract.vocab_size),
            emphasis.temperature,
            emphasis.difficulty,
            contrast=self._settings.temperature_contrast,
            cap=self._settings.temperature_cap,
        )

    def _temper(self, teacher: TeacherRows, temperature_N: Tensor) -> TeacherRows:
        return tempered_teacher(teacher, temperature_N, self._contract.curve, self._contract.vocab_size)

    def _count(self, rows: Rows) -> Tensor:
        assert self._score is not None
        return count_scores(self._score(rows.student, rows.teacher, self._contract.vocab_size))


def left_out(settings: ObjectiveSettings, contract: Contract) -> Iterator[str]:
    """Terms that weigh nothing because the shards lack what they need, one sentence each."""
    weights = {"attention": settings.attention_weight, "encoder": settings.encoder_weight}
    if contract.attention is None:
        if any(weights.values()):
            yield "the shards carry no attention: that term is left out"
    elif contract.attention.rows != "all" and weights["encoder"]:
        yield "the shards carry no attention of the prompt's own rows: the encoder's attention is not taught"


def taught_attention(settings: ObjectiveSettings, contract: Contract) -> set[str]:
    """Those of "attention" and "encoder" that weigh something, and that the shards have what it takes for."""
    held = {} if contract.attention is None else {"attention": settings.attention_weight}
    if contract.attention is not None and contract.attention.rows == "all":
        held["encoder"] = settings.encoder_weight
    return {term for term, weight in held.items() if weight}


def told_names(settings: ObjectiveSettings, contract: Contract) -> list[str]:
    """Those of SUMS that say something in a run, in their order."""
    silent = {"positions"} | ({"attention", "encoder"} - taught_attention(settings, contract))
    if not contract.selection.logprobs:
        silent |= {"kept"}
    if not (settings.tempers and settings.kd_weight):
        silent |= {"temperature"}
    if not LOSSES[settings.kd].hard_negatives:
        silent |= {"hard_share", "hard_mass"}
    return [name for name in SUMS if name not in silent]


def needs_attention(settings: ObjectiveSettings, contract: Contract) -> bool:
    """Whether the student must give its attention weights in some step."""
    return bool(taught_attention(settings, contract))


def _taught(layers: tuple[Tensor, ...], rows_N: Tensor, teacher: TeacherAttention) -> list[Tensor]:
    """For each of the teacher's layers, the rows of the student's layer that it teaches."""
    return [layers[layer].flatten(0, 1)[rows_N] for layer in student_layers(len(teacher.prompt_LN), len(layers))]


def _kept(rows: Rows) -> Tensor:
    """The teacher's mass on the kept ids, at the temperature of the loss."""
    return rows.tempered_teacher.log_kept_NK.exp().sum(1)


def _temperature(rows: Rows) -> Tensor:
    return rows.temperature_N


def _nothing(rows: Rows) -> Tensor:
    return torch.zeros_like(rows.temperature_N)
