"""A student beside its teacher and the label, token by token, from a record of a shard: the teacher is not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.contract import Contract
from shards.record import Record
from stages.distill.batches import Batch, assemble
from stages.distill.losses.attention import student_layers
from stages.distill.losses.rows import Rows, StudentRows, TeacherRows, log_difference
from stages.distill.losses.table import yardstick
from stages.distill.passages import BLOCK_ROWS, blocks
from stages.student.model import MiniCodformerForConditionalGeneration, StudentHidden

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """A token, or a token of the prompt, with its share: of the probability, or of the attention."""

    text: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedToken:
    """One predicted position."""

    position: int
    """Of the response."""
    label: str
    kl: float
    """In nats, by the set's yardstick."""
    label_by_teacher: float | None
    """The label's probability; None where the teacher's was not kept."""
    label_by_student: float
    teacher: tuple[Likely, ...]
    """The most probable tokens; empty where the set keeps no probabilities."""
    student: tuple[Likely, ...]
    teacher_looks: tuple[Likely, ...]
    """Where in the prompt the last summarised layer looked; empty where the set has no attention."""
    student_looks: tuple[Likely, ...]
    """The same of the student's layer that it teaches."""


@torch.no_grad()
def compare_record(
    student: MiniCodformerForConditionalGeneration,
    record: Record,
    contract: Contract,
    decode: Decode,
    *,
    top: int = 3,
    block_rows: int = BLOCK_ROWS,
) -> list[ComparedToken]:
    """Every predicted position of a record, with the `top` most probable tokens of either side.

    Logits exist for one block of positions at a time.
    """
    batch = assemble([record], contract.start_token_id).to(student.device)
    hidden = student.hidden(
        batch.prompt_ids_BP,
        batch.prompt_mask_BP,
        batch.decoder_ids_BT,
        batch.decoder_mask_BT,
        need_attention=batch.attention is not None,
    )
    rows_ND = student.output_hidden(hidden.decoder_BTD.flatten(0, 1)[batch.rows_N])
    teacher = batch.teacher
    measured = [
        _measured(student.lm_head(rows_ND[block]), teacher.rows(block), contract, top)
        for block in blocks(batch.positions, block_rows)
    ]
    kl_N, label_N, best_NK, ids_NK = (torch.cat(parts).tolist() for parts in zip(*measured, strict=True))
    looks = _looks(record, batch, hidden, decode, top)
    compared = []
    for n, kl in enumerate(kl_N):
        label = int(teacher.labels_N[n])
        kept = _kept(teacher, n)
        compared.append(
            ComparedToken(
                position=record.first_position + n,
                label=decode([label]),
                kl=kl,
                label_by_teacher=kept.get(label),
                label_by_student=label_N[n],
                teacher=tuple(Likely(text=decode([id_]), share=p) for id_, p in list(kept.items())[:top]),
                student=tuple(
                    Likely(text=decode([id_]), share=p) for id_, p in zip(ids_NK[n], best_NK[n], strict=True)
                ),
                teacher_looks=looks[n][0] if looks else (),
                student_looks=looks[n][1] if looks else (),
            )
        )
    return compared


def _measured(logits_NV: Tensor, teacher: TeacherRows, contract: Contract, top: int) -> tuple[Tensor, ...]:
    """The KL, the label's probability, and the `top` largest probabilities with their ids."""
    log_q_NV = logits_NV.float().log_softmax(-1)
    best, rows = log_q_NV.topk(min(top, log_q_NV.shape[1])), _rows(log_q_NV, teacher)
    return yardstick(contract)(rows), rows.student.log_label_N.exp(), best.values.exp(), best.indices


def _rows(log_q_NV: Tensor, teacher: TeacherRows) -> Rows:
    """The buckets of the whole distribution, at temperature 1."""
    log_kept_NK = log_q_NV.gather(1, teacher.ids_NK)
    mass_N = log_kept_NK.masked_fill(~teacher.present_NK, -torch.inf).logsumexp(1)
    log_rest_N = log_difference(torch.zeros_like(mass_N), mass_N)
    student = StudentRows(
        log_kept_NK=log_kept_NK,
        log_hard_NM=log_kept_NK[:, :0],
        log_rest_N=log_rest_N,
        log_easy_N=log_rest_N,
        log_label_N=log_q_NV.gather(1, teacher.labels_N[:, None])[:, 0],
    )
    ones_N = torch.ones_like(mass_N)
    return Rows(
        student=student, teacher=teacher, temperature_N=ones_N, tempered_student=student, tempered_teacher=teacher
    )


def _kept(teacher: TeacherRows, n: int) -> dict[int, float]:
    """Probability of each kept id by falling size; nothing where the set keeps none."""
    present_K = teacher.present_NK[n]
    ids, logs = teacher.ids_NK[n][present_K].tolist(), teacher.log_kept_NK[n][present_K]
    if logs.isnan().any():
        return {}
    return dict(sorted(zip(ids, logs.exp().tolist(), strict=True), key=lambda pair: -pair[1]))


def _looks(
    record: Record, batch: Batch, hidden: StudentHidden, decode: Decode, top: int
) -> list[tuple[tuple[Likely, ...], tuple[Likely, ...]]]:
    """Where teacher and student looked at each position; key 0, the teacher's sink, is left out of both."""
    attention = batch.attention
    if attention is None or hidden.cross_attention is None or record.prompt_ids_P.size < 2:
        return []
    texts = [decode([token_id]) for token_id in record.prompt_ids_P.tolist()]
    layers = student_layers(len(attention.prompt_LN), len(hidden.cross_attention))
    seen_NP = hidden.cross_attention[layers[-1]].flatten(0, 1)[batch.rows_N][:, 1:].cpu()
    weights_NM, keys_NM = seen_NP.topk(min(top, seen_NP.shape[1]))
    looks = []
    for n in range(batch.positions):
        keys, weights = (part[-1, n, :top].tolist() for part in (attention.positions_LNM, attention.weights_LNM))
        theirs = [Likely(text=texts[key], share=w) for key, w in zip(keys, weights, strict=True) if key >= 0]
        keys, weights = (keys_NM[n] + 1).tolist(), weights_NM[n].tolist()
        ours = [Likely(text=texts[key], share=w) for key, w in zip(keys, weights, strict=True)]
        looks.append((tuple(theirs), tuple(ours)))
    return looks
