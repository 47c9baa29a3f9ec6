"""Gradients that are not finite, under every ZeRO stage; of a loss that is not, see test_train.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.distill.engine import Engine
from stages.errors import StageError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("zero_stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False)])
def test_T6_a_gradient_that_is_not_finite_stops_the_run_under_every_zero_stage(
    precision: str,
    zero_stage: int,
    offload: bool,
    train_here: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true_backward, calls = Engine.backward, itertools.count(1)

    def explode(engine: Engine, objective: torch.Tensor) -> None:
        true_backward(engine, objective * torch.inf if next(calls) == 4 else objective)  # second step, its second half

    monkeypatch.setattr(Engine, "backward", explode)
    way = {"precision": precision, "zero_stage": zero_stage, "offload_optimizer": offload}
    with pytest.raises(StageError, match="the gradient of step 1 is not finite, among records sample-0-"):
        train_here(tmp_path, **way, epochs=1, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "final_model").exists()
