"""Answers written within training: those of the model as it would be exported, and nothing that training notices."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.reader import ShardSet
from stages.distill.settings import ObjectiveSettings
from stages.events import Answered, Metric
from stages.inference import Student

TrainHere = Callable[..., Any]

SMALL = {"global_batch": 2, "micro_batch": 1, "epochs": 3, "validate_every": 3, "checkpoint_every": 2}  # 6 steps
LEARNT = {  # by heart, in 60 steps
    **SMALL,
    "epochs": 30,
    "validate_every": 30,
    "checkpoint_every": 58,
    "learning_rate": 0.02,
    "objective": ObjectiveSettings(kd_weight=0.0, ce_weight=1.0),
    "answers": 2,
}


@pytest.fixture(scope="module")
def spoken(standing_run: Path) -> Path:
    """Shards with a tokenizer."""
    return standing_run / "shards"


@pytest.fixture(scope="module")
def learnt(spoken: Path, train_here: TrainHere, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_here(tmp_path_factory.mktemp("learnt"), shards=spoken, **LEARNT, zero_stage=0)


def answered(outcome: Any) -> dict[int, list[tuple[str, str, str]]]:
    """Prompt, answer and label by step."""
    by_step: dict[int, list[tuple[str, str, str]]] = {}
    for event in outcome.events:
        if isinstance(event, Answered):
            by_step.setdefault(event.step, []).append((event.prompt, event.answer, event.label))
    return by_step


def told_by_the_exported_model(run: Path, shards: Path) -> list[tuple[str, str, str]]:
    student = Student.load(run / "final_model")
    records = list(ShardSet(shards).split("dev"))
    ids = [(record.prompt_ids_P.tolist(), record.response_ids_R.tolist()) for record in records]
    answers = student.generate_from_ids([prompt for prompt, _ in ids], max_new_tokens=48)
    return [
        (student.decode(prompt), answer.text, student.decode(label))
        for (prompt, label), answer in zip(ids, answers, strict=True)
    ]


def test_at_each_validation_the_model_of_that_step_answers(learnt: Any, spoken: Path) -> None:
    found = answered(learnt)
    assert list(found) == [0, 30, 60]
    assert found[60] == told_by_the_exported_model(learnt.run, spoken)
    assert found[60] != found[0]
    for prompt, answer, label in found[60]:
        assert "What is" in prompt
        assert answer.startswith("It is"), "it has learnt to answer"
        assert len(answer) <= len(label) + 3, "and to end"
    told = [event for event in learnt.events if isinstance(event, Metric) and "answer_seconds" in event.values]
    assert [event.step for event in told] == [0, 30, 60]


def copied(run: Path, target: Path, step: int) -> Path:
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(run / name, target / name)
    return target


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_however_the_weights_are_partitioned_whole_ones_answer(
    zero_stage: int, learnt: Any, spoken: Path, train_here: TrainHere, tmp_path: Path
) -> None:
    outcome = train_here(copied(learnt.run, tmp_path, 58), shards=spoken, **LEARNT, zero_stage=zero_stage)
    assert answered(outcome) == {60: told_by_the_exported_model(tmp_path, spoken)}


def test_two_ranks_under_zero_3_answer_once_and_with_whole_weights(
    learnt: Any, spoken: Path, start_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = start_ranks(copied(learnt.run, tmp_path, 58), 2, shards=spoken, **LEARNT, zero_stage=3).join()
    assert answered(outcome) == {60: told_by_the_exported_model(tmp_path, spoken)}
    assert outcome.exit_codes == [0, 0]


def test_an_answer_is_cut_at_the_limit(learnt: Any, spoken: Path, train_here: TrainHere, tmp_path: Path) -> None:
    run = copied(learnt.run, tmp_path, 58)
    outcome = train_here(run, shards=spoken, **{**LEARNT, "answers": 1}, answer_tokens=2)
    ((_, answer, _),) = answered(outcome)[60]
    assert answer in ("It", "It ")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_T1_training_and_resuming_come_to_the_same_bits_with_answers_and_without(
    precision: str, train_here: TrainHere, spoken: Path, tmp_path: Path
) -> None:
    way = {"shards": spoken, **SMALL, "precision": precision}
    without = train_here(tmp_path / "without", **way, answers=0)
    assert answered(without) == {}
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    told = train_here(tmp_path / "told", **way, keep_checkpoints=9, answers=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    resumed = train_here(copied(told.run, tmp_path / "resumed", 4), **way, answers=1, answer_tokens=3)
    assert told.losses == without.losses
    assert resumed.losses == {step: without.losses[step] for step in (5, 6)}
    for outcome in (told, resumed):
        assert all(torch.equal(outcome.weights[name], tensor) for name, tensor in without.weights.items())
