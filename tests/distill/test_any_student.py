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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from stages.distill.any_student import Distillation
from stages.distill.batches import assemble
from stages.distill.objective import DistillModule
from stages.distill.settings import ObjectiveSettings
from stages.student.model import build_student
from stages.student.shape import StudentShape

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


@pytest.mark.parametrize(
    "changes",
    [{"kd": "tail_bucket_kl"}, {"kd": "water_filled_kl"}, {"kd": "tail_bucket_kl", "least_entropy": 2.5}],
    ids=str,
)
def test_loss_and_gradient_are_those_of_our_own_module_on_the_same_logits(
    changes: dict[str, Any], shards: Path, shape: StudentShape
) -> None:
    objective = ObjectiveSettings(ce_weight=0.3, **changes)
    data = Distillation(shards, objective=objective)
    records = [data[index] for index in range(6)]
    batch = assemble(records, data.contract.start_token_id)
    assert 0 < (batch.teacher.entropy_N < 2.5).sum() < batch.positions, "sure of some positions"
    student = build_student(shape, vocab_size=VOCAB, start_token_id=0, end_token_id=1, seed=0)
    ours = DistillModule(student, objective, data.contract)(batch)
    hidden = student.hidden(batch.prompt_ids_BP, batch.prompt_mask_BP, batch.decoder_ids_BT, batch.decoder_mask_BT)
    rows_ND = hidden.decoder_BTD.flatten(0, 1)[batch.rows_N]
    logits_NV = student.lm_head(student.output_hidden(rows_ND))
    labels = data.collate(records)["labels"]
    labels = type(labels)({**labels, "rows_N": torch.arange(len(logits_NV))})
    theirs = data.loss({"logits": logits_NV[None]}, labels) * len(logits_NV)
    assert theirs.item() == pytest.approx(ours.objective.item(), rel=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours.objective, list(student.parameters())),
        torch.autograd.grad(theirs, list(student.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


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
