"""Hard records come more often: by a rule that is bounded, that ranks agree on and that a stopped run goes on with."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selections import SELECTIONS, VOCAB, contract_of

from shards.reader import ShardSet, Split
from shards.record import Record
from stages.distill.batches import assemble
from stages.distill.mining import LEVELS, RecordDifficulty, Snapshot, compose, require_minable
from stages.distill.objective import SUMS, DistillModule
from stages.distill.order import Indices, TrainingOrder, share_of_rank
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.start import fresh_student
from stages.errors import SettingError
from stages.events import Metric
from stages.student.shape import StudentShape

TrainHere = Callable[..., Any]
StartRanks = Callable[..., Any]


def make_order(
    records: int, *, share: float, global_batch: int = 6, bucket_batches: int = 2, seed: int = 0
) -> TrainingOrder:
    return TrainingOrder(
        lengths_N2=np.random.default_rng(1).integers(2, 500, (records, 2)),
        seed=seed,
        global_batch=global_batch,
        epochs=9,
        bucket_batches=bucket_batches,
        mining_share=share,
    )


def epoch_of(order: TrainingOrder, epoch: int, snapshot: Snapshot | None) -> list[list[int]]:
    first = epoch * order.steps_per_epoch
    return [order.global_batch_of(first + step, snapshot).tolist() for step in range(order.steps_per_epoch)]


def naive_epoch(levels: list[int], rested: list[bool], tie: list[int], repeats: int, places: int) -> Counter[int]:
    """The rule of `stages.distill.mining`, a record at a time. `tie` is each record's place among equals."""
    rising = sorted(range(len(levels)), key=lambda record: (levels[record], tie[record]))
    visits = Counter(rising)
    visits.update(rising[len(rising) - repeats :])
    for record in rising:
        if visits.total() > places and visits[record] == 1 and not rested[record]:
            del visits[record]
    return visits


