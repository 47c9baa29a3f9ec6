"""The teachers that can be captured: vLLM's own models, run as pooling models whose pooler captures."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from stages.teacher_cache.engines.vllm.pooler import CapturePooler


class _Capture:
    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        self.pooler = CapturePooler(self, vllm_config)


class LlamaCapture(_Capture, LlamaForCausalLM):
    """Llama, and what shares its architecture."""


class Qwen2Capture(_Capture, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class Qwen3Capture(_Capture, Qwen3ForCausalLM):
    """Dense Qwen3."""


class Qwen3MoeCapture(_Capture, Qwen3MoeForCausalLM):
    """Qwen3 with experts: its attention and head are the dense model's."""
