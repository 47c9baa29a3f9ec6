"""What the worker makes of hidden states: the output layer, and every selection, beside an oracle in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shards.contract import Selection
from stages.errors import StageError
from stages.teacher_cache import draws
from stages.teacher_cache.draws import position_keys
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.transformers import TransformersEngine
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.signals import TeacherSignal


def fake_head(
    weight: Tensor, head_dtype: torch.dtype, *, padding: int = 0, scale: float = 1.0
) -> tuple[object, object]:
    """What a model gives ResponseHead: the vocabulary's shard and vLLM's logits processor, here plain torch."""
    shard = SimpleNamespace(org_vocab_start_index=0, num_org_elements=weight.shape[0] - padding)

    def multiply(lm_head: SimpleNamespace, hidden: Tensor, _: None, *, skip_gather: bool) -> Tensor:
        assert skip_gather
        return (hidden.to(head_dtype) @ lm_head.weight.to(head_dtype).t()) * scale

    processor = SimpleNamespace(soft_cap=None, scale=scale, head_dtype=head_dtype)
    processor_class = type("Processor", (), {"__call__": staticmethod(multiply), **vars(processor)})
    sizes = {"org_vocab_size": weight.shape[0] - padding, "num_embeddings_per_partition": weight.shape[0]}
    return SimpleNamespace(weight=weight, shard_indices=shard, **sizes), processor_class()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_an_fp32_head_over_a_bfloat16_body_is_exact_to_fp32(
    engine: VllmEngine, signals: list[TeacherSignal], scale: float
) -> None:
    """Whatever unit does the product; the padding of the vocabulary holds huge weights that must not be seen."""
    from stages.teacher_cache.engines.vllm.head import ResponseHead

    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1_024, 96, generator=generator).bfloat16()
    weight[1_000:] = 1e4
    hidden = torch.randn(70, 96, generator=generator).bfloat16()
    spec = CaptureSpec(selection=Selection(kind="topk", k=16))
    head = ResponseHead(*fake_head(weight, torch.float32, padding=24, scale=scale), spec)
    truth = hidden.double() @ weight[:1_000].double().t() * scale
    assert (head.logits(hidden).double() - truth).abs().max().item() < 1e-4
    signal = asked(head, spec, hidden)
    expected = truth.log_softmax(dim=-1).topk(16)
    assert torch.equal(signal.ids_NK.long(), expected.indices)
    assert (signal.logprobs_NK - expected.values.float()).abs().max().item() < 1e-4


def asked(head: object, spec: CaptureSpec, hidden: Tensor, key: int = 0) -> TeacherSignal:
    """What a head says of a sample whose response rows these are."""
    from stages.teacher_cache.engines.vllm.wire import RowLayout

    layout = RowLayout(spec)
    rows = torch.zeros(len(hidden), sum(layout.head_widths), dtype=torch.int32)
    head.summarise(hidden, position_keys(key, torch.arange(len(hidden))), rows)  # type: ignore[attr-defined]
    return layout.unpack(rows.flatten(), len(hidden))


SELECTED = (
    Selection(kind="topk", k=8),
    Selection(kind="adaptive", k=20, mass=0.9, floor=0.01),
    Selection(kind="hybrid", k=5, draws=40),
    Selection(kind="sample", draws=30),
    Selection(kind="sample", draws=30, logprobs=False),
)


@pytest.mark.parametrize("selection", SELECTED, ids=lambda selection: selection.kind)
def test_every_selection_is_what_the_oracle_says_of_the_same_logits(
    engine: VllmEngine, signals: list[TeacherSignal], selection: Selection
) -> None:
    """Draws too: both turn the same random numbers into ids, the oracle by one running sum in float64."""
    from stages.teacher_cache.engines.vllm.head import ResponseHead

    generator = torch.Generator().manual_seed(5)
    weight, hidden = torch.randn(900, 24, generator=generator), torch.randn(60, 24, generator=generator)
    spec = CaptureSpec(selection=selection, curve=(0.5, 0.25))
    ours = asked(ResponseHead(*fake_head(weight, torch.float32), spec), spec, hidden, key=77)
    logprobs = (hidden.double() @ weight.double().t()).log_softmax(dim=-1)
    oracle = TransformersEngine(Path(), spec)._selected(logprobs, 77)
    same = (ours.ids_NK == oracle["ids_NK"]).all(dim=-1)
    assert same.double().mean().item() > 0.95, "but for what lies within rounding of an edge"
    for name in ("ids_NK", "logprobs_NK", "draws_NK", "log_tail_N", "curve_NJ"):
        mine, theirs = getattr(ours, name), oracle[name]
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype
            assert torch.allclose(mine[same], theirs[same], atol=1e-4, rtol=1e-5), name
    if ours.draws_NK is not None:
        assert (ours.draws_NK.sum(dim=-1) == selection.draws).all()


def test_a_head_in_blocks_is_the_head_in_one(
    engine: VllmEngine, signals: list[TeacherSignal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, whose products are exact in whatever order they are summed."""
    from stages.teacher_cache.engines.vllm import head as module

    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(-2, 3, (640, 32), generator=generator).float()
    hidden = torch.randint(-2, 3, (50, 32), generator=generator) / 4
    spec = CaptureSpec(selection=Selection(kind="hybrid", k=8, draws=6), curve=(0.5, 0.25))
    whole = asked(module.ResponseHead(*fake_head(weight, torch.float32), spec), spec, hidden)
    monkeypatch.setattr(module, "_LOGITS_BYTES", 7 * 640 * 4)
    monkeypatch.setattr(draws, "_CELLS", 3 * 6 * draws.BLOCK)
    blocks = asked(module.ResponseHead(*fake_head(weight, torch.float32), spec), spec, hidden)
    for name in ("ids_NK", "draws_NK"):
        assert torch.equal(getattr(whole, name), getattr(blocks, name))
    for name in ("logprobs_NK", "log_tail_N", "entropy_N", "curve_NJ"):
        assert torch.allclose(getattr(whole, name), getattr(blocks, name), atol=1e-5, rtol=1e-5)


def test_soft_caps_and_too_large_k_are_refused(engine: VllmEngine, signals: list[TeacherSignal]) -> None:
    from stages.teacher_cache.engines.vllm.head import ResponseHead

    lm_head, processor = fake_head(torch.zeros(64, 8), torch.float32)
    with pytest.raises(StageError, match="holds 64 ids"):
        ResponseHead(lm_head, processor, CaptureSpec(selection=Selection(kind="topk", k=64)))
    processor.soft_cap = 30.0  # type: ignore[attr-defined]
    with pytest.raises(StageError, match="soft-caps"):
        ResponseHead(lm_head, processor, CaptureSpec(selection=Selection(kind="topk", k=8)))
