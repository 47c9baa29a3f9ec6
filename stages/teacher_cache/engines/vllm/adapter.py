"""The teacher through vLLM, captured by a plugin in its workers: the engine of stage one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.corpus.sample import Sample
from stages.teacher_cache.draws import draw_key
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.plugin import capturing
from stages.teacher_cache.engines.vllm.process import InProcessVllm
from stages.teacher_cache.engines.vllm.wire import DRAW_KEY, FULL, PROMPT_LENGTH, SPEC, TASK, RowLayout, as_float
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import TeacherSignal
from stages.teacher_cache.teacher import read_facts


class VllmEngine(InProcessVllm):
    """A TeacherEngine: vLLM runs the teacher as a pooling model, whose pooler captures."""

    def __init__(self, folder: Path, teacher: TeacherSettings, spec: CaptureSpec) -> None:
        super().__init__(folder, teacher)
        self._spec = spec

    @property
    def dtype(self) -> str:
        return f"{self._body_dtype}+{self._teacher.head_dtype}"

    def capture(self, samples: Sequence[Sample]) -> Iterator[TeacherSignal]:
        layout = RowLayout(self._spec)
        for sample, answer in zip(samples, self._asked(samples), strict=True):
            yield layout.unpack(answer, len(sample.response_ids))

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[TeacherSignal, Tensor]]:
        layout, vocab_size = RowLayout(self._spec), read_facts(self._folder).vocab_size
        for sample, answer in zip(samples, self._asked(samples, **{FULL: True}), strict=True):
            positions = len(sample.response_ids)
            signal, full = answer[: -positions * vocab_size], answer[-positions * vocab_size :]
            yield layout.unpack(signal, positions), as_float(full).view(positions, vocab_size)

    def _asked(self, samples: Sequence[Sample], **more: bool) -> Iterator[Tensor]:
        """The last response token is not fed: its row would predict what comes after it."""
        self._require_fits(samples)
        self.start()
        from vllm import PoolingParams

        prompts = [[*sample.prompt_ids.tolist(), *sample.response_ids[:-1].tolist()] for sample in samples]
        params = []
        for sample in samples:
            key = draw_key(self._spec.seed, sample.sample_id)
            said = {PROMPT_LENGTH: len(sample.prompt_ids), DRAW_KEY: key, **more}
            params.append(PoolingParams(task=TASK, extra_kwargs=said))
        return (output.outputs.data for output in self._answers(prompts, params))

    def _options(self) -> dict[str, Any]:
        architecture = capturing(read_facts(self._folder).architecture)
        return {
            "runner": "pooling",
            "pooler_config": {"task": TASK},
            "hf_overrides": {"architectures": [architecture], "head_dtype": self._teacher.head_dtype},
            "additional_config": {SPEC: self._spec.to_json()},
            "skip_tokenizer_init": True,
            # A row read from the prefix cache would never pass through the hooks; a compiled graph would skip them.
            "enable_prefix_caching": False,
            "enforce_eager": True,
        }