@given(
    records=st.integers(13, 60),
    spread=st.integers(1, 40),
    share=st.floats(0, 0.25),
    global_batch=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_an_epoch_holds_the_hardest_twice_and_leaves_out_the_easiest_that_did_not_rest(
    records: int, spread: int, share: float, global_batch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    places = records // global_batch * global_batch
    repeats = min(int(share * places), (records - 2 * (records - places)) // 3)
    rested_R = np.zeros(records, bool)
    rested_R[rng.permutation(records)[: repeats + records - places]] = True
    snapshot = Snapshot(level_R=rng.integers(0, spread, records), rested_R=rested_R)
    shuffled = rng.permutation(records)
    twice, once = compose(snapshot, shuffled, repeats=repeats, places=places)
    tie = np.argsort(shuffled).tolist()
    want = naive_epoch(snapshot.level_R.tolist(), rested_R.tolist(), tie, repeats, places)
    assert Counter(once.tolist()) + Counter(2 * twice.tolist()) == want
    assert (twice.size, 2 * twice.size + once.size) == (repeats, places)


@given(
    records=st.integers(14, 80),
    share=st.floats(0, 0.25),
    global_batch=st.integers(1, 7),
    bucket_batches=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_whatever_is_hard_no_record_is_left_out_twice_in_a_row_and_no_batch_holds_one_twice(
    records: int, share: float, global_batch: int, bucket_batches: int, seed: int
) -> None:
    order = make_order(records, share=share, global_batch=global_batch, bucket_batches=bucket_batches, seed=seed)
    difficulty, rng = RecordDifficulty(records, memory=0.5), np.random.default_rng(seed)
    before = np.ones(records, bool)
    for epoch in range(5):
        batches = epoch_of(order, epoch, difficulty.snapshot)
        visits_R = order.visits_R(epoch, difficulty.snapshot)
        assert np.bincount(np.concatenate(batches), minlength=records).tolist() == visits_R.tolist()
        assert all(len(set(batch)) == len(batch) == global_batch for batch in batches)
        assert visits_R.max() <= 2
        assert ((visits_R > 0) | before).all()
        before = visits_R > 0
        for batch in batches:
            difficulty.observe(np.array(batch), rng.lognormal(0, 1, len(batch)))
        difficulty.begin_epoch(visits_R == 0)


def test_an_epoch_of_one_step_has_no_halves_to_mine_in() -> None:
    assert make_order(11, share=0.0).steps_per_epoch == 1
    with pytest.raises(SettingError, match="an epoch needs two steps; 11 records fill one, of 6") as refused:
        make_order(11, share=0.25)
    assert refused.value.hint == "lower distill.global_batch to 5 or less, or set distill.mining_share = 0"


def test_the_share_that_was_asked_for_is_repeated_and_the_first_epoch_is_as_without() -> None:
    order, plain = make_order(600, share=0.2, global_batch=48), make_order(600, share=0.0, global_batch=48)
    assert epoch_of(order, 0, None) == epoch_of(plain, 0, None)
    snapshot = Snapshot(level_R=np.arange(600), rested_R=np.zeros(600, bool))
    visits_R = order.visits_R(1, snapshot)
    assert (visits_R == 2).sum() == int(0.2 * 576)
    assert visits_R[-115:].tolist() == [2] * 115
    assert visits_R[:139].tolist() == [0] * 139, "as many, and what the last batch has no room for"


def test_T2_mined_steps_are_the_same_whatever_was_asked_for_before_and_for_every_world_size() -> None:
    rng = np.random.default_rng(0)
    snapshot = Snapshot(level_R=rng.integers(0, 99, 300), rested_R=rng.random(300) < 0.1)
    walked, asked = (make_order(300, share=0.25, global_batch=24) for _ in range(2))
    first = walked.steps_per_epoch
    steps = [walked.global_batch_of(first + step, snapshot).tolist() for step in range(first)]
    for step in rng.permutation(first):
        assert asked.global_batch_of(first + int(step), snapshot).tolist() == steps[step]
        for world in (1, 2, 3, 4, 6, 8):
            plan = asked.micro_batches(first + int(step), share_of_rank(24, 4, world), snapshot)
            assert sorted(plan.ravel().tolist()) == sorted(steps[step])
    assert walked.global_batch_of(2 * first, snapshot).tolist() != steps[0], "another epoch, another order"


def test_difficulty_is_relative_to_what_all_records_cost_at_that_time() -> None:
    difficulty = RecordDifficulty(6, memory=0.75)
    difficulty.observe(np.array([0, 1]), np.array([6.0, 2.0]))  # the mean is 4
    difficulty.observe(np.array([2, 3]), np.array([1.0, 3.0]))  # 4 + .1 (2 - 4) = 3.8
    difficulty.observe(np.array([0, 4]), np.array([1.0, 4.6]))  # 3.8 + .1 (2.8 - 3.8) = 3.7
    want = np.array([0.75 * 6 / 4 + 0.25 * 1 / 3.7, 2 / 4, 1 / 3.8, 3 / 3.8, 4.6 / 3.7])
    assert difficulty.spread == pytest.approx(want.std())
    difficulty.begin_epoch(np.array([False] * 5 + [True]))
    assert difficulty.snapshot is not None
    assert difficulty.snapshot.level_R.tolist() == [round(value * LEVELS) for value in [*want, 1.0]]
    assert difficulty.snapshot.rested_R.tolist() == [False] * 5 + [True]


def test_each_records_kl_comes_out_of_the_pass_that_trains(
    shards: Path, settings: DistillSettings, shape: StudentShape
) -> None:
    shard_set = ShardSet(shards)
    records = [shard_set.split("train")[index] for index in range(9)]
    student = fresh_student(shard_set, settings, shape)
    tempered = ObjectiveSettings(kd="ghost_kl", temperature_mode="adaptive", temperature=1.4)
    terms = DistillModule(student, tempered, shard_set.contract)(assemble(records, 0))
    terms.objective.backward()
    for record, found in zip(records, terms.record_kl_B.tolist(), strict=True):
        batch = assemble([record], 0)
        hidden = student.hidden(batch.prompt_ids_BP, batch.prompt_mask_BP, batch.decoder_ids_BT, batch.decoder_mask_BT)
        log_q = student.lm_head(student.output_hidden(hidden.decoder_BTD))[0].double().log_softmax(1)
        p = batch.teacher.log_kept_NK.double().exp()
        rest = batch.teacher.log_rest_N.double().exp()
        kept = log_q.gather(1, batch.teacher.ids_NK)
        outside = log_q.scatter(1, batch.teacher.ids_NK, -torch.inf).logsumexp(1)
        kl = (p * (p.log() - kept)).sum() + (rest * (rest.log() - outside)).sum()
        assert found == pytest.approx(kl.item(), rel=1e-5)
    assert terms.record_kl_B.sum().item() == pytest.approx(terms.sums[SUMS.index("kl")].item(), rel=1e-6)


MINED: dict[str, Any] = {
    "mining_share": 0.25,
    "epochs": 4,  # of three steps
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
    "validate_every": 99,
}


@pytest.fixture(scope="module")
def mined(train_here: TrainHere, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_here(tmp_path_factory.mktemp("mined"), **MINED)


def from_checkpoint(run: Path, target: Path, step: int) -> Path:
    shutil.copytree(run / "checkpoints" / f"step-{step:08d}", target / "checkpoints" / f"step-{step:08d}")
    return target


def metric(outcome: Any, name: str) -> dict[int, float]:
    events = [event for event in outcome.events if isinstance(event, Metric) and name in event.values]
    return {event.step: event.values[name] for event in events}


def test_a_run_reports_its_share_of_repeated_records_and_their_spread(mined: Any) -> None:
    share, spread = metric(mined, "mined_share"), metric(mined, "difficulty_spread")
    assert sorted(share) == sorted(spread) == list(range(1, 13))
    assert [share[step] for step in (1, 2, 3)] == [0, 0, 0]
    for epoch in (1, 2, 3):
        # 36 places, of 40 records; a quarter of them would be 9, and each comes twice.
        assert sum(share[3 * epoch + step] for step in (1, 2, 3)) / 3 == pytest.approx(2 * 9 / 36)
    assert all(value > 0 for value in spread.values())


def test_records_that_stay_hard_come_twice_in_every_epoch_but_the_first(
    make_shards: Callable[..., Path], train_here: TrainHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forty records, in eight the teacher is sure of ids that nothing foretells."""
    hard = set(range(0, 40, 5))
    plans: dict[int, Indices] = {}
    true_record, true_plan = Split.__getitem__, TrainingOrder.micro_batches

    def spoilt(split: Split, index: int) -> Record:
        record = true_record(split, index)
        if index not in hard or len(split) != 40:
            return record
        ids = np.random.default_rng(index).permutation(VOCAB)[: record.ids_NK.size].reshape(record.ids_NK.shape)
        sure = np.log(np.full(ids.shape, 0.001, np.float32))
        sure[:, 0] = np.log(0.99)
        tail = np.full(len(ids), np.log(1 - np.exp(sure[0]).sum()), np.float32)
        return dataclasses.replace(record, ids_NK=ids.astype(np.int32), logprobs_NK=sure, log_tail_N=tail)

    def recorded(order: TrainingOrder, step: int, *rest: Any) -> Indices:
        plans[step] = true_plan(order, step, *rest)
        return plans[step]

    monkeypatch.setattr(Split, "__getitem__", spoilt)
    monkeypatch.setattr(TrainingOrder, "micro_batches", recorded)
    train_here(tmp_path, shards=make_shards(attention=None), **MINED)
    assert sorted(plans) == list(range(12))
    for epoch in (1, 2, 3):
        visits = Counter(np.concatenate([plans[3 * epoch + step].ravel() for step in range(3)]).tolist())
        assert sum(visits[record] == 2 for record in hard) >= 7, "one may have been left out of the first epoch"
        assert all(visits[record] for record in hard)


@pytest.mark.parametrize("step", [4, 6, 8], ids=["in an epoch", "between two", "in a later one"])
def test_T1_a_mined_run_goes_on_bit_for_bit(step: int, mined: Any, train_here: TrainHere, tmp_path: Path) -> None:
    resumed = train_here(from_checkpoint(mined.run, tmp_path, step), **MINED)
    assert resumed.losses == {later: mined.losses[later] for later in range(step + 1, 13)}
    assert metric(resumed, "difficulty_spread") == {
        later: value for later, value in metric(mined, "difficulty_spread").items() if later > step
    }
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in mined.weights.items())


def test_T2_T4_two_ranks_then_one_then_three_mine_the_same_records(
    mined: Any, start_ranks: StartRanks, train_here: TrainHere, tmp_path: Path
) -> None:
    two = start_ranks(tmp_path / "two", 2, **MINED).join()
    one = train_here(from_checkpoint(two.run, tmp_path / "one", 4), **MINED)
    three = start_ranks(from_checkpoint(one.run, tmp_path / "three", 8), 3, **MINED).join()
    for first, outcome in ((1, two), (5, one), (9, three)):
        assert sorted(outcome.losses) == list(range(first, 13))
        for step, loss in outcome.losses.items():
            assert loss == pytest.approx(mined.losses[step], rel=1e-5)
        assert metric(outcome, "mined_share") == {
            step: share for step, share in metric(mined, "mined_share").items() if step >= first
        }


def test_what_cannot_be_mined_is_refused() -> None:
    for changes, said in (
        ({"mining_share": 0.3}, "mining_share must lie between 0 and 0.25"),
        ({"mining_share": 0.2, "epochs": 1}, "mining_share needs distill.epochs of 2 or more"),
        ({"mining_memory": 1.0}, "mining_memory must lie between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            DistillSettings(**changes)
    for name, selection in SELECTIONS.items():
        with pytest.raises(ValueError, match="needs log-probabilities") if name == "counts" else nullcontext():
            require_minable(contract_of(selection))
