"""Any causal language model as the student: shards as a torch Dataset with the loss that belongs to them.

For Hugging Face's Trainer, a `Distillation` is three things: its items are the training set, `collate` pads them and
`loss` compares the model's logits with the teacher's cached distributions. The model needs the teacher's vocabulary and
nothing else. Positions are averaged over all of an update, whatever accumulates to it or shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shards.reader import ShardSet
from shards.record import Record
from stages.distill.batches import teacher_rows
from stages.distill.losses.cross_entropy import cross_entropy
from stages.distill.losses.fused import RowObjective, rows_from_logits
from stages.distill.losses.rows import TeacherRows, plain
from stages.distill.losses.table import LOSSES, distillation_term, require_supported
from stages.distill.settings import ObjectiveSettings

NOT_TRAINED = -100
"""The label that Trainer does not count."""


class Distillation(Dataset[Record]):
    """The records of a split, to distil any causal language model of the teacher's vocabulary from.

    Raises ShardError for shards that cannot be read, ValueError for an objective that they do not support, or one with
    temperatures or schedules, which need the training loop of this project.
    """

    def __init__(self, shards: Path | str, *, split: str = "train", objective: ObjectiveSettings | None = None) -> None:
        shard_set, settings = ShardSet(shards), objective or ObjectiveSettings()
        require_supported(settings, shard_set.contract)
        if settings.tempers or (settings.kd_final, settings.ce_final) != (1.0, 1.0):
            raise ValueError("temperatures and weights that change from step to step need this project's own training")
        self.contract = shard_set.contract
        self._records = shard_set.split(split)
        self._what = RowObjective(
            terms=(
                (distillation_term(settings, shard_set.contract), settings.kd_weight),
                (plain(cross_entropy), settings.ce_weight),
            ),
            hard_negatives=settings.hard_negatives if LOSSES[settings.kd].hard_negatives else 0,
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def collate(self, records: Sequence[Record]) -> dict[str, Any]:
        """What the model reads, prompt and response in a row, and `labels` for `loss`. Padding is on the right."""
        sequences = [np.concatenate([record.prompt_ids_P, record.response_ids_R]) for record in records]
        lengths = np.array([sequence.size for sequence in sequences])
        width = int(lengths.max())
        mask_BS = np.arange(width) < lengths[:, None]
        ids_BS = np.zeros(mask_BS.shape, np.int64)
        ids_BS[mask_BS] = np.concatenate(sequences)
        labels_BS = np.full_like(ids_BS, NOT_TRAINED)
        rows = []
        for b, record in enumerate(records):
            first = record.prompt_ids_P.size + record.first_position
            span = slice(first, first + record.positions)
            labels_BS[b, span] = ids_BS[b, span]
            rows.append(np.arange(span.start, span.stop) - 1 + b * width)
        teacher = teacher_rows(records)
        return {
            "input_ids": torch.from_numpy(ids_BS),
            "attention_mask": torch.from_numpy(mask_BS.astype(np.int64)),
            "labels": Labels(
                labels_BS=torch.from_numpy(labels_BS),
                rows_N=torch.from_numpy(np.concatenate(rows)),
                **{
                    name: _as_integers(value)
                    for name in TeacherRows.__slots__
                    if (value := getattr(teacher, name)) is not None
                },
            ),
        }

    def loss(self, outputs: Any, labels: Labels, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The objective of a batch, as a mean over `num_items_in_batch` positions (None: over its own).

        Trainer takes it as `compute_loss_func`. Raises ValueError where the model's vocabulary is too small.
        """
        logits_BSV = outputs["logits"]
        if logits_BSV.shape[-1] < self.contract.vocab_size:
            raise ValueError(
                f"the model knows {logits_BSV.shape[-1]} ids, the teacher {self.contract.vocab_size}: not one tokenizer"
            )
        fields: dict[str, Any] = dict.fromkeys(TeacherRows.__slots__)
        fields |= {name: _as_were(value) for name, value in labels.items() if name in fields}
        teacher = TeacherRows(**fields)
        rows_N = labels["rows_N"]
        objective, _ = rows_from_logits(logits_BSV.flatten(0, 1)[rows_N], teacher, self._what)
        return objective / (rows_N.numel() if num_items_in_batch is None else num_items_in_batch)


class Labels(dict[str, Tensor]):
    """A batch's labels and the teacher's side of them. To Trainer, which counts positions, it is a tensor of labels."""

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(key) if isinstance(key, str) else self["labels_BS"][key]

    def ne(self, label: int) -> Tensor:
        return self["labels_BS"].ne(label)


def _as_integers(tensor: Tensor) -> Tensor:
    """The bits of fp32 numbers: Trainer under DeepSpeed rounds what floats to the model's 16 bits."""
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def _as_were(tensor: Tensor) -> Tensor:
    return tensor.view(torch.float32) if tensor.dtype == torch.int32 else tensor
