"""The teacher through vLLM's own prompt_logprobs: slower and poorer, for models that no plugin captures.

What vLLM gives is the k most probable ids of every position, prompt positions included, with true log-probabilities.
What it does not give is made from them, and is less than the plugin's:

- the tail's mass is 1 - sum p, whose digits cancel: beneath about 1e-6 it is rounding, and is never said to be less;
- the entropy is a lower bound: the tail's ids count as if each were as probable as the last kept one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.process import InProcessVllm
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import TeacherSignal, shorten

_LEAST_TAIL = 1e-7


class PromptLogprobsEngine(InProcessVllm):
    """A TeacherEngine for the selections topk and adaptive, without curve and attention."""

    def __init__(self, folder: Path, teacher: TeacherSettings, spec: CaptureSpec) -> None:
        if spec.selection.kind not in ("topk", "adaptive") or spec.curve or spec.attention is not None:
            raise StageError(
                "the engine prompt_logprobs gives top-k log-probabilities and nothing else",
                hint="set cache.selection to topk or adaptive, cache.curve = [] and cache.attention_depths = []",
            )
        super().__init__(folder, teacher)
        self._spec = spec

    @property
    def identity(self) -> str:
        return f"{super().identity} prompt_logprobs"

    @property
    def dtype(self) -> str:
        return f"{self._body_dtype}+{self._body_dtype}"

    def capture(self, samples: Sequence[Sample]) -> Iterator[TeacherSignal]:
        """See TeacherEngine. vLLM says nothing of a position but with the token that stands there: all are fed."""
        self._require_fits(samples)
        self.start()
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._spec.selection.k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompts = [[*sample.prompt_ids.tolist(), *sample.response_ids.tolist()] for sample in samples]
        for sample, output in zip(samples, self._answers(prompts, [asked] * len(samples)), strict=True):
            yield self._signal(output.prompt_logprobs, len(sample.prompt_ids))

    def full(self, _: Sequence[Sample]) -> Iterator[tuple[TeacherSignal, Tensor]]:
        """See TeacherEngine: a Python number for every id of the vocabulary would be too many."""
        return iter(())

    def _options(self) -> dict[str, Any]:
        return {
            "max_model_len": self._teacher.max_model_len + 2,  # one more token is fed, and one is generated
            "max_logprobs": self._spec.selection.k,
            "logprobs_mode": "raw_logprobs",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "enforce_eager": True,
        }

    def _signal(self, flat: Any, prompt_length: int) -> TeacherSignal:
        """Of the response positions; vLLM puts the token that stands there before the k most probable."""
        start, rows, width = flat.start_indices[prompt_length], len(flat) - prompt_length, self._spec.selection.k + 1
        ids_NK = torch.tensor(flat.token_ids[start:], dtype=torch.int32).view(rows, width)[:, 1:]
        logprobs_NK = torch.tensor(flat.logprobs[start:], dtype=torch.float32).view(rows, width)[:, 1:]
        return self._completed(*_sorted(ids_NK, logprobs_NK))

    def _completed(self, ids_NK: Tensor, logprobs_NK: Tensor) -> TeacherSignal:
        probs_NK = logprobs_NK.double().exp()
        tail_N = (1 - probs_NK.sum(dim=-1)).clamp(min=_LEAST_TAIL)
        entropy_N = -(probs_NK * logprobs_NK).sum(dim=-1) - tail_N * logprobs_NK[:, -1]
        log_tail_N = tail_N.log().float()
        if self._spec.selection.kind == "adaptive":
            mass, floor = self._spec.selection.mass, self._spec.selection.floor
            none = logprobs_NK.new_empty((len(ids_NK), 0))
            ids_NK, logprobs_NK, log_tail_N, _ = shorten(
                ids_NK, logprobs_NK, log_tail_N, none, mass=mass, floor=floor, curve=()
            )
        return TeacherSignal(
            ids_NK=ids_NK,
            logprobs_NK=logprobs_NK,
            draws_NK=None,
            log_tail_N=log_tail_N,
            entropy_N=entropy_N.float(),
            curve_NJ=None,
            attention=None,
        )


def _sorted(ids_NK: Tensor, logprobs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """By falling log-probability, equal ones by rising id."""
    order = ids_NK.argsort(dim=-1)
    ids_NK, logprobs_NK = ids_NK.gather(-1, order), logprobs_NK.gather(-1, order)
    logprobs_NK, order = logprobs_NK.sort(dim=-1, descending=True, stable=True)
    return ids_NK.gather(-1, order), logprobs_NK
