"""Stage two: shards -> student, under DeepSpeed, without the teacher. Called in every rank; rank 0 speaks for all.

- A run that was stopped, however, goes on from its newest whole checkpoint as if it had not been; a finished one does
  nothing.
- A step's records, its loss and its gradient do not depend on ranks, micro-batches or ZeRO stage, but for rounding.
- A loss that is not finite ends the run before the step that would have used it, and overwrites nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.reader import ShardSet
from shards.storage import Location
from stages.distill.batches import Batch, Prefetcher, assemble
from stages.distill.checkpoint import CheckpointFolder, Milestone
from stages.distill.evaluate import EvaluationReport, evaluate
from stages.distill.export import export_model, exported_facts
from stages.distill.identity import identity_of
from stages.distill.interruption import StopRequest
from stages.distill.losses.table import what_kl_is
from stages.distill.mining import Snapshot
from stages.distill.objective import Emphasis, left_out, told_names
from stages.distill.optimizer import set_rates
from stages.distill.order import Indices
from stages.distill.precision import resolve_precision
from stages.distill.schedules import learning_rate_factor
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.start import STAGE, Training, begin, fresh_student
from stages.distill.step import StepPlan, StepReport, take_step
from stages.distill.temperature import Difficulty
from stages.distill.world import joined_world
from stages.events import Emit, Metric, Note, Progress, silent
from stages.student.shape import StudentShape


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    finished: bool
    """False where the run was asked to stop; running it again goes on."""
    steps: int
    """Steps done."""
    positions: int
    """Positions trained on, every epoch counted."""
    seconds: float
    """Spent in training steps, over all starts of the run."""
    ranks: int
    precision: str
    untrained: EvaluationReport | None
    """Of the student before its first step; None where the shards have no dev split."""
    validation: EvaluationReport | None
    """Of the finished model; None before, and where the shards have no dev split."""
    kl_is: str
    """What `kl` is in both reports, in words."""
    cached: Mapping[str, int]
    """Totals of the set that it was trained from: shards, records, positions and bytes."""


def train(
    *,
    shards: Location,
    run: Path,
    settings: DistillSettings,
    objective: ObjectiveSettings,
    shape: StudentShape,
    emit: Emit = silent,
) -> TrainResult:
    """Train, from the start or the newest checkpoint, to the last step, and write run/final_model.

    Raises StageError for a run that cannot begin or go on, ShardError for shards that cannot be read.
    """
    shard_set, final_model = ShardSet(shards), run / "final_model"
    with joined_world() as world, StopRequest() as stop, _denormals_flushed():
        emit = emit if world.rank == 0 else silent
        precision, reason = resolve_precision(settings.precision, world.device)
        identity = identity_of(shard_set, settings, objective, shape, precision)
        checkpoints = CheckpointFolder(path=run / "checkpoints", identity=identity)
        if facts := exported_facts(final_model):
            checkpoints.require_same_identity(final_model, facts["identity"])
            emit(Note(stage=STAGE, text=f"{final_model} is finished already"))
            return _result(facts["result"], shard_set)
        emit(Note(stage=STAGE, text=f"ranks: {world.size} on {world.device.type}; {precision}: {reason}"))
        for note in _notes(shard_set, objective):
            emit(note)
        training = begin(
            shard_set,
            settings,
            objective,
            shape,
            precision=precision,
            world=world,
            checkpoints=checkpoints,
            emit=emit,
        )
        with closing(training.engine):
            told = told_names(objective, shard_set.contract)
            loop = _Loop(training, settings, objective, told, checkpoints, stop, emit)
            done, report = loop.run()
            result = TrainResult(
                finished=done.step == training.order.steps,
                steps=done.step,
                positions=done.positions,
                seconds=round(done.seconds, 2),
                ranks=world.size,
                precision=precision,
                untrained=EvaluationReport(**done.untrained) if done.untrained else None,
                validation=report,
                **_told_of(shard_set),
            )
            weights = training.engine.weights() if result.finished else {}
        if weights:  # on rank 0 alone
            facts = {"identity": identity, "result": dataclasses.asdict(result)}
            export_model(final_model, fresh_student(shard_set, settings, shape), weights, shard_set, facts)
            emit(Note(stage=STAGE, text=f"the student is in {final_model}"))
        world.barrier()
        return result


class _Loop:
    def __init__(
        self,
        training: Training,
        settings: DistillSettings,
        objective: ObjectiveSettings,
        told: Sequence[str],
        checkpoints: CheckpointFolder,
        stop: StopRequest,
        emit: Emit,
    ) -> None:
        self._training = training
        self._settings, self._objective, self._told = settings, objective, told
        self._checkpoints, self._stop, self._emit = checkpoints, stop, emit
        self._total = training.order.steps
        self._done = training.done

    def run(self) -> tuple[Milestone, EvaluationReport | None]:
        """Step until the last step or a request to stop; the report is of the last step."""
        report = self._validate() if self._done.step in (0, self._total) else None
        if report and self._done.step == 0:
            self._done = dataclasses.replace(self._done, untrained=dataclasses.asdict(report))
        while self._done.step < self._total:
            report, stopped = self._run_on()
            if stopped:
                break
        return self._done, report if self._done.step == self._total else None

    def _run_on(self) -> tuple[EvaluationReport | None, bool]:
        """Step as far as the order is known: the last report, and whether a stop was asked for."""
        first, end = self._done.step, self._known_until()
        report = None
        with closing(Prefetcher(self._load, self._micro_batches(first, end))) as batches:
            for step in range(first, end):
                self._set_rates(step)
                outcome = take_step(
                    self._plan(step),
                    self._training.engine,
                    batches,
                    self._training.world,
                    stop=lambda: bool(self._stop),
                    sample_ids=lambda records: [str(self._training.train.sample_ids[record]) for record in records],
                )
                report = self._finish_step(outcome)
                if outcome.stop:
                    return report, True
        return report, False

    def _known_until(self) -> int:
        """Where records are mined, what comes after an epoch depends on what is measured in it."""
        order = self._training.order
        if self._training.difficulty is None:
            return order.steps
        return (self._done.step // order.steps_per_epoch + 1) * order.steps_per_epoch

    def _finish_step(self, outcome: StepReport) -> EvaluationReport | None:
        """Tell, learn, validate and save what is due after a step."""
        step = self._done.step + 1
        self._done = dataclasses.replace(
            self._done,
            step=step,
            positions=self._done.positions + outcome.positions,
            seconds=self._done.seconds + outcome.seconds,
            validation_kl=None,
            difficulty=None if outcome.difficulty is None else dataclasses.asdict(outcome.difficulty),
        )
        self._tell(outcome)
        self._mine(outcome)
        last = step == self._total
        report = self._validate() if last or step % self._settings.validate_every == 0 else None
        if report:
            self._done = dataclasses.replace(self._done, validation_kl=report.kl)
        if last or outcome.stop or step % self._settings.checkpoint_every == 0:
            self._save()
        if outcome.stop and not last:
            self._say(f"stopped after step {step} of {self._total}; run again to go on")
        return report

    def _plan(self, step: int) -> StepPlan:
        training = self._training
        micro_batches = training.order.micro_batches(step, training.placement.share, self._snapshot)
        return StepPlan(
            step=step,
            micro_batches=micro_batches,
            positions=training.train.positions[micro_batches].astype(np.int64),
            emphasis=self._emphasis(step),
        )

    def _emphasis(self, step: int) -> Emphasis:
        found = self._done.difficulty
        return Emphasis.at(self._objective, step, self._total, None if found is None else Difficulty(**found))

    @property
    def _snapshot(self) -> Snapshot | None:
        difficulty = self._training.difficulty
        return None if difficulty is None else difficulty.snapshot

    def _micro_batches(self, first: int, end: int) -> Iterator[Indices]:
        """What this rank computes in steps `first` to `end`."""
        order, share, rank = self._training.order, self._training.placement.share, self._training.world.rank
        for step in range(first, end):
            yield from order.micro_batches(step, share, self._snapshot)[:, rank]

    def _mine(self, outcome: StepReport) -> None:
        """Learn how hard the step's records were; as an epoch ends, settle what the next one holds."""
        order, difficulty, step = self._training.order, self._training.difficulty, self._done.step
        if difficulty is None:
            return
        difficulty.observe(outcome.records.ravel(), outcome.record_kl.ravel())
        epoch, within = divmod(step - 1, order.steps_per_epoch)
        visits_R = order.visits_R(epoch, difficulty.snapshot)
        values = {
            "mined_share": float((visits_R[outcome.records] == 2).mean()),
            "difficulty_spread": difficulty.spread,
        }
        self._emit(Metric(stage=STAGE, step=step, values=values))
        if within == order.steps_per_epoch - 1:
            difficulty.begin_epoch(visits_R == 0)

    def _load(self, records: Indices) -> Batch:
        training = self._training
        return assemble([training.train[int(record)] for record in records], training.start_token_id)

    def _set_rates(self, step: int) -> None:
        factor = learning_rate_factor(step, self._total, warmup=self._settings.warmup, final=self._settings.final_rate)
        set_rates(self._training.engine.groups, factor)

    def _tell(self, outcome: StepReport) -> None:
        means, emphasis = outcome.means, self._emphasis(self._done.step - 1)
        values = {
            "loss": emphasis.loss(means),
            **{name: means[name] for name in self._told if emphasis.measures(name)},
            "lr": max(group["lr"] for group in self._training.engine.groups),
            "lr_lowest": min(group["lr"] for group in self._training.engine.groups),
            "grad_norm": outcome.grad_norm,
            "tokens_per_s": outcome.positions / outcome.seconds,
            "data_wait": outcome.data_wait / outcome.seconds,
            "memory_gib": outcome.memory / 2**30,
        }
        self._emit(Metric(stage=STAGE, step=self._done.step, values=values))
        self._emit(Progress(stage=STAGE, done=self._done.step, total=self._total, unit="steps"))

    def _validate(self) -> EvaluationReport | None:
        training, world = self._training, self._training.world
        if training.dev is None:
            return None
        with training.engine.evaluating():
            report = evaluate(
                training.engine.forward,
                training.dev,
                start_token_id=training.start_token_id,
                micro_batch=training.placement.share.micro_batch,
                rank=world.rank,
                world=world.size,
                total=world.total,
            )
        values = {f"val_{name}": value for name, value in dataclasses.asdict(report).items() if name != "positions"}
        self._emit(Metric(stage=STAGE, step=self._done.step, values=values))
        self._answer()
        return report

    def _answer(self) -> None:
        """Have the student answer some validation prompts, and tell what that cost."""
        if self._training.respondent is None:
            return
        start = time.perf_counter()
        for answered in self._training.respondent.answers(STAGE, self._done.step):
            self._emit(answered)
        values = {"answer_seconds": time.perf_counter() - start}
        self._emit(Metric(stage=STAGE, step=self._done.step, values=values))

    def _save(self) -> None:
        state, difficulty = self._training.engine.state(), self._training.difficulty
        if difficulty:
            state = dataclasses.replace(state, records=difficulty.state())
        if self._training.world.rank == 0:
            self._checkpoints.save(self._done, state, keep=self._settings.keep_checkpoints)
        self._training.world.barrier()

    def _say(self, text: str) -> None:
        self._emit(Note(stage=STAGE, text=text))


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Probabilities below 1e-38 are common, of no weight, and slow a matrix product 160-fold where they are kept."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # numpy looks at the smallest number once, and warns where it finds it flushed
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _notes(shards: ShardSet, objective: ObjectiveSettings) -> Iterator[Note]:
    for text in left_out(objective, shards.contract):
        yield Note(stage=STAGE, text=text, level="warning" if shards.contract.attention is None else "info")
    if "dev" not in shards.splits:
        yield Note(stage=STAGE, text="the shards have no dev split: nothing is validated", level="warning")


def _told_of(shards: ShardSet) -> dict[str, Any]:
    """What a result says of the set that it comes from."""
    return {"kl_is": what_kl_is(shards.contract.selection), "cached": shards.manifest.totals()}


def _result(facts: dict[str, Any], shards: ShardSet) -> TrainResult:
    reports = {name: facts[name] and EvaluationReport(**facts[name]) for name in ("untrained", "validation")}
    return TrainResult(**{**facts, **reports, **_told_of(shards)})
