"""The oracle: transformers in fp32 with eager attention, one sample at a time, by the definitions and nothing else.

Slow on purpose. It shares no arithmetic with the engine that it judges.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.corpus.sample import Sample
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal


class TransformersEngine:
    """A TeacherEngine for small teachers and short samples."""

    def __init__(self, folder: Path, spec: CaptureSpec) -> None:
        self._folder, self._spec = folder, spec
        self._model: Any = None

    @property
    def identity(self) -> str:
        return f"transformers {importlib.metadata.version('transformers')}"

    @property
    def dtype(self) -> str:
        return "float32+float32"

    def start(self) -> None:
        if self._model is None:
            self._model = self._load()

    def capture(self, samples: Sequence[Sample]) -> Iterator[TeacherSignal]:
        self.start()
        for sample in samples:
            yield self._signal(sample)

    def close(self) -> None:
        self._model = None

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        )
        return model.eval()

    @torch.inference_mode()
    def _signal(self, sample: Sample) -> TeacherSignal:
        prompt_length = len(sample.prompt_ids)
        tokens = torch.tensor([*sample.prompt_ids.tolist(), *sample.response_ids.tolist()])
        output = self._model(tokens[None], output_attentions=True)
        rows = slice(prompt_length - 1, len(tokens) - 1)
        logprobs_NV = output.logits[0, rows].double().log_softmax(dim=-1)
        ids_NK = logprobs_NV.topk(self._spec.k, dim=-1).indices
        tail_NV = logprobs_NV.scatter(-1, ids_NK, -torch.inf)
        attentions = [output.attentions[layer][0, :, rows] for layer in self._spec.attention_layers]
        return TeacherSignal(
            ids_NK=ids_NK.int(),
            logprobs_NK=logprobs_NV.gather(-1, ids_NK).float(),
            log_tail_N=tail_NV.logsumexp(dim=-1).float(),
            entropy_N=-(logprobs_NV.exp() * logprobs_NV).sum(dim=-1).float(),
            attention=self._attention(attentions, prompt_length) if attentions else None,
        )

    def _attention(self, attentions: list[Tensor], prompt_length: int) -> AttentionSignal:
        mean_LNS = torch.stack([attention_HNS.double().mean(dim=0) for attention_HNS in attentions])
        layers, rows, _ = mean_LNS.shape
        prompt_LNP = mean_LNS[..., 1:prompt_length]
        kept = min(self._spec.attention_top_m, prompt_length - 1)
        positions_LNM = torch.full((layers, rows, self._spec.attention_top_m), -1, dtype=torch.int32)
        weights_LNM = torch.zeros((layers, rows, self._spec.attention_top_m))
        weights, positions = prompt_LNP.sort(dim=-1, descending=True)
        positions_LNM[..., :kept] = positions[..., :kept].int() + 1
        weights_LNM[..., :kept] = weights[..., :kept].float()
        return AttentionSignal(
            positions_LNM=positions_LNM,
            weights_LNM=weights_LNM,
            sink_LN=mean_LNS[..., 0].float(),
            prompt_LN=prompt_LNP.sum(dim=-1).float(),
            entropy_LN=-torch.xlogy(mean_LNS, mean_LNS).sum(dim=-1).float(),
        )
