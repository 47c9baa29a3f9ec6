"""DeepSpeed behind a small interface; no other file imports it.

- ZeRO 0-3, offload of optimiser states and parameters, bf16 / fp16 / fp32, clipping and accumulation by configuration.
- Nothing is compiled at run time: the shared-memory collectives, which only inference uses, are switched off, and
  offloaded states are stepped by torch's own fused AdamW.
- State is exchanged as whole fp32 tensors by parameter name: weights, both moments, the step count. It knows no ranks
  and no ZeRO stage, so it can be loaded under any of them; at the same ones it is bit for bit what was saved.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stages.distill.batches import Batch
from stages.distill.objective import DistillModule, LossTerms
from stages.distill.optimizer import make_optimizer
from stages.distill.placement import Placement
from stages.distill.settings import DistillSettings
from stages.distill.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
# Where each of DeepSpeed's optimisers keeps this rank's part of the fp32 weights, flat.
_FLAT_WEIGHTS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All that a run carries from step to step, but the step itself."""

    weights: Mapping[str, Tensor]
    """fp32, by parameter name of the student."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """For each of MOMENTS, fp32 by parameter name."""
    updates: int
    """How often the optimiser has stepped; under fp16 less often than the run."""
    loss_scale: Mapping[str, float]
    """State of the dynamic loss scale; empty but under fp16."""
    records: Mapping[str, Tensor] = field(default_factory=dict)
    """State of `stages.distill.mining.RecordDifficulty`, which is not the engine's; empty where none are mined."""


class Engine:
    """One rank's handle on the training step. Every method is a collective operation."""

    def __init__(
        self, module: DistillModule, settings: DistillSettings, *, precision: str, placement: Placement, world: World
    ) -> None:
        """Takes over the module: its parameters may be partitioned from here on."""
        deepspeed = _quiet_deepspeed(world)
        self._student: nn.Module = module.student
        self._base = make_optimizer(module.student, settings)
        self._world = world
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self._base, config=_configuration(settings, precision, placement)
        )
        self._stage = placement.zero_stage
        self._fp16 = precision == "fp16"

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: rates are set here, before `step`."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    @property
    def may_overflow(self) -> bool:
        """Under fp16 a gradient that is not finite is part of the method: the step is skipped, the scale lowered."""
        return self._fp16

    def forward(self, batch: Batch, **how: Any) -> LossTerms:
        terms: LossTerms = self._engine(batch.to(self._world.device), **how)
        return terms

    def backward(self, objective: Tensor) -> None:
        """Add up gradients of a micro-batch, as a mean over ranks and over the micro-batches of a step."""
        self._engine.backward(objective)

    def step(self) -> float:
        """Clip, update and clear, if this was the last micro-batch of a step; the gradient's norm before clipping."""
        if self._engine.is_gradient_accumulation_boundary() and self._clips_itself:
            parts = [p.grad for p in self._student.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(parts))
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def state(self) -> TrainingState:
        """Everything, gathered on every rank, in CPU memory of rank 0 alone (elsewhere the mappings are empty)."""
        self._link_moments()
        return TrainingState(
            weights=self.weights(),
            moments={moment: self._gathered(moment) for moment in MOMENTS},
            updates=self._updates(),
            loss_scale=self._read_loss_scale(),
        )

    def weights(self) -> dict[str, Tensor]:
        """The weights of `state` alone; likewise empty but on rank 0."""
        return self._gathered(None)

    def load(self, state: TrainingState) -> None:
        """Go on from a state. The module must have been built with the same weights, so that 16-bit copies agree."""
        for flat in self._flat_weights():
            self._base.state[flat] = {
                "step": torch.tensor(float(state.updates), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        self._link_moments()
        for name, parameter in self._student.named_parameters():
            self._scatter(parameter, state.weights[name], None)
            for moment in MOMENTS:
                self._scatter(parameter, state.moments[moment][name], moment)
        for key, value in state.loss_scale.items():
            setattr(self._loss_scaler, key, value)

    def close(self) -> None:
        self._engine.destroy()

    @property
    def _clips_itself(self) -> bool:
        """Stage 0 in fp32 is plain torch, which reports no norm."""
        return self._optimizer is self._base

    def _gathered(self, key: str | None) -> dict[str, Tensor]:
        """Of every parameter its weights or a moment; empty but on rank 0."""
        whole = {}
        for name, parameter in self._student.named_parameters():
            tensor = self._gather(parameter, key)
            if self._world.rank == 0:
                whole[name] = tensor
        return whole

    def _gather(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is not None and not self._base.state:
            return torch.zeros(_shape(parameter))
        if self._stage == 0:
            whole = self._master(parameter) if key is None else self._base.state[self._master(parameter)][key]
        elif key is None:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, key)
        return whole.detach().to("cpu", torch.float32, copy=True).view(_shape(parameter))

    def _scatter(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        from deepspeed import utils

        whole = whole.to(self._world.device)
        if self._stage == 0:
            own = self._master(parameter).data if key is None else self._base.state[self._master(parameter)][key]
            own.copy_(whole)
        elif self._stage == 3:
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(whole.flatten(), (0, size * self._world.size - whole.numel()))
            part = padded[size * self._world.rank : size * (self._world.rank + 1)]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)

    def _link_moments(self) -> None:
        """Tell stages 1 and 2 where each parameter's moments lie.

        DeepSpeed does so once, after the first group's first update, when the other groups have none yet.
        """
        if self._stage in (1, 2) and self._base.state:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 tensor that stage 0 steps for a parameter: itself, or the copy that a 16-bit optimiser keeps."""
        narrow, wide = (getattr(self._optimizer, name, None) for name in ("fp16_groups", "fp32_groups"))
        if narrow is None or wide is None:
            return parameter
        pairs = zip(chain.from_iterable(narrow), chain.from_iterable(wide), strict=True)
        master: Tensor = next(master for own, master in pairs if own is parameter)
        return master

    def _flat_weights(self) -> list[Tensor]:
        for name in _FLAT_WEIGHTS:
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def _updates(self) -> int:
        return max((int(state["step"]) for state in self._base.state.values() if state), default=0)

    @property
    def _loss_scaler(self) -> Any:
        return getattr(self._optimizer, "loss_scaler", None) or self._optimizer.loss_scale_config

    def _read_loss_scale(self) -> dict[str, float]:
        if not self._fp16:
            return {}
        return {key: getattr(self._loss_scaler, key) for key in _LOSS_SCALE if hasattr(self._loss_scaler, key)}


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _configuration(settings: DistillSettings, precision: str, placement: Placement) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": placement.zero_stage}
    if placement.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if placement.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    # Stage 0 adds up gradients in the model's own type only; stage 1 would change to another, unquiet optimiser.
    sums = {"grad_accum_dtype": "fp32"} if placement.zero_stage >= 2 else {}
    return {
        "train_micro_batch_size_per_gpu": placement.share.micro_batch,
        "gradient_accumulation_steps": placement.share.accumulation,
        "gradient_clipping": settings.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": sums,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 12, "hysteresis": 1},
        "steps_per_print": None,
    }


def _quiet_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device, with nothing to build and nothing to say but errors."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed reads here which native operations it may build; training uses none of them.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
