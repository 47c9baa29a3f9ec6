"""A program: capture with two tensor-parallel ranks of vLLM, and write each signal, and one full distribution.

capture_tp.py TEACHER OUT SPEC < SAMPLES        both JSON; a sample is [id, prompt ids, response ids]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from stages.corpus.sample import Sample
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.settings import TeacherSettings


def main(teacher: Path, out: Path, spec: CaptureSpec) -> None:
    samples = [
        Sample(sample_id=name, prompt_ids=np.array(prompt, np.int32), response_ids=np.array(response, np.int32))
        for name, prompt, response in json.load(sys.stdin)
    ]
    settings = TeacherSettings(
        dtype="float32", head_dtype="float32", max_model_len=128, max_batched_tokens=64, tensor_parallel=2
    )
    with closing(VllmEngine(teacher, settings, spec)) as engine:
        for index, signal in enumerate(engine.capture(samples)):
            tensors = {field.name: getattr(signal, field.name) for field in dataclasses.fields(signal)}
            attention = tensors.pop("attention")
            tensors |= {f"_{field.name}": getattr(attention, field.name) for field in dataclasses.fields(attention)}
            save_file(tensors, out / f"{index}.safetensors")
        ((_, full),) = engine.full(samples[:1])
        save_file({"logprobs": full}, out / "full.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), CaptureSpec.from_json(sys.argv[3]))
