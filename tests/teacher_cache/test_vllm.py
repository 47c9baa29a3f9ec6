"""The vLLM engine against transformers in fp32, on the real SmolLM2 and under tensor parallelism on a random Qwen3.

One engine in this process serves all tests; the tensor-parallel one runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shards.contract import AttentionSpec, Selection
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.transformers import TransformersEngine
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.engines.vllm.plugin import register
from stages.teacher_cache.engines.vllm.process import resolve_dtype
from stages.teacher_cache.engines.vllm.prompt_logprobs import PromptLogprobsEngine
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal
from tests.teacher_cache.random_samples import random_samples


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def same_ids(ours: TeacherSignal, theirs: TeacherSignal) -> Tensor:
    """[N]: whether both kept the same ids, whatever the order of those that are nearly as probable."""
    return (ours.ids_NK.sort(dim=-1).values == theirs.ids_NK.sort(dim=-1).values).all(dim=-1)


def require_equal_signals(ours: list[TeacherSignal], theirs: list[TeacherSignal], *, logprobs: float) -> None:
    """Where an id is at the edge of being kept, rounding decides; all else agrees within `logprobs` nats."""
    same = [same_ids(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert torch.cat(same).double().mean().item() >= 0.99
    for mine, other, same_N in zip(ours, theirs, same, strict=True):
        assert largest_difference(mine.logprobs_NK[same_N].exp(), other.logprobs_NK[same_N].exp()) <= logprobs
        kept = ~mine.logprobs_NK[same_N].isinf()
        assert largest_difference(mine.logprobs_NK[same_N][kept], other.logprobs_NK[same_N][kept]) <= logprobs
        assert largest_difference(mine.log_tail_N[same_N], other.log_tail_N[same_N]) <= logprobs
        assert largest_difference(mine.curve_NJ[same_N], other.curve_NJ[same_N]) <= 2 * logprobs
        assert largest_difference(mine.entropy_N, other.entropy_N) <= 2 * logprobs
        assert mine.attention is not None
        assert other.attention is not None
        require_equal_attention(mine.attention, other.attention)


def require_equal_attention(ours: AttentionSignal, theirs: AttentionSignal) -> None:
    assert (ours.positions_LNM == theirs.positions_LNM).double().mean().item() >= 0.999
    assert largest_difference(ours.weights_LNM, theirs.weights_LNM) <= 1e-5
    assert largest_difference(ours.sink_LN, theirs.sink_LN) <= 1e-5
    assert largest_difference(ours.prompt_LN, theirs.prompt_LN) <= 1e-5
    assert largest_difference(ours.entropy_LN, theirs.entropy_LN) <= 5e-5


def test_every_signal_agrees_with_transformers_whole_or_in_chunks(
    signals: list[TeacherSignal], oracle_signals: list[TeacherSignal]
) -> None:
    """Samples longer than the engine's step budget were prefilled in chunks, the others whole."""
    require_equal_signals(signals, oracle_signals, logprobs=2e-4)


def test_a_signal_has_one_row_a_response_token(samples: list[Sample], signals: list[TeacherSignal]) -> None:
    for sample, signal in zip(samples, signals, strict=True):
        assert len(signal.ids_NK) == len(sample.response_ids)
        assert signal.ids_NK.dtype == torch.int32
        assert signal.attention is not None
        prompt, response = len(sample.prompt_ids), len(sample.response_ids)
        assert signal.attention.sink_LN.shape == (3, response + max(prompt - 2, 0)), "rows 1 to P+R-2"


def test_signals_come_in_the_order_of_the_samples(
    engine: VllmEngine, samples: list[Sample], signals: list[TeacherSignal]
) -> None:
    order = [6, 2, 0, 3]
    again = list(engine.capture([samples[index] for index in order]))
    require_equal_signals(again, [signals[index] for index in order], logprobs=1e-4)


def test_the_same_call_gives_the_same_bits(
    engine: VllmEngine, samples: list[Sample], signals: list[TeacherSignal]
) -> None:
    for first, second in zip(signals, engine.capture(samples), strict=True):
        for name in ("ids_NK", "logprobs_NK", "log_tail_N", "entropy_N", "curve_NJ"):
            assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.usefixtures("engine")
def test_vllm_starts_where_numba_has_compiled_something() -> None:
    library = importlib.import_module("llvmlite.binding.ffi").lib
    assert not hasattr(library, "__dict__"), "vLLM would take what answers for a dictionary"
    assert callable(library.LLVMPY_GetVersionInfo)


