"""How a run is laid out over its ranks: micro-batch, ZeRO stage, offload; the choice behind "auto".

The choice is a pure function of rank count, memory, model and records, and a step's result does not depend on it but
for rounding: a run may go on under another one. docs/placement.md explains the terms to a user.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.distill.order import Share, share_of_rank
from stages.distill.settings import AUTO, DistillSettings
from stages.errors import StageError
from stages.student.model import MiniCodformerForConditionalGeneration

# Share of a device's free memory that a choice may fill: the estimate leaves out allocator waste and communication.
_FILLED = 0.8
# Activations alive at once while gradients are taken, over those that forward keeps for them.
_BACKWARD = 1.5
_SMALL = 4
# DeepSpeed's bound on gathered parameters.
_MOST_MOVING = 1_000_000_000
# Tokens of a micro-batch beyond which matrix products get no faster.
_ENOUGH_TOKENS = {"cpu": 4_096, "cuda": 32_768}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What has to find room."""

    parameters: int
    record_bytes: int
    """What forward keeps for backward of the longest prompt with the longest response."""
    loss_bytes: int
    """Buffers of the fused loss, whatever the micro-batch."""
    mean_tokens: float
    """Of a record, prompt and response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a rank has, the least over all ranks."""

    device: str
    """"cpu" or "cuda"."""
    ranks: int
    device_bytes: int
    """Free memory of the rank's device; without a GPU, its share of the machine's."""
    host_bytes: int
    """Its share of the machine's available memory, where offloaded states go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A layout, with the memory that a rank is expected to need for it."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    share: Share
    device_bytes: int
    host_bytes: int

    def describe(self) -> str:
        offload = ["optimizer states"] * self.offload_optimizer + ["parameters"] * self.offload_parameters
        return (
            f"ZeRO {self.zero_stage}, "
            f"{' and '.join(offload) or 'nothing'} offloaded, micro-batch {self.share.micro_batch} x accumulation "
            f"{self.share.accumulation}"
        )


def choose(settings: DistillSettings, precision: str, work: Workload, room: Room) -> tuple[Placement, str]:
    """The placement of a run, and why it was chosen.

    The lowest ZeRO stage that fits wins, since each higher one pays for memory with communication, and offload comes
    last; within a stage, the largest micro-batch. Micro-batches below `_SMALL` records are taken only where no stage
    has room for more. Raises ValueError where the ranks do not divide the global batch, StageError where nothing that
    the settings allow fits.
    """
    options = [
        _placed(layout, share, precision, work, room)
        for layout in _layouts(settings, precision, room)
        for share in _shares(settings, work, room)
    ]
    small = min(_SMALL, options[0].share.micro_batch)
    for option in sorted(options, key=lambda option: option.share.micro_batch < small):
        if option.device_bytes <= _FILLED * room.device_bytes and option.host_bytes <= _FILLED * room.host_bytes:
            return option, _reason(option, options[0], settings, precision, room)
    raise _too_little(min(options, key=lambda option: (option.device_bytes, option.host_bytes)), settings, room)


def workload(
    student: MiniCodformerForConditionalGeneration,
    *,
    prompt: int,
    response: int,
    mean_tokens: float,
    need_attention: bool,
    dtype: torch.dtype,
    block_rows: int,
) -> Workload:
    """Measure a student whose records have at most `prompt` and `response` tokens. Nothing is computed."""
    vocabulary, width = student.output_weight().shape
    logits = block_rows * vocabulary * (4 + 4 + dtype.itemsize)  # the block, a copy without its kept ids, its gradient
    return Workload(
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        record_bytes=activation_bytes(student, prompt, response, need_attention, dtype),
        loss_bytes=logits + 2 * vocabulary * width * 4,
        mean_tokens=mean_tokens,
    )


def activation_bytes(
    student: MiniCodformerForConditionalGeneration,
    prompt: int,
    response: int,
    need_attention: bool,
    dtype: torch.dtype = torch.float32,
) -> int:
    """What forward keeps for the backward of one more record, counted by a dry run on torch's meta device."""
    dry = copy.deepcopy(student).to("meta", dtype)
    one, two = (_kept_bytes(dry, records, prompt, response, need_attention) for records in (1, 2))
    return two - one


