"""Teachers with quantised weights: vLLM reads them as they are, and captures what their own arithmetic says.

The oracle is transformers in fp32 on the same weights, multiplied out. What one machine's vLLM cannot run is refused
by name, before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.contract import Selection
from stages.errors import StageError
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.transformers import TransformersEngine
from stages.teacher_cache.engines.vllm import process
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.engines.vllm.process import multiplies_four_bits, resolve_dtype
from stages.teacher_cache.settings import TeacherSettings
from tests.teacher_cache.random_samples import random_samples

GROUP = 32
SPEC = CaptureSpec(selection=Selection(kind="topk", k=16), curve=(0.5, 0.25))
SETTINGS = TeacherSettings(dtype="float16", head_dtype="float32", max_model_len=128, max_batched_tokens=64)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


SAMPLES = random_samples((1, 3), (30, 40), seed=2)


def four_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 15 [I, O], scales [I / GROUP, O] and the weights [O, I] that (code - 8) * scale makes of them."""
    grouped_GIO = weight_OI.t().reshape(-1, GROUP, len(weight_OI))
    scales_GO = grouped_GIO.abs().amax(dim=1) / 7
    codes_GIO = (grouped_GIO / scales_GO[:, None]).round().clamp(-8, 7) + 8
    made_IO = ((codes_GIO - 8) * scales_GO[:, None]).flatten(0, 1)
    return codes_GIO.flatten(0, 1).int(), scales_GO, made_IO.t().contiguous()


def packed(codes_NC: Tensor) -> Tensor:
    """Eight codes of a row in an int32, the first lowest."""
    shifted = codes_NC.long().view(len(codes_NC), -1, 8) << torch.arange(0, 32, 4)
    return shifted.sum(dim=-1).to(torch.uint32).view(torch.int32)


def gptq(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes_IO, scales_GO, made_OI = four_bits(weight_OI)
    tensors = {
        "qweight": packed(codes_IO.t()).t().contiguous(),
        "qzeros": packed(torch.full_like(scales_GO, 7).int()),  # the format keeps a zero point less one
        "scales": scales_GO,
        "g_idx": torch.arange(len(codes_IO), dtype=torch.int32) // GROUP,
    }
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, made_OI


def awq(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes_IO, scales_GO, made_OI = four_bits(weight_OI)
    interleaved = codes_IO.view(len(codes_IO), -1, 8)[..., AWQ_ORDER].flatten(1)
    tensors = {
        "qweight": packed(interleaved),
        "qzeros": packed(torch.full_like(scales_GO, 8).int()),
        "scales": scales_GO,
    }
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, made_OI


def fp8(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight_OI.abs().max() / 448
    codes_OI = (weight_OI / scale).to(torch.float8_e4m3fn)
    made_OI = codes_OI.float() * scale
    return {f"{name}.weight": codes_OI, f"{name}.weight_scale": scale.reshape(1)}, made_OI


def write(folder: Path, pack: Pack, config: Mapping[str, Any]) -> tuple[Path, Path]:
    """A small random Llama whose linear layers are packed, and the same one with those weights multiplied out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1_000,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    ).float()
    plain, quantised = folder / "plain", folder / "quantised"
    model.save_pretrained(plain)
    model.save_pretrained(folder / "original")
    tensors = load_file(plain / "model.safetensors")
    kept = dict[str, Tensor]()
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            parts, tensors[name] = pack(name.removesuffix(".weight"), weight)
            kept |= parts
        else:
            kept[name] = weight
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    quantised.mkdir()
    save_file(kept, quantised / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (quantised / "config.json").write_text(json.dumps(facts | {"quantization_config": config}))
    return plain, quantised


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(("pack", "config"), [(gptq, GPTQ), (awq, AWQ)], ids=["gptq", "awq"])
def test_a_quantised_teacher_is_captured_with_the_weights_that_it_has(
    tmp_path: Path, pack: Pack, config: Mapping[str, Any]
) -> None:
    if not multiplies_four_bits():
        pytest.skip("vLLM has no kernel for 4 bits on this CPU")
    plain, quantised = write(tmp_path, pack, config)
    with closing(VllmEngine(quantised, SETTINGS, SPEC)) as engine:
        ours = list(engine.capture(SAMPLES))
        full = list(engine.full(SAMPLES))
    truth, unlike = (list(TransformersEngine(folder, SPEC).full(SAMPLES)) for folder in (plain, tmp_path / "original"))
    for (_, mine), (_, packed_truth), (_, original) in zip(full, truth, unlike, strict=True):
        assert (mine - packed_truth).abs().mean().item() < 0.02, "a float16 body"
        assert (mine - original).abs().mean().item() > 0.3, "what packing itself changes is far more"
    for mine, (_, all_NV) in zip(ours, truth, strict=True):
        assert (mine.logprobs_NK - all_NV.gather(1, mine.ids_NK.long())).abs().mean().item() < 0.02
        assert (mine.entropy_N + (all_NV.exp() * all_NV).sum(dim=-1)).abs().max().item() < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's vLLM may well run fp8 weights")
@pytest.mark.parametrize(
    ("pack", "config", "dtype", "named"),
    [
        pytest.param(fp8, FP8, "bfloat16", "fp8 weights here, in bfloat16", id="fp8"),
        pytest.param(awq, AWQ, "float32", "awq weights here, in float32", id="awq in fp32"),
    ],
)
def test_packed_weights_that_vllm_refuses_on_this_machine_are_named(
    tmp_path: Path, pack: Pack, config: Mapping[str, Any], dtype: str, named: str
) -> None:
    _, quantised = write(tmp_path, pack, config)
    engine = VllmEngine(quantised, dataclasses.replace(SETTINGS, dtype=dtype), SPEC)
    with pytest.raises(StageError, match=named) as refused:
        engine.start()
    assert "with AVX-512: awq or gptq of 4 bits" in refused.value.hint


def test_auto_is_a_precision_that_packed_weights_can_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    plain, quantised = write(tmp_path, awq, AWQ)
    assert (resolve_dtype("auto", plain), resolve_dtype("auto", quantised)) == ("float32", "bfloat16")


def test_four_bits_are_refused_where_vllm_has_no_kernel_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, quantised = write(tmp_path, gptq, GPTQ)
    if multiplies_four_bits():  # as a CPU without AVX-512 finds it
        monkeypatch.setattr(process, "multiplies_four_bits", lambda: False)
    with pytest.raises(StageError, match="gptq weights here, in bfloat16") as refused:
        VllmEngine(quantised, dataclasses.replace(SETTINGS, dtype="auto"), SPEC).start()
    assert "with AVX-512" in refused.value.hint
