"""Attention rows of chosen layers: the queries and keys of a step, the keys of the steps before, the summary.

vLLM's kernels never form attention weights. A hook keeps each chosen layer's queries and keys, as they enter the
kernel after the rotary embedding; the softmax is done again for response rows alone, in fp32.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from stages.errors import StageError
from stages.teacher_cache.engines.vllm.wire import write_columns
from stages.teacher_cache.signals import attention_heads_sum, summarise_attention

_SCORES_BYTES = 64 * 2**20
"""fp32 scores held at once: of all heads, or of their sum where the kernel makes it."""
_KERNEL_FROM = 4_096
"""Keys from which on it is worth not to write the scores of all heads: by count, plain torch then moves 4 GB a layer
for a response of 1,024 tokens and 32 heads, the kernel 17 MB. Not yet measured on a GPU."""


class LayerAttention:
    """The attention of one layer of the teacher, as this rank computes its heads."""

    def __init__(self, module: Attention, top_m: int) -> None:
        _refuse_unlike_softmax(module)
        self._module, self._top_m = module, top_m
        self._step: tuple[Tensor, Tensor] | None = None
        module.register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        query, key = inputs[0], inputs[1]
        assert key is not None, "a layer that shares another's keys was refused"
        heads, key_heads, width = self._module.num_heads, self._module.num_kv_heads, self._module.head_size
        self._step = query.view(-1, heads, width), key.view(-1, key_heads, width)

    def take(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of the whole step's tokens, once."""
        assert self._step is not None, "the layer ran before its attention is asked for"
        step, self._step = self._step, None
        return step

    def summarise(
        self, queries_NHd: Tensor, keys_SHd: Tensor, *, first_row: int, prompt_length: int, rows_NW: Tensor
    ) -> None:
        """Write the summary of the rows `first_row ..` into `rows_NW`; `keys_SHd` are all keys from position 0 on."""
        ranks = get_tensor_model_parallel_world_size()
        heads, span = self._module.num_heads, keys_SHd.shape[0]
        kernel = _kernel() if keys_SHd.is_cuda and span >= _KERNEL_FROM else None
        step = max(1, _SCORES_BYTES // (4 * span * (1 if kernel else heads)))
        for start in range(0, queries_NHd.shape[0], step):
            sum_NS = (kernel or attention_heads_sum)(
                queries_NHd[start : start + step],
                keys_SHd,
                first_row=first_row + start,
                scale=float(self._module.impl.scale),
                window=self._module.sliding_window,
            )
            mean_NS = tensor_model_parallel_all_reduce(sum_NS) / (heads * ranks)
            write_columns(rows_NW[start : start + step], *summarise_attention(mean_NS, prompt_length, self._top_m))


@cache
def _kernel() -> Any:
    """`attention_heads_sum` without the scores of all heads; None where there is no Triton."""
    if find_spec("triton") is None:
        return None
    from stages.teacher_cache.attention_kernel import attention_heads_sum as kernel

    return kernel


def chosen_layers(model: nn.Module, layers: tuple[int, ...], top_m: int) -> list[LayerAttention]:
    """The attention of `layers`, in that order. Raises StageError where one cannot be captured faithfully."""
    found = {extract_layer_index(m.layer_name): m for m in model.modules() if isinstance(m, Attention)}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise StageError(
            f"the teacher has no plain attention in layers {missing}",
            hint="latent (MLA) and linear attention are not captured; set cache.attention_depths = []",
        )
    return [LayerAttention(found[layer], top_m) for layer in layers]


def _refuse_unlike_softmax(module: Attention) -> None:
    """Refuse what would make softmax(q k / sqrt d) another function than the layer's own."""
    unlike = {
        "learned attention sinks": module.has_sink,
        "a soft cap on attention scores": getattr(module.impl, "logits_soft_cap", None),
        "ALiBi slopes": getattr(module.impl, "alibi_slopes", None) is not None,
        "keys shared with another layer": getattr(module, "kv_sharing_target_layer_name", None) is not None,
    }
    for what, present in unlike.items():
        if present:
            raise StageError(
                f"{module.layer_name} uses {what}",
                hint="its attention cannot be captured; set cache.attention_depths = []",
            )