def _kept_bytes(
    dry: MiniCodformerForConditionalGeneration, records: int, prompt: int, response: int, need_attention: bool
) -> int:
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no two get the same address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    prompt_BP = torch.zeros(records, prompt, dtype=torch.int64, device="meta")
    response_BT = torch.zeros(records, response, dtype=torch.int64, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result holds the graph, and the graph what was kept.
        held = dry.hidden(prompt_BP, prompt_BP.bool(), response_BT, response_BT.bool(), need_attention=need_attention)
        del held
    return sum(storage.nbytes() for storage in kept.values())


def _layouts(settings: DistillSettings, precision: str, room: Room) -> Iterator[tuple[int, bool, bool]]:
    """Stage, offload of optimiser states, of parameters: what the settings allow, the fastest first."""
    # In 16 bits, stages 0 and 1 add up the gradients of micro-batches in 16 bits too; 2 and 3 in fp32.
    stages = (0, 1, 2, 3) if precision == "fp32" else (2, 3)
    for optimizer, parameters in ((False, False), (True, False), (True, True), (False, True)):
        if not all(
            wish == offload or (wish == AUTO and (room.device == "cuda" or not offload))
            for wish, offload in ((settings.offload_optimizer, optimizer), (settings.offload_parameters, parameters))
        ):
            continue
        for stage in stages if settings.zero_stage == AUTO else (settings.zero_stage,):
            if not (optimizer and stage == 0) and not (parameters and stage != 3):
                yield stage, optimizer, parameters


def _shares(settings: DistillSettings, work: Workload, room: Room) -> Iterable[Share]:
    """Divisions of a rank's part of the global batch, the largest micro-batch first."""
    if settings.micro_batch != AUTO:
        return [share_of_rank(settings.global_batch, settings.micro_batch, room.ranks)]
    enough = max(1, int(_ENOUGH_TOKENS[room.device] / work.mean_tokens))
    return dict.fromkeys(share_of_rank(settings.global_batch, size, room.ranks) for size in range(enough, 0, -1))


def _placed(layout: tuple[int, bool, bool], share: Share, precision: str, work: Workload, room: Room) -> Placement:
    stage, optimizer, parameters = layout
    narrow = 4 if precision == "fp32" else 2
    count, ranks = work.parameters, room.ranks
    weights = narrow * count / (ranks if stage == 3 else 1)
    # Stages 0 and 1 hold whole gradients in the model's type, 2 and 3 an fp32 share of them.
    gradients = narrow * count if stage < 2 else 4 * count / ranks
    # fp32 master weights, but where the model's own are stepped in place; and AdamW's two moments.
    states = (8 if stage == 0 and precision == "fp32" else 12) * count / (ranks if stage else 1)
    moving = narrow * min(count, _MOST_MOVING) if stage else 0  # what is being gathered or waits to be reduced
    offloaded = (states + gradients) * optimizer + weights * parameters
    activations = _BACKWARD * share.micro_batch * work.record_bytes
    whole = weights + gradients + states + moving + activations + work.loss_bytes
    split = room.device == "cuda"  # without a GPU, host and device are one memory
    return Placement(
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_parameters=parameters,
        share=share,
        device_bytes=int(whole - offloaded * split),
        host_bytes=int(offloaded * split),
    )


def _reason(chosen: Placement, first: Placement, settings: DistillSettings, precision: str, room: Room) -> str:
    fits = f"about {_gib(chosen.device_bytes)} of {_gib(room.device_bytes)} a rank"
    if settings.zero_stage != AUTO:
        return f"{fits}; the stage is the recipe's"
    if chosen == first and precision == "fp32":
        return f"{fits}, with the least communication"
    if chosen == first:
        return f"{fits}, with the least communication of the stages that add up gradients in fp32"
    return f"{fits}; {first.describe()} would need {_gib(first.device_bytes)}"


def _too_little(leanest: Placement, settings: DistillSettings, room: Room) -> StageError:
    ways = ["lower corpus.max_response_tokens", "set student.embedding_rank"]
    if room.device == "cuda":
        ways.append(f"use more than {room.ranks} GPUs")
    elif room.ranks > 1:
        ways.append(f"use fewer ranks than {room.ranks}")
    if AUTO not in (settings.zero_stage, settings.micro_batch) or settings.offload_optimizer is False:
        ways.append("leave distill.zero_stage, micro_batch and offload_* at auto")
    return StageError(
        f"too little memory: {leanest.describe()} needs about {_gib(leanest.device_bytes)} a rank and "
        f"{_gib(leanest.host_bytes)} beside it; to fill, there are {_gib(int(_FILLED * room.device_bytes))} and "
        f"{_gib(int(_FILLED * room.host_bytes))}",
        hint=", ".join(ways[:-1]) + f", or {ways[-1]}",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
