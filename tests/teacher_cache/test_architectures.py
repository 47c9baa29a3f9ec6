"""Every architecture that is registered, as a small random model, against transformers in fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.contract import AttentionSpec, Selection
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.transformers import TransformersEngine
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.engines.vllm.generation import VllmAuthor
from stages.teacher_cache.engines.vllm.plugin import CAPTURED
from stages.teacher_cache.settings import RespondSettings, TeacherSettings
from tests.teacher_cache.random_samples import random_samples

SHAPE = {
    "vocab_size": 1_000,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
WINDOW = 16


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2() -> Any:
    """Qwen2.5 too; with a sliding window, which Qwen2's configuration allows."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **window))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, head_dim=32))


MODELS = (llama, qwen2, qwen3, qwen3_moe)


SAMPLES = random_samples((1, 3), (30, 40), (9, 20), seed=2)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_registered_teacher_is_captured_as_transformers_says(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build().float()
    assert type(model).__name__ in CAPTURED
    model.save_pretrained(tmp_path)
    spec = CaptureSpec(
        selection=Selection(kind="topk", k=16), curve=(0.5, 0.25), attention=AttentionSpec(layers=(0, 1), top_m=5)
    )
    settings = TeacherSettings(dtype="float32", head_dtype="float32", max_model_len=128, max_batched_tokens=64)
    with closing(VllmEngine(tmp_path, settings, spec)) as engine:
        ours = list(engine.capture(SAMPLES))
    for mine, other in zip(ours, TransformersEngine(tmp_path, spec).capture(SAMPLES), strict=True):
        assert (mine.ids_NK == other.ids_NK).double().mean().item() > 0.99
        for name in ("logprobs_NK", "log_tail_N", "entropy_N", "curve_NJ"):
            assert torch.allclose(getattr(mine, name), getattr(other, name), atol=5e-4, rtol=1e-4), name
        assert mine.attention is not None
        assert other.attention is not None
        for name in ("weights_LNM", "sink_LN", "prompt_LN", "entropy_LN"):
            assert torch.allclose(getattr(mine.attention, name), getattr(other.attention, name), atol=1e-4), name
    if build is qwen2:
        assert (ours[1].attention.sink_LN[:, WINDOW:] == 0).all(), "the first key left the window"  # type: ignore[union-attr]


def test_a_teacher_writes_what_transformers_would(tmp_path: Path) -> None:
    """Greedy; and a seed decides what is drawn."""
    torch.manual_seed(1)
    model = llama().float().eval()
    model.save_pretrained(tmp_path)
    settings = TeacherSettings(dtype="float32", max_model_len=64)
    prompts = [sample.prompt_ids.tolist() for sample in SAMPLES]
    (end,) = model.generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)[0, -1:].tolist()
    with closing(VllmAuthor(tmp_path, settings, RespondSettings(temperature=0.0, max_new_tokens=40), end)) as author:
        greedy = author.write(prompts, 0)
    assert greedy[0][-1] == end
    assert len(greedy[0]) <= 3
    for prompt, response in zip(prompts, greedy, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=min(40, 64 - len(prompt)), do_sample=False, eos_token_id=end
        )
        assert response == expected[0, len(prompt) :].tolist()
    with closing(VllmAuthor(tmp_path, settings, RespondSettings(max_new_tokens=8), 999)) as author:
        assert author.write(prompts, 5) == author.write(prompts, 5) != author.write(prompts, 6)


def test_all_that_is_registered_is_tested() -> None:
    assert {type(build()).__name__ for build in MODELS} == set(CAPTURED)
