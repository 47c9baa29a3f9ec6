"""The oracle: transformers in fp32 with eager attention, one sample at a time, by the definitions and nothing else.

Slow on purpose. It shares no arithmetic with the engine that it judges, but for the random numbers behind the draws.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.contract import DRAWN
from stages.corpus.sample import Sample
from stages.teacher_cache.draws import draw_key, position_keys, uniforms
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

    @torch.inference_mode()
    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[TeacherSignal, Tensor]]:
        self.start()
        for sample in samples:
            tokens = torch.tensor([*sample.prompt_ids.tolist(), *sample.response_ids.tolist()])
            rows = slice(len(sample.prompt_ids) - 1, len(tokens) - 1)
            logprobs_NV = self._model(tokens[None]).logits[0, rows].double().log_softmax(dim=-1)
            yield self._signal(sample), logprobs_NV.float()

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
        last = len(tokens) - 1
        logprobs_NV = output.logits[0, prompt_length - 1 : last].double().log_softmax(dim=-1)
        rows = slice(self._spec.first_attention_row(prompt_length), last)
        attentions = [output.attentions[layer][0, :, rows] for layer in self._spec.layers]
        return TeacherSignal(
            **self._selected(logprobs_NV, draw_key(self._spec.seed, sample.sample_id)),
            entropy_N=-(logprobs_NV.exp() * logprobs_NV).sum(dim=-1).float(),
            attention=self._attention(attentions, prompt_length) if attentions else None,
        )

    def _selected(self, logprobs_NV: Tensor, key: int) -> dict[str, Any]:
        """The kept ids, and the tail and its curve outside the exact head."""
        selection, rows = self._spec.selection, len(logprobs_NV)
        ids_NK = torch.full((rows, selection.most_kept), -1)
        kept_NK = torch.full((rows, selection.most_kept), -torch.inf, dtype=torch.float64)
        draws_NK = torch.zeros_like(ids_NK)
        tail_NV = logprobs_NV.clone()
        keys = position_keys(key, torch.arange(rows)).tolist()
        for row in range(rows):
            exact, mass = list[int](), 0.0
            for token in logprobs_NV[row].sort(descending=True, stable=True).indices[: selection.k].tolist():
                prob = logprobs_NV[row, token].exp().item()
                if exact and selection.kind == "adaptive" and (mass >= selection.mass or prob < selection.floor):
                    break
                exact.append(token)
                mass += prob
            tail_NV[row, exact] = -torch.inf
            running_V = tail_NV[row].exp().cumsum(dim=-1)
            targets_D = uniforms(torch.tensor([keys[row]]), selection.draws)[0] * running_V[-1]
            drawn = Counter[int](torch.searchsorted(running_V, targets_D, right=True).tolist())
            by = logprobs_NV[row].tolist() if selection.logprobs else drawn
            found = sorted(drawn, key=lambda token, by=by: (-by[token], token))  # type: ignore[misc]
            for slot, token in [*enumerate(exact), *enumerate(found, start=selection.k)]:
                ids_NK[row, slot], kept_NK[row, slot] = token, logprobs_NV[row, token]
                draws_NK[row, slot] = drawn[token] if slot >= selection.k else 0
        return {
            "ids_NK": ids_NK.int(),
            "logprobs_NK": kept_NK.float() if selection.logprobs else None,
            "draws_NK": draws_NK.int() if selection.kind in DRAWN else None,
            "log_tail_N": tail_NV.logsumexp(dim=-1).float(),
            "curve_NJ": self._curve(tail_NV) if self._spec.curve else None,
        }

    def _curve(self, tail_NV: Tensor) -> Tensor:
        """log sum p^b, then its slope by the definition of the derivative's numerator and denominator."""
        powers = [(node * tail_NV).exp() for node in self._spec.curve]
        values = [power_NV.sum(dim=-1).log() for power_NV in powers]
        finite_NV = tail_NV.masked_fill(tail_NV.isinf(), 0.0)
        slopes = [(power_NV * finite_NV).sum(dim=-1) / power_NV.sum(dim=-1) for power_NV in powers]
        return torch.stack([*values, *slopes], dim=-1).float()

    def _attention(self, attentions: list[Tensor], prompt_length: int) -> AttentionSignal:
        assert self._spec.attention is not None, "attention was asked for"
        top_m = self._spec.attention.top_m
        mean_LNS = torch.stack([attention_HNS.double().mean(dim=0) for attention_HNS in attentions])
        layers, rows, _ = mean_LNS.shape
        prompt_LNP = mean_LNS[..., 1:prompt_length]
        kept = min(top_m, prompt_length - 1)
        positions_LNM = torch.full((layers, rows, top_m), -1, dtype=torch.int32)
        weights_LNM = torch.zeros((layers, rows, top_m))
        weights, positions = prompt_LNP.sort(dim=-1, descending=True, stable=True)
        positions_LNM[..., :kept] = positions[..., :kept].int() + 1
        weights_LNM[..., :kept] = weights[..., :kept].float()
        return AttentionSignal(
            positions_LNM=positions_LNM,
            weights_LNM=weights_LNM,
            sink_LN=mean_LNS[..., 0].float(),
            prompt_LN=prompt_LNP.sum(dim=-1).float(),
            entropy_LN=-torch.xlogy(mean_LNS, mean_LNS).sum(dim=-1).float(),
        )