def test_full_distributions_are_those_of_transformers_whole_or_in_chunks(
    engine: VllmEngine, samples: list[Sample], smollm2: Path, spec: CaptureSpec
) -> None:
    truth = TransformersEngine(smollm2, spec).full(samples)
    for (_, ours_NV), (_, theirs_NV) in zip(engine.full(samples), truth, strict=True):
        assert largest_difference(ours_NV, theirs_NV) < 5e-4


def test_the_signal_beside_a_full_distribution_is_of_the_same_pass(engine: VllmEngine, samples: list[Sample]) -> None:
    for signal, logprobs_NV in engine.full(samples):
        assert signal.attention is not None, "whatever else was asked for is there too"
        assert signal.logprobs_NK is not None
        there_NK = signal.ids_NK >= 0
        kept_NK = logprobs_NV.gather(-1, signal.ids_NK.long().clamp(min=0))
        assert largest_difference(signal.logprobs_NK[there_NK], kept_NK[there_NK]) < 5e-5, (
            "one body, two products of its head"
        )


def test_a_capture_given_up_leaves_nothing_behind(
    engine: VllmEngine, samples: list[Sample], signals: list[TeacherSignal]
) -> None:
    abandoned: Iterator[TeacherSignal] = engine.capture(samples)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    require_equal_signals(list(engine.capture(samples[2:4])), signals[2:4], logprobs=1e-4)


def test_prompt_rows_never_reach_the_head(
    engine: VllmEngine, samples: list[Sample], signals: list[TeacherSignal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.teacher_cache.engines.vllm.head import ResponseHead

    rows: list[int] = []
    multiply = ResponseHead.padded_logits

    def counted(head: ResponseHead, hidden_ND: Tensor) -> Tensor:
        rows.append(len(hidden_ND))
        return multiply(head, hidden_ND)

    monkeypatch.setattr(ResponseHead, "padded_logits", counted)
    list(engine.capture(samples))
    assert sum(rows) == sum(len(sample.response_ids) for sample in samples)


def test_a_sample_beyond_the_context_is_refused_by_name(engine: VllmEngine, samples: list[Sample]) -> None:
    long = dataclasses.replace(samples[0], sample_id="f" * 16, prompt_ids=np.ones(300, np.int32))
    with pytest.raises(StageError, match="f" * 16) as refused:
        list(engine.capture([samples[1], long]))
    assert "max_model_len" in refused.value.hint


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("has_sink", True, "sinks"),
        ("kv_sharing_target_layer_name", "model.layers.0", "shared"),
        ("impl", SimpleNamespace(scale=1.0, logits_soft_cap=50.0), "soft cap"),
        ("impl", SimpleNamespace(scale=1.0, alibi_slopes=torch.ones(1)), "ALiBi"),
    ],
)
def test_attention_that_is_no_plain_softmax_is_refused_by_name(
    engine: VllmEngine, signals: list[TeacherSignal], field: str, value: object, named: str
) -> None:
    from stages.teacher_cache.engines.vllm.attention import LayerAttention

    module = SimpleNamespace(has_sink=False, impl=SimpleNamespace(scale=1.0), layer_name="model.layers.3.attn")
    setattr(module, field, value)
    with pytest.raises(StageError, match=named):
        LayerAttention(module, 4)  # type: ignore[arg-type]


def test_an_unknown_architecture_is_refused_listing_the_known(
    tmp_path: Path, spec: CaptureSpec, samples: list[Sample]
) -> None:
    facts = {"architectures": ["Gemma2ForCausalLM"], "vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(StageError, match="Gemma2ForCausalLM") as refused:
        list(VllmEngine(tmp_path, TeacherSettings(), spec).capture(samples[:1]))
    for known in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert known in refused.value.hint


def test_an_installed_vllm_loads_the_plugin_in_every_process() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="minicodformer_capture")
    assert entry.load() is register


