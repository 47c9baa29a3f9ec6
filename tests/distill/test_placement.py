"""What "auto" chooses: the least communication that fits, the same global batch, and a refusal that says what to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.distill.placement import Room, Workload, activation_bytes, choose
from stages.distill.settings import DistillSettings
from stages.errors import StageError
from stages.student.model import build_student
from stages.student.shape import StudentShape

GIB = 2**30
QWEN_STUDENT = Workload(parameters=45_500_000, record_bytes=400 << 20, loss_bytes=2 * GIB, mean_tokens=900.0)


def room(ranks: int, device_gib: float, *, device: str = "cuda", host_gib: float = 64) -> Room:
    return Room(device=device, ranks=ranks, device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB))


@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6, 8]),
    device_gib=st.floats(1, 100),
    billions=st.floats(0.01, 8),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_a_choice_keeps_the_global_batch_and_fits(
    ranks: int, device_gib: float, billions: float, precision: str
) -> None:
    work = dataclasses.replace(QWEN_STUDENT, parameters=int(billions * 1e9))
    try:
        chosen, reason = choose(DistillSettings(), precision, work, room(ranks, device_gib))
    except StageError:
        return
    assert chosen.share.micro_batch * chosen.share.accumulation * ranks == 48
    assert chosen.device_bytes < device_gib * GIB
    assert chosen.host_bytes < 64 * GIB
    assert "GiB" in reason


def test_less_memory_takes_a_higher_stage_then_offload() -> None:
    work = dataclasses.replace(QWEN_STUDENT, parameters=1_000_000_000)
    ladder = [choose(DistillSettings(), "fp32", work, room(3, gib))[0] for gib in (80, 25, 22, 18, 12)]
    taken = [(choice.zero_stage, choice.offload_optimizer, choice.offload_parameters) for choice in ladder]
    assert taken == sorted(taken, key=lambda way: (way[1], way[2], way[0]))
    assert taken[0] == (0, False, False)
    assert taken[-1][:2] != (0, False)
    assert len(set(taken)) >= 4


def test_sixteen_bits_take_a_stage_that_adds_up_gradients_in_fp32() -> None:
    assert choose(DistillSettings(), "bf16", QWEN_STUDENT, room(3, 80))[0].zero_stage == 2


def test_without_a_gpu_nothing_is_offloaded_into_the_same_memory() -> None:
    work = dataclasses.replace(QWEN_STUDENT, parameters=1_000_000_000)
    chosen, _ = choose(DistillSettings(), "fp32", work, room(2, 20.5, device="cpu"))
    assert (chosen.zero_stage, chosen.offload_optimizer, chosen.offload_parameters) == (3, False, False)


def test_what_the_recipe_says_is_kept() -> None:
    asked = DistillSettings(zero_stage=3, offload_optimizer=True, offload_parameters=False, micro_batch=4)
    chosen, reason = choose(asked, "bf16", QWEN_STUDENT, room(3, 80))
    assert (chosen.zero_stage, chosen.offload_optimizer, chosen.offload_parameters) == (3, True, False)
    assert (chosen.share.micro_batch, chosen.share.accumulation) == (4, 4)
    assert "the recipe's" in reason


def test_too_little_memory_is_refused_with_what_to_change() -> None:
    with pytest.raises(StageError) as refused:
        choose(DistillSettings(zero_stage=0, micro_batch=24), "fp32", QWEN_STUDENT, room(2, 4))
    assert "needs about 1" in str(refused.value)
    for way in ("corpus.max_response_tokens", "student.embedding_rank", "more than 2 GPUs", "at auto"):
        assert way in refused.value.hint


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="these do: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"):
        choose(DistillSettings(), "fp32", QWEN_STUDENT, room(5, 80))


@pytest.mark.parametrize("need_attention", [False, True])
def test_the_dry_run_counts_what_a_real_forward_keeps(need_attention: bool) -> None:
    shape = StudentShape(hidden_size=64, encoder_layers=2, decoder_layers=2, intermediate_size=96)
    student = build_student(shape, vocab_size=211, start_token_id=0, end_token_id=1, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    real = {}
    for records in (1, 2):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids, mask = torch.zeros(records, 70, dtype=torch.int64), torch.ones(records, 70, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = student.hidden(ids, mask, ids, mask, need_attention=need_attention)
        real[records] = sum(kept.values())
        del held
    assert activation_bytes(student, 70, 70, need_attention) == pytest.approx(real[2] - real[1], rel=0.15)
