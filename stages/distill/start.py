"""How a run begins, or goes on: plan, student, engine and the newest checkpoint, put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from safetensors.torch import load

from shards.contract import Contract
from shards.manifest import HEAD_PCA_FILE, HEAD_PCA_TENSOR
from shards.reader import ShardSet, Split
from stages.distill.answers import Respondent
from stages.distill.checkpoint import CheckpointFolder, Milestone
from stages.distill.compiled_scan import compile_scans
from stages.distill.engine import Engine, TrainingState
from stages.distill.losses.fused import BLOCK_ROWS
from stages.distill.memory import free_device_bytes, free_host_bytes
from stages.distill.mining import RecordDifficulty, require_minable
from stages.distill.objective import DistillModule, needs_attention
from stages.distill.order import TrainingOrder, record_lengths
from stages.distill.placement import Placement, Room, Workload, choose, workload
from stages.distill.precision import DTYPES
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.world import World
from stages.errors import SettingError, StageError
from stages.events import Emit, Note
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape

STAGE = "distill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """All that the loop works with."""

    world: World
    train: Split
    dev: Split | None
    start_token_id: int
    order: TrainingOrder
    placement: Placement
    engine: Engine
    difficulty: RecordDifficulty | None
    """None where no records are mined."""
    respondent: Respondent | None
    """None where no answers are asked for, or there are no prompts for them."""
    done: Milestone
    """Where the run stood when it was last saved."""


def begin(
    shards: ShardSet,
    settings: DistillSettings,
    objective: ObjectiveSettings,
    shape: StudentShape,
    *,
    precision: str,
    world: World,
    checkpoints: CheckpointFolder,
    emit: Emit,
) -> Training:
    """Raises StageError where the settings do not fit the shards or the ranks, or a checkpoint is of another run."""
    train = shards.split("train")
    with _settings_explained():
        order = _order(train, shards.contract, settings)
        student = fresh_student(shards, settings, shape)
        module = DistillModule(student, objective, shards.contract)
        work = _workload(student, order, precision, world, need_attention=needs_attention(objective, shards.contract))
        placement, reason = choose(settings, precision, work, _room(world))
        emit(Note(stage=STAGE, text=f"{placement.describe()}: {reason}"))
        done, state = _resumed(checkpoints, order, world, emit)
        if state:
            for name, parameter in student.named_parameters():
                parameter.data.copy_(state.weights[name])
        elif settings.pca_init:
            _start_from_pca(student, shards, emit)
        if world.device.type == "cpu":
            compile_scans(student)  # once its size is measured, which is done without memory
        engine = Engine(module, settings, precision=precision, placement=placement, world=world)
    difficulty = RecordDifficulty(len(train), memory=settings.mining_memory) if settings.mining_share else None
    if state:
        engine.load(state)
        if difficulty:
            difficulty.restore(state.records)
    dev = shards.split("dev") if "dev" in shards.splits else None
    return Training(
        world=world,
        train=train,
        dev=dev,
        start_token_id=shards.contract.start_token_id,
        order=order,
        placement=placement,
        engine=engine,
        difficulty=difficulty,
        respondent=(
            Respondent(partial(fresh_student, shards, settings, shape), shards, engine, world, settings)
            if dev is not None and settings.answers
            else None
        ),
        done=done,
    )


@contextmanager
def _settings_explained() -> Iterator[None]:
    """What cannot be built from the settings is an error of the stage, with what to set instead."""
    try:
        yield
    except ValueError as error:
        hint = error.hint if isinstance(error, SettingError) else "change what the error names in the recipe"
        raise StageError(str(error), hint=hint) from error


def _order(train: Split, contract: Contract, settings: DistillSettings) -> TrainingOrder:
    if settings.mining_share:
        require_minable(contract)
    return TrainingOrder(
        lengths_N2=record_lengths(train),
        seed=settings.seed,
        global_batch=settings.global_batch,
        epochs=settings.epochs,
        bucket_batches=settings.bucket_batches,
        mining_share=settings.mining_share,
    )


def _resumed(
    checkpoints: CheckpointFolder, order: TrainingOrder, world: World, emit: Emit
) -> tuple[Milestone, TrainingState | None]:
    """Where the run stands, and the state that it goes on from; None at its start."""
    found = checkpoints.newest(emit)
    done, state = found or (Milestone(step=0, positions=0, seconds=0.0, validation_kl=None), None)
    if not world.same_everywhere(done.step):
        raise StageError(
            f"ranks found different checkpoints; rank {world.rank} found step {done.step}",
            hint="all ranks must see the same run directory",
        )
    if state:
        emit(Note(stage=STAGE, text=f"going on after step {done.step} of {order.steps}"))
    return done, state


def _workload(
    student: MiniCodformerForConditionalGeneration,
    order: TrainingOrder,
    precision: str,
    world: World,
    *,
    need_attention: bool,
) -> Workload:
    prompt, response = (int(longest) for longest in order.lengths_N2.max(0))
    return workload(
        student,
        prompt=prompt,
        response=response,
        mean_tokens=float(order.lengths_N2.sum(1).mean()),
        need_attention=need_attention,
        dtype=DTYPES[precision],
        block_rows=BLOCK_ROWS[world.device.type],
    )


def _room(world: World) -> Room:
    device, host = free_device_bytes(world.device), free_host_bytes() // world.local_size
    device, host = world.least(device if world.device.type == "cuda" else host, host)
    return Room(device=world.device.type, ranks=world.size, device_bytes=device, host_bytes=host)


def fresh_student(
    shards: ShardSet, settings: DistillSettings, shape: StudentShape
) -> MiniCodformerForConditionalGeneration:
    """The student before its first step, the same in every rank. Raises ValueError for a shape that cannot be."""
    contract = shards.contract
    return build_student(
        shape,
        vocab_size=contract.vocab_size,
        start_token_id=contract.start_token_id,
        end_token_id=contract.end_token_id,
        seed=settings.seed,
    )


def _start_from_pca(student: MiniCodformerForConditionalGeneration, shards: ShardSet, emit: Emit) -> None:
    if HEAD_PCA_FILE not in shards.manifest.teacher_files:
        emit(Note(stage=STAGE, text="the shards carry no components of the teacher's head: a random embedding it is"))
        return
    student.init_embedding_from_pca(load(shards.teacher_file(HEAD_PCA_FILE))[HEAD_PCA_TENSOR])
