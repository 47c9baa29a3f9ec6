"""Students small enough to wire in a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape

VOCAB = 97
START, END = 0, 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_student() -> Callable[..., MiniCodformerForConditionalGeneration]:
    def make(*, seed: int = 6, **changes: Any) -> MiniCodformerForConditionalGeneration:
        small = {"hidden_size": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "intermediate_size": 48}
        shape = StudentShape(**(small | changes))
        return build_student(shape, vocab_size=VOCAB, start_token_id=START, end_token_id=END, seed=seed).eval()

    return make


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "factorised embedding": {"embedding_rank": 12},
    "vector, dense": {"recurrence": "vector", "wiring": "dense"},
    "delta, primed": {"recurrence": "delta", "prime_state": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def student(
    request: pytest.FixtureRequest, make_student: Callable[..., MiniCodformerForConditionalGeneration]
) -> MiniCodformerForConditionalGeneration:
    return make_student(**request.param)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random ids; the start and end tokens may be among them, because ids say nothing about padding."""

    def draw(*size: int, seed: int = 0) -> Tensor:
        return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(seed))

    return draw
