"""Settings that mean nothing are refused where they are made, by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.errors import StageError
from stages.student.shape import StudentShape


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        *((name, 0, "at least 1") for name in ("heads", "hidden_size", "intermediate_size", "conv_kernel")),
        *((name, 0, "at least 1") for name in ("encoder_layers", "decoder_layers", "embedding_rank")),
        *((name, -2, "at least 1") for name in ("heads", "hidden_size", "intermediate_size", "embedding_rank")),
        *((name, -1, "a whole number from 0") for name in ("ode_unfolds", "ncp_seed")),
        ("ncp_sparsity", math.nan, "in"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(field: str, value: float, bound: str) -> None:
    with pytest.raises(ValueError, match=rf"student\.{field} .*{bound}"):
        StudentShape(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("beta2", 1.0),
        ("beta2", -0.1),
        ("weight_decay", -0.01),
        ("embedding_rate", 0.0),
        ("learning_rate", 0.0),
        ("clip", -1.0),
    ],
)
def test_a_training_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"distill\.{field} must"):
        DistillSettings(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("section", "kind"), [("distill", DistillSettings), ("objective", ObjectiveSettings)])
def test_a_number_that_is_none_is_refused_everywhere(section: str, kind: Any, value: float) -> None:
    names = [item.name for item in dataclasses.fields(kind) if isinstance(item.default, float)]
    assert len(names) > 8
    for name in names:
        with pytest.raises(ValueError, match=rf"{section}\.{name} must be a finite number, not {value}"):
            kind(**{name: value})


def test_what_the_engine_alone_refuses_is_an_error_of_the_stage(
    train_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Invalid beta parameter")

    monkeypatch.setattr("stages.distill.start.Engine", refuse)
    with pytest.raises(StageError, match="Invalid beta parameter") as refused:
        train_here(tmp_path)
    assert refused.value.hint == "change what the error names in the recipe"
