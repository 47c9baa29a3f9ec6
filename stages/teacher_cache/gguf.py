"""A GGUF checkpoint, dequantised into a Hugging Face folder: bfloat16 safetensors, config, tokenizer, chat template.

The folder appears whole or not at all. transformers can load a GGUF itself, but parses the file four times and builds
a name table for each of its modules, and what it has loaded it does not save.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from shards.durable import sync
from stages.errors import StageError
from stages.events import Emit, Note, Progress
from stages.teacher_cache.gguf_container import GgufContainer, read_gguf

STAGE = "convert-teacher"
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_ROTATED_PAIRS = ("llama",)
"""Architectures whose query and key rows llama.cpp reorders, from halves of a head to pairs within it."""
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf: Path, out: Path, emit: Emit) -> None:
    """Write the checkpoint in `gguf` to the new folder `out`.

    Raises StageError where the file is damaged or of an architecture that is not known, ValueError where `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already")
    container = read_gguf(gguf)
    config = _config(container)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    staging = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    staging.mkdir(parents=True)
    try:
        weights = dict(_weights(container, config, emit))
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for path in (*staging.iterdir(), staging):
            sync(path)
        staging.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    emit(
        Note(
            stage=STAGE, text=f"{gguf.name}: {sum(w.numel() for w in weights.values()) / 1e6:.1f}M weights to bfloat16"
        )
    )


def _config(container: GgufContainer) -> Any:
    metadata = container.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _CONFIGS:
        raise StageError(f"GGUF of architecture {architecture!r}", hint=f"only {', '.join(_CONFIGS)} are converted")
    scaled = [key for key in metadata if key.startswith(f"{architecture}.rope.scaling")]
    if scaled or "rope_freqs.weight" in container.tensors:
        raise StageError("GGUF with scaled rotary frequencies", hint="take the checkpoint in safetensors instead")
    fields = {
        ours: metadata[f"{architecture}.{key}"] for key, ours in _FIELDS.items() if f"{architecture}.{key}" in metadata
    }
    special = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return _CONFIGS[architecture](
        **fields,
        **special,
        architectures=[f"{architecture.capitalize()}ForCausalLM"],
        vocab_size=container.tensors["token_embd.weight"].shape[0],
        rope_parameters={"rope_type": "default", "rope_theta": metadata[f"{architecture}.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in container.tensors,
        dtype="bfloat16",
    )


def _weights(container: GgufContainer, config: Any, emit: Emit) -> Iterator[tuple[str, Tensor]]:
    for done, (name, stored) in enumerate(container.tensors.items(), start=1):
        weight = torch.from_numpy(stored.dequantised())
        ours = _hugging_face_name(name)
        if config.model_type in _ROTATED_PAIRS and (heads := _rotated_heads(name, config)):
            weight = _halves_from_pairs(weight, heads)
        yield ours, weight.bfloat16()
        emit(Progress(stage=STAGE, done=done, total=len(container.tensors), unit="tensors"))


def _hugging_face_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match name.split("."):
        case ["blk", layer, inner, kind] if inner in _INNER:
            return f"model.layers.{layer}.{_INNER[inner]}.{kind}"
    raise StageError(f"GGUF tensor {name!r} is not known", hint="take the checkpoint in safetensors instead")


def _rotated_heads(name: str, config: Any) -> int | None:
    heads: Mapping[str, int] = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return next((count for part, count in heads.items() if f".{part}." in name), None)


def _halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of a head's rows for its own rotary embedding."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
