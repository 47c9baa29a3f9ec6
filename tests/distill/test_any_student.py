"""A plain Qwen3 under Hugging Face's Trainer learns from the same shards, by the same loss as our own student."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from stages.distill.any_student import Distillation
from stages.distill.batches import assemble
from stages.distill.losses.cross_entropy import cross_entropy
from stages.distill.losses.fused import RowObjective, fused_rows
from stages.distill.losses.rows import plain
from stages.distill.losses.table import LOSSES
from stages.distill.settings import ObjectiveSettings

VOCAB = 211
DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "any_student.md"


def small_qwen3(vocab_size: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def trainer_for(data: Distillation, folder: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return Trainer(
        model=small_qwen3(),
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=data.collate,
        compute_loss_func=data.loss,
    )


def test_distilled_from_shards_its_loss_falls(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_for(Distillation(shards), tmp_path, num_train_epochs=16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_the_ten_lines_of_the_document_train(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "qwen3-8b").mkdir(parents=True)
    (tmp_path / "runs" / "qwen3-8b" / "shards").symlink_to(shards)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _: small_qwen3())
    plainly = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    monkeypatch.setattr(transformers, "TrainingArguments", partial(TrainingArguments, **plainly))
    scope: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), scope)
    assert scope["trainer"].state.global_step == 1


def test_accumulated_micro_batches_come_to_the_step_of_one_batch(shards: Path, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_for(
            Distillation(shards),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",  # AdamW would not tell a sum from a mean
            learning_rate=0.3,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kd", ["tail_bucket_kl", "water_filled_kl"])
def test_loss_and_gradient_are_those_of_our_own_student_on_the_same_logits(kd: str, shards: Path) -> None:
    objective = ObjectiveSettings(kd=kd, ce_weight=0.3)
    data, model = Distillation(shards, objective=objective), small_qwen3()
    records = [data[index] for index in range(6)]
    batch = data.collate(records)
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    hidden_ND = hidden.flatten(0, 1)[batch["labels"]["rows_N"]].detach().requires_grad_()
    weight_VD = model.lm_head.weight

    def of_logits() -> Tensor:
        logits = hidden_ND @ weight_VD.T
        labels = type(batch["labels"])({**batch["labels"], "rows_N": torch.arange(len(logits))})
        return data.loss({"logits": logits[None]}, labels) * len(logits)

    terms = ((LOSSES[kd].build(objective), 1.0), (plain(cross_entropy), 0.3))
    negatives = 32 if LOSSES[kd].hard_negatives else 0
    ours = fused_rows(
        hidden_ND, weight_VD, assemble(records, 0).teacher, RowObjective(terms=terms, hard_negatives=negatives)
    )
    theirs = of_logits()
    assert theirs.item() == pytest.approx(ours.objective.item(), rel=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours.objective, [hidden_ND, weight_VD]),
        torch.autograd.grad(theirs, [hidden_ND, weight_VD]),
        strict=True,
    ):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6)


def test_every_trained_row_reads_the_token_before_its_label(shards: Path) -> None:
    data = Distillation(shards)
    batch = data.collate([data[index] for index in range(5)])
    labels = batch["labels"]
    assert torch.equal(batch["input_ids"].flatten()[labels["rows_N"] + 1], labels["labels_N"])
    assert labels[..., 1:].ne(-100).sum() == labels["rows_N"].numel() == sum(data[i].positions for i in range(5))
    assert all(not tensor.is_floating_point() for tensor in labels.values()), "Trainer rounds what floats"


def test_what_cannot_be_distilled_so_is_refused(shards: Path, make_shards: Callable[..., Path]) -> None:
    data = Distillation(shards)
    batch = data.collate([data[0]])
    with pytest.raises(ValueError, match="the model knows 64 ids, the teacher 211"):
        data.loss({"logits": torch.zeros(1, batch["input_ids"].shape[1], 64)}, batch["labels"])
    with pytest.raises(ValueError, match="need this project's own training"):
        Distillation(shards, objective=ObjectiveSettings(ce_final=0.5))
