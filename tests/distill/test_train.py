"""The loop in one process: resuming, refusing, stopping, exporting, and every ZeRO stage and precision."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shards.errors import ShardError
from shards.manifest import HEAD_PCA_FILE, HEAD_PCA_TENSOR
from shards.reader import ShardSet
from stages.distill.batches import assemble
from stages.distill.evaluate import evaluate_model
from stages.distill.losses.attention import attention_kl
from stages.distill.losses.rows import Rows
from stages.distill.losses.table import LOSSES
from stages.distill.order import TrainingOrder, record_lengths
from stages.distill.precision import cpu_multiplies_fp16
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.start import fresh_student
from stages.errors import StageError
from stages.events import Event, Metric, Note
from stages.student.model import MiniCodformerForConditionalGeneration
from stages.student.shape import StudentShape

TrainHere = Callable[..., Any]


def test_a_run_goes_from_shards_to_a_model_that_learnt(undisturbed: Any, shards: Path) -> None:
    result = undisturbed.result
    assert (result.finished, result.steps, result.ranks, result.precision) == (True, 9, 1, "fp32")
    lengths = ShardSet(shards).split("train").positions
    assert result.positions == pytest.approx(lengths.sum() * 3 * 36 / 40, rel=0.1)
    validation = [event.values["val_kl"] for event in undisturbed.events if "val_kl" in getattr(event, "values", {})]
    assert len(validation) == 3, "at the start, after five steps, at the end"
    assert validation[-1] == result.validation.kl < validation[0]


def test_the_saved_model_is_the_one_that_was_validated(undisturbed: Any, shards: Path) -> None:
    measured = evaluate_model(undisturbed.run / "final_model", ShardSet(shards), micro_batch=3)
    for field in dataclasses.fields(measured):
        assert getattr(measured, field.name) == pytest.approx(
            getattr(undisturbed.result.validation, field.name), rel=1e-5
        )
    folder = undisturbed.run / "final_model"
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / HEAD_PCA_FILE).exists()
    student = MiniCodformerForConditionalGeneration.from_pretrained(folder)
    assert student.dtype == torch.float32
    assert student.config.eos_token_id == 1


def test_a_finished_run_does_nothing(undisturbed: Any, train_here: TrainHere) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.run.rglob("*")}
    again = train_here(undisturbed.run)
    assert again.result == undisturbed.result
    assert [type(event) for event in again.events] == [Note]
    assert {path: path.stat().st_mtime_ns for path in undisturbed.run.rglob("*")} == before
    with pytest.raises(StageError, match=r"distill\.learning_rate = 0\.003; now it is 1\.0"):
        train_here(undisturbed.run, learning_rate=1.0)


def dense_step(shards: Path, settings: DistillSettings, shape: StudentShape, records: list[int]) -> tuple[float, float]:
    """Loss and gradient norm of a global batch, all at once, from full distributions in float64."""
    shard_set = ShardSet(shards)
    batch = assemble([shard_set.split("train")[index] for index in records], 0)
    student = fresh_student(shard_set, settings, shape).double()
    student.init_embedding_from_pca(load_file(shard_set.teacher_folder / HEAD_PCA_FILE)[HEAD_PCA_TENSOR])
    hidden = student.hidden(
        batch.prompt_ids_BP, batch.prompt_mask_BP, batch.decoder_ids_BT, batch.decoder_mask_BT, need_attention=True
    )
    logits = (student.output_hidden(hidden.decoder_BTD) @ student.output_weight().T).flatten(0, 1)[batch.rows_N]
    log_q = logits.log_softmax(1)
    teacher = batch.teacher
    kept = log_q.gather(1, teacher.ids_NK)
    rest = log_q.scatter(1, teacher.ids_NK, -torch.inf).logsumexp(1)
    kd = (teacher.log_kept_NK.exp() * (teacher.log_kept_NK - kept)).sum(1)
    kd = kd + teacher.log_rest_N.exp() * (teacher.log_rest_N - rest)
    ce = -log_q.gather(1, teacher.labels_N[:, None]).squeeze(1)
    assert batch.attention is not None
    looks = [weights.flatten(0, 1)[batch.rows_N] for weights in hidden.cross_attention or ()]
    loss = kd.mean() + 0.1 * ce.mean() + 0.1 * attention_kl(looks, batch.attention) / batch.positions
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    return loss.item(), norm.item()


def test_the_first_step_is_the_mean_over_the_global_batch(
    undisturbed: Any,
    shards: Path,
    settings: DistillSettings,
    shape: StudentShape,
) -> None:
    order = TrainingOrder(
        lengths_N2=record_lengths(ShardSet(shards).split("train")), seed=0, global_batch=12, epochs=settings.epochs
    )
    loss, norm = dense_step(shards, settings, shape, order.global_batch_of(0).tolist())
    assert undisturbed.losses[1] == pytest.approx(loss, rel=1e-5)
    assert undisturbed.grad_norms[1] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"zero_stage": 3, "micro_batch": 2},
        {"zero_stage": 0, "micro_batch": 12},
    ],
    ids=str,
)
def test_every_zero_stage_and_micro_batch_comes_to_the_same(
    way: dict[str, Any], undisturbed: Any, train_here: TrainHere, tmp_path: Path
) -> None:
    # It also crosses over: saved under stage 3, resumed under this one.
    halfway = copy_until(undisturbed.run, tmp_path / "halfway", 6)
    for folder in (tmp_path / "whole", halfway):
        other = train_here(folder, **way)
        for step, loss in other.losses.items():
            assert loss == pytest.approx(undisturbed.losses[step], rel=1e-5)
            assert other.grad_norms[step] == pytest.approx(undisturbed.grad_norms[step], rel=1e-3)
        assert max(other.losses) == 9
    assert min(other.losses) == 7


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_sixteen_bits_train_and_resume_bit_for_bit(
    precision: str, zero_stage: int, undisturbed: Any, train_here: TrainHere, tmp_path: Path
) -> None:
    way = {"precision": precision, "zero_stage": zero_stage, "epochs": 2, "checkpoint_every": 2}
    if precision == "fp16" and not cpu_multiplies_fp16():
        with pytest.raises(StageError, match="this CPU cannot train in fp16"):
            train_here(tmp_path / "refused", **way)
        return
    whole = train_here(tmp_path / "whole", **way, keep_checkpoints=9)
    assert whole.losses[1] == pytest.approx(undisturbed.losses[1], rel=5e-3)
    assert whole.losses[6] < whole.losses[1]
    resumed = train_here(copy_until(whole.run, tmp_path / "resumed", 2), **way)
    assert resumed.losses == {step: whole.losses[step] for step in (3, 4, 5, 6)}
    assert same(resumed.weights, whole.weights)


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def copy_until(run: Path, target: Path, step: int) -> Path:
    """A run directory as it stood when step `step` had just been saved."""
    name = f"step-{step:08d}"
    shutil.copytree(run / "checkpoints" / name, target / "checkpoints" / name)
    return target


def test_T1_asked_to_stop_it_saves_and_goes_on_bit_for_bit(
    undisturbed: Any, train_here: TrainHere, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Metric) and event.step == 4 and "loss" in event.values:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train_here(tmp_path, emit=interrupt)
    assert (stopped.result.finished, stopped.result.steps, stopped.result.validation) == (False, 5, None)
    assert not (tmp_path / "final_model").exists()
    assert "stopped after step 5 of 9" in stopped.events[-1].text
    resumed = train_here(tmp_path)
    assert {**stopped.losses, **resumed.losses} == undisturbed.losses
    assert same(resumed.weights, undisturbed.weights)
    assert resumed.result.positions == undisturbed.result.positions


ADAPTIVE = ObjectiveSettings(
    kd="ghost_kl", temperature_mode="adaptive", temperature=1.4, kd_final=0.5, ce_final=3.0, weight_shape="cosine"
)


def test_T1_temperatures_that_follow_difficulty_go_on_bit_for_bit_and_know_no_micro_batch(
    train_here: TrainHere, tmp_path: Path
) -> None:
    whole = train_here(tmp_path / "whole", objective=ADAPTIVE)
    metrics = [event.values for event in whole.events if isinstance(event, Metric) and "loss" in event.values]
    temperatures = [values["temperature"] for values in metrics]
    assert temperatures[0] == pytest.approx(1.4), "before anything was measured"
    assert 1 < temperatures[4] != pytest.approx(1.2, abs=1e-6), "the base alone"
    resumed = train_here(copy_until(tmp_path / "whole", tmp_path / "resumed", 6), objective=ADAPTIVE)
    assert resumed.losses == {step: whole.losses[step] for step in (7, 8, 9)}
    assert same(resumed.weights, whole.weights)
    smaller = train_here(tmp_path / "smaller", objective=ADAPTIVE, micro_batch=2)
    assert smaller.losses == pytest.approx(whole.losses, rel=1e-5)
    first, last = metrics[0], metrics[-1]
    assert first["loss"] == pytest.approx(first["kd"] + 0.1 * first["ce"] + 0.1 * first["attention"], rel=1e-6)
    assert last["loss"] == pytest.approx(0.5 * last["kd"] + 0.3 * last["ce"], rel=1e-6)
    assert "attention" not in last, "a term that nothing looked at is no 0"


@pytest.mark.parametrize("damage", ["tensors", "manifest", "half a manifest", "no tensors"])
def test_T3_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    damage: str, undisturbed: Any, train_here: TrainHere, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed.run / "checkpoints", run / "checkpoints")
    newest, before = run / "checkpoints" / "step-00000009", run / "checkpoints" / "step-00000006"
    assert before.is_dir()
    tensors, manifest = newest / "state.safetensors", newest / "manifest.json"
    if damage == "tensors":
        flip_a_bit(tensors, tensors.stat().st_size - 5)
    elif damage == "manifest":
        flip_a_bit(manifest, manifest.read_bytes().index(b'"step"') + 8)
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    else:
        tensors.unlink()
    resumed = train_here(run)
    warnings = [event.text for event in resumed.events if getattr(event, "level", "") == "warning"]
    assert len(warnings) == 1
    assert "step-00000009 is damaged" in warnings[0]
    assert resumed.losses == {step: undisturbed.losses[step] for step in (7, 8, 9)}
    assert same(resumed.weights, undisturbed.weights)
    assert len(list((run / "checkpoints").iterdir())) == 2


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "distill.learning_rate = 0.003; now it is 0.001"),
        ({"objective": ObjectiveSettings(ce_weight=0.5)}, "objective.ce_weight = 0.1; now it is 0.5"),
        ({"precision": "bf16"}, "precision = 'fp32'; now it is 'bf16'"),
        ({"tokenizer": "d" * 64}, f"contract.tokenizer_fingerprint = '{'b' * 64}'; now it is '{'d' * 64}'"),
        ({"corpus": 1}, "shards.sha256 = "),
    ],
    ids=["recipe", "objective", "precision", "tokenizer", "shards"],
)
def test_T5_another_recipe_tokenizer_or_shard_set_refuses_the_resume(
    changes: dict[str, Any],
    named: str,
    undisturbed: Any,
    train_here: TrainHere,
    make_shards: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run = copy_until(undisturbed.run, tmp_path, 6)
    if tokenizer := changes.pop("tokenizer", None):
        changes = {"shards": make_shards(tokenizer_fingerprint=tokenizer)}
    if changes.pop("corpus", None):
        changes = {"shards": make_shards(seed=1)}
    with pytest.raises(StageError) as refused:
        train_here(run, **changes)
    assert named in str(refused.value)
    assert "another run directory" in refused.value.hint


def test_T6_a_loss_that_is_not_finite_names_step_and_records_and_overwrites_nothing(
    undisturbed: Any, train_here: TrainHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    true_loss = LOSSES["tail_bucket_kl"]

    def explode(rows: Rows) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = true_loss.build(ObjectiveSettings())(rows)
        return value * torch.nan if calls == 4 else value  # second step, second micro-batch

    run = copy_until(undisturbed.run, tmp_path, 6)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setitem(LOSSES, "tail_bucket_kl", dataclasses.replace(true_loss, build=lambda _: explode))
    with pytest.raises(StageError) as diverged:
        train_here(run)
    monkeypatch.undo()
    assert "the loss of step 7 is not finite, among records sample-0-" in str(diverged.value)
    assert str(diverged.value).count("sample-0-") == 6, "those of one micro-batch"
    assert "last checkpoint is untouched" in diverged.value.hint
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert same(train_here(run).weights, undisturbed.weights)


def test_settings_that_cannot_work_are_refused_before_the_first_step(train_here: TrainHere, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="do not fill a global batch of 48") as refused:
        train_here(tmp_path, global_batch=48)
    assert refused.value.hint == "set distill.global_batch = 40 or lower, or cache more records"
    with pytest.raises(StageError, match=r"objective\.kd is 'magic'; there are tail_bucket_kl"):
        train_here(tmp_path, objective=ObjectiveSettings(kd="magic"))
    with pytest.raises(StageError, match="needs the tail's partition curve") as refused:
        train_here(tmp_path, objective=ObjectiveSettings(temperature_mode="adaptive", temperature=1.2))
    assert refused.value.hint == (
        "set objective.temperature_mode = 'fixed' and objective.temperature = 1; "
        "or write the shards anew with cache.curve = [0.5, 0.25]"
    )
    with pytest.raises(ShardError):
        train_here(tmp_path, shards=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shards_without_attention_or_validation_are_enough(
    train_here: TrainHere, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    bare = make_shards(records=16, dev=0, attention=None)
    outcome = train_here(tmp_path, shards=bare, epochs=1)
    notes = [event.text for event in outcome.events if getattr(event, "level", "") == "warning"]
    assert notes == [
        "the shards carry no attention: that term is left out",
        "the shards have no dev split: nothing is validated",
    ]
    assert outcome.result.finished
    assert outcome.result.validation is None
    (told,) = [event.values for event in outcome.events if isinstance(event, Metric)]
    assert told.keys().isdisjoint({"attention", "encoder"}), "a term that nothing looked at is no 0"


def test_given_time_the_loss_falls_far_below_its_start(train_here: TrainHere, tmp_path: Path) -> None:
    outcome = train_here(
        tmp_path, epochs=25, learning_rate=2e-2, zero_stage=0, checkpoint_every=1000, validate_every=1000
    )
    first, last = outcome.losses[1], outcome.losses[75]
    assert last < 0.6 * first
