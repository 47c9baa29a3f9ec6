"""Tells vLLM, in every one of its processes, about the models that capture. Loaded through `vllm.general_plugins`."""

from __future__ import annotations

from stages.errors import StageError

CAPTURED = {
    "LlamaForCausalLM": "LlamaCapture",
    "Qwen2ForCausalLM": "Qwen2Capture",
    "Qwen3ForCausalLM": "Qwen3Capture",
    "Qwen3MoeForCausalLM": "Qwen3MoeCapture",
}
"""A teacher's architecture, as its config.json names it -> the class in `models` that captures it."""


def register() -> None:
    """Called by vLLM; names the classes without importing them."""
    from vllm import ModelRegistry

    for name in CAPTURED.values():
        ModelRegistry.register_model(name, f"stages.teacher_cache.engines.vllm.models:{name}")


def capturing(architecture: str) -> str:
    """The architecture to run in place of `architecture`. Raises StageError where there is none."""
    try:
        return CAPTURED[architecture]
    except KeyError:
        raise StageError(
            f"no capture for teachers of architecture {architecture}",
            hint=f"known are {', '.join(CAPTURED)}; teacher.engine = 'prompt_logprobs' gives any other's top-k",
        ) from None