@pytest.mark.parametrize(
    ("cuda", "tiles", "expected"),
    [
        ("native", False, "bfloat16"),
        ("emulated", False, "float16"),
        ("", True, "bfloat16"),
        ("", False, "float32"),
    ],
)
def test_auto_takes_half_precision_where_there_are_matrix_units(
    monkeypatch: pytest.MonkeyPatch, recorded_teacher: Path, cuda: str, tiles: bool, expected: str
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return cuda == "native" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    assert resolve_dtype("auto", recorded_teacher) == expected
    assert resolve_dtype("float16", recorded_teacher) == "float16"


def test_the_engine_states_what_it_is_before_it_starts(tmp_path: Path, spec: CaptureSpec) -> None:
    engine = VllmEngine(tmp_path, TeacherSettings(dtype="float16", head_dtype="float32"), spec)
    assert engine.identity.split()[0] == "vllm"
    assert engine.identity.split()[1].startswith("0.")
    assert engine.dtype == "float16+float32"
    engine.close()


def test_the_engine_without_a_plugin_says_the_same_as_far_as_it_can(
    engine: VllmEngine,
    smollm2: Path,
    spec: CaptureSpec,
    samples: list[Sample],
    signals: list[TeacherSignal],
    oracle_signals: list[TeacherSignal],
) -> None:
    """The same records both ways; the plugin's engine runs in this process at the same time, and after it."""
    settings = TeacherSettings(dtype="float32", max_model_len=256, max_batched_tokens=64)
    plain = CaptureSpec(selection=spec.selection)
    with closing(PromptLogprobsEngine(smollm2, settings, plain)) as other:
        assert other.identity.endswith("prompt_logprobs")
        fallback = list(other.capture(samples))
    require_equal_signals(list(engine.capture(samples[:2])), signals[:2], logprobs=1e-4)
    for others in (signals, oracle_signals):
        same = [same_ids(mine, other) for mine, other in zip(fallback, others, strict=True)]
        assert torch.cat(same).double().mean().item() >= 0.99
        for mine, other, same_N in zip(fallback, others, same, strict=True):
            kept_NK = mine.ids_NK[same_N] >= 0
            assert largest_difference(mine.logprobs_NK[same_N][kept_NK], other.logprobs_NK[same_N][kept_NK]) <= 2e-4
            assert largest_difference(mine.log_tail_N[same_N], other.log_tail_N[same_N]) <= 1e-2, "1 - sum p"
            assert (mine.entropy_N <= other.entropy_N + 1e-3).all(), "a lower bound"
            assert (mine.entropy_N > 0.6 * other.entropy_N).all()


@pytest.mark.parametrize(
    "spec",
    [
        CaptureSpec(selection=Selection(kind="hybrid", k=4, draws=4)),
        CaptureSpec(selection=Selection(kind="topk", k=4), curve=(0.5,)),
        CaptureSpec(selection=Selection(kind="topk", k=4), attention=AttentionSpec(layers=(0,), top_m=2)),
    ],
)
def test_what_vllm_does_not_say_is_refused_by_the_engine_without_a_plugin(tmp_path: Path, spec: CaptureSpec) -> None:
    with pytest.raises(StageError, match="nothing else") as refused:
        PromptLogprobsEngine(tmp_path, TeacherSettings(), spec)
    assert "cache.selection" in refused.value.hint


TP_SPEC = CaptureSpec(
    selection=Selection(kind="hybrid", k=24, draws=20),
    curve=(0.5, 0.25),
    attention=AttentionSpec(layers=(0, 2), top_m=6),
    seed=3,
)


TP_SAMPLES = random_samples((1, 4), (40, 50), (12, 1), seed=5)
"""With ids of the second rank's shard among them; the second is prefilled in chunks."""


def test_two_tensor_parallel_ranks_agree_with_transformers(tmp_path: Path, tiny_qwen3: Path) -> None:
    program = Path(__file__).with_name("capture_tp.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(program), str(tiny_qwen3), str(tmp_path), TP_SPEC.to_json()],
        input=json.dumps(
            [[sample.sample_id, sample.prompt_ids.tolist(), sample.response_ids.tolist()] for sample in TP_SAMPLES]
        ),
        text=True,
        check=True,
        env=environment,
    )
    ours = [_loaded(tmp_path / f"{index}.safetensors") for index in range(len(TP_SAMPLES))]
    theirs = list(TransformersEngine(tiny_qwen3, TP_SPEC).capture(TP_SAMPLES))
    require_equal_signals(ours, theirs, logprobs=2e-4)
    full = load_file(tmp_path / "full.safetensors")["logprobs"]
    ((_, truth),) = TransformersEngine(tiny_qwen3, TP_SPEC).full(TP_SAMPLES[:1])
    assert largest_difference(full, truth) < 2e-4
    for mine, other in zip(ours, theirs, strict=True):
        same = same_ids(mine, other)
        assert torch.equal(mine.draws_NK[same], other.draws_NK[same])
    kept = torch.cat([signal.ids_NK.flatten() for signal in ours])
    assert (kept < 1_000).all(), "nothing of the vocabulary's padding"
    drawn = torch.cat([signal.ids_NK[signal.draws_NK > 0] for signal in ours])
    for ids in (kept[kept >= 0], drawn):
        assert (ids < 512).any()
        assert (ids >= 512).any(), "both ranks contribute"


def _loaded(path: Path) -> TeacherSignal:
    tensors = load_file(path)
    attention = AttentionSignal(**{name[1:]: tensor for name, tensor in tensors.items() if name.startswith("_")})
    return TeacherSignal(**{name: t for name, t in tensors.items() if not name.startswith("_")}, attention=attention)
