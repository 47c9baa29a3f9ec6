"""Real processes over gloo: several ranks, changing world sizes, and SIGKILL."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_worker
import torch

from shards.reader import ShardSet
from stages.distill.optimizer import parameter_groups
from stages.distill.schedules import learning_rate_factor
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.start import fresh_student
from stages.errors import StageError
from stages.events import Progress
from stages.student.shape import StudentShape

TrainHere = Callable[..., Any]
StartRanks = Callable[..., Any]

LONG = {"epochs": 7, "checkpoint_every": 10, "keep_checkpoints": 3, "validate_every": 1000}  # 21 steps


@pytest.fixture(scope="module")
def alone(train_here: TrainHere, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_here(tmp_path_factory.mktemp("alone"), **LONG)


@pytest.fixture(scope="module")
def pair(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_ranks(tmp_path_factory.mktemp("pair"), 2, **LONG).join()


def assert_close(outcome: Any, truth: Any, first: int) -> None:
    assert sorted(outcome.losses) == list(range(first, max(truth.losses) + 1))
    for step, loss in outcome.losses.items():
        assert loss == pytest.approx(truth.losses[step], rel=1e-5)
        assert outcome.grad_norms[step] == pytest.approx(truth.grad_norms[step], rel=1e-3)
    weights = outcome.weights
    for name, tensor in truth.weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_T2_two_ranks_under_zero_3_train_as_one_does(alone: Any, pair: Any) -> None:
    assert pair.result.ranks == 2
    assert pair.result.finished
    assert_close(pair, alone, first=1)
    for field in ("kl", "cross_entropy", "top1_agreement", "top5_agreement"):
        want = getattr(alone.result.validation, field)
        assert getattr(pair.result.validation, field) == pytest.approx(want, rel=1e-5)
    assert pair.result.validation.positions == alone.result.validation.positions
    assert pair.result.positions == alone.result.positions


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_T2_two_ranks_under_the_lower_stages_train_as_one_does(
    zero_stage: int, undisturbed: Any, start_ranks: StartRanks, tmp_path: Path
) -> None:
    two = start_ranks(tmp_path, 2, zero_stage=zero_stage, checkpoint_every=1000, validate_every=1000).join()
    assert two.result.ranks == 2
    assert_close(two, undisturbed, first=1)


def test_T2_two_ranks_measure_one_difficulty(start_ranks: StartRanks, train_here: TrainHere, tmp_path: Path) -> None:
    adaptive = ObjectiveSettings(kd="conditional_kl", temperature_mode="adaptive", temperature=1.4)
    short = {"objective": adaptive, "epochs": 2, "validate_every": 1000}
    one = train_here(tmp_path / "one", **short)
    two = start_ranks(tmp_path / "two", 2, **short).join()
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert len(two.losses) == 6


def test_T2_a_world_that_does_not_divide_is_refused_with_those_that_do(start_ranks: StartRanks, tmp_path: Path) -> None:
    outcome = start_ranks(tmp_path, 2, global_batch=9).join()
    assert isinstance(outcome.error, StageError)
    assert str(outcome.error) == "2 ranks do not divide a global batch of 9 records; these do: 1, 3, 9"


def test_all_ranks_leave_a_finished_run_in_peace(pair: Any, start_ranks: StartRanks) -> None:
    for _ in range(3):  # whoever finds nothing to do is quickly gone, and must not leave another behind as it joins
        outcome = start_ranks(pair.run, 2, **LONG).join()
        assert outcome.result == pair.result
        assert outcome.exit_codes == [0, 0]


@pytest.mark.parametrize(("before", "after", "zero_stage"), [(2, 1, 3), (1, 2, 3), (2, 3, 3), (1, 2, 2)])
def test_T4_another_world_size_resumes_with_every_groups_rate_and_decay(
    before: int,
    after: int,
    zero_stage: int,
    alone: Any,
    pair: Any,
    start_ranks: StartRanks,
    tmp_path: Path,
    shards: Path,
    settings: DistillSettings,
    shape: StudentShape,
) -> None:
    saved = {1: alone, 2: pair}[before].run / "checkpoints" / "step-00000010"
    shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)
    # Rates and decays that differ in every group: were one group's applied to another, weights would part at once.
    groups = parameter_groups(fresh_student(ShardSet(shards), settings, shape), settings)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups) > 6
    resumed = start_ranks(tmp_path, after, **LONG, zero_stage=zero_stage).join()
    assert resumed.result.ranks == after
    assert_close(resumed, alone, first=11)
    accumulation = len(resumed.rates) // 11  # an engine is stepped after every micro-batch
    for step, found in enumerate(resumed.rates[::accumulation], start=10):
        factor = learning_rate_factor(step, 21, warmup=settings.warmup, final=settings.final_rate)
        want = sorted((group["peak"] * factor, group["weight_decay"]) for group in groups)
        np.testing.assert_allclose(sorted(found), want, rtol=1e-12)


def test_T1_killed_at_any_step_it_goes_on_bit_for_bit(
    undisturbed: Any, start_ranks: StartRanks, tmp_path: Path
) -> None:
    rng = random.Random(7)
    losses: dict[int, float] = {}
    deaths = 0
    while True:
        ranks = start_ranks(tmp_path, 1, checkpoint_every=2)
        last = rng.randrange(1, 9)
        events = []
        while (said := ranks.hear()) is not None:
            events.append(said)
            if deaths < 2 and isinstance(said, Progress) and said.done >= last:
                ranks.kill()
                deaths += 1
                break
        outcome = ranks.join()
        outcome.events[:0] = events
        for step, loss in outcome.losses.items():
            assert losses.setdefault(step, loss) == loss == undisturbed.losses[step]
        if (tmp_path / "final_model").exists():
            break
    assert deaths == 2
    assert sorted(losses) == list(range(1, 10))
    weights = outcome.weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed.weights.items())


@pytest.mark.parametrize("flush", range(6, 11))
def test_T1_T3_killed_inside_a_save_the_one_before_counts(
    flush: int, undisturbed: Any, start_ranks: StartRanks, train_here: TrainHere, tmp_path: Path
) -> None:
    """A save flushes five times: 6 to 10 are those of the second checkpoint."""
    dead = start_ranks(tmp_path, 1, die_at_flush=flush).join()
    assert dead.result is None
    standing = rank_worker.checkpoint_names(tmp_path)
    whole = {6: 1, 7: 1, 8: 1, 9: 2, 10: 2}[flush]
    assert standing == [f"step-{3 * n:08d}" for n in range(1, whole + 1)]
    resumed = train_here(tmp_path)
    assert sorted(resumed.losses) == list(range(3 * whole + 1, 10))
    assert all(undisturbed.losses[step] == loss for step, loss in resumed.losses.items())
    weights = resumed.weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed.weights.items())


def test_a_stop_asked_of_one_rank_stops_all_and_loses_nothing(
    pair: Any, start_ranks: StartRanks, tmp_path: Path
) -> None:
    losses: dict[int, float] = {}
    for until in (2, 5):
        ranks = start_ranks(tmp_path, 2, **LONG)
        heard = []
        while (said := ranks.hear()) is not None:
            heard.append(said)
            if isinstance(said, Progress) and said.done == until:
                break
        ranks.ask_last_to_stop()
        stopped = ranks.join()
        stopped.events[:0] = heard
        assert not stopped.result.finished
        assert losses.keys().isdisjoint(stopped.losses)
        losses |= stopped.losses
        assert max(losses) == stopped.result.steps < 21
    assert losses == {step: pair.losses[step] for step in range(1, max(losses) + 1)}
