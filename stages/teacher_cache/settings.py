"""What can be set about stage one."""

from __future__ import annotations

from dataclasses import dataclass

FREE_TEACHER_SETTINGS = ("tensor_parallel", "max_batched_tokens", "gpu_memory_utilization")
"""What may differ between two starts of one run: how the teacher is placed, not what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    model: str = ""
    """A local folder, a hub name, or "demo:NAME" for a teacher that the demo knows how to fetch."""
    revision: str | None = None
    dtype: str = "auto"
    """Precision of the teacher's body: "bfloat16", "float16", "float32", or "auto": bfloat16 where the device has
    matrix units for it (float16 on GPUs older than that), else float32, which is then the faster one."""
    head_dtype: str = "float32"
    """Precision of the logits' matrix product."""
    max_model_len: int = 2_048
    max_batched_tokens: int = 2_048
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        head = ("bfloat16", "float16", "float32")
        for name, known in {"dtype": ("auto", *head), "head_dtype": head}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"teacher.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("teacher.gpu_memory_utilization must be in (0, 1]")
        for name in ("max_model_len", "max_batched_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"teacher.{name} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    k: int = 64
    """Ids kept a position."""
    attention_depths: tuple[float, ...] = (1 / 3, 2 / 3, 35 / 36)
    """Which teacher layers are summarised, as fractions of depth: layer int(depth * layers)."""
    attention_top_m: int = 16
    """Prompt keys kept a row and layer."""
    records_per_shard: int = 256
    """The unit of work: one shard, published whole or not at all."""
    pca_width: int = 256
    """Width of the principal components of the teacher's head that are stored for the student's embedding."""

    def __post_init__(self) -> None:
        for name in ("k", "attention_top_m", "records_per_shard", "pca_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"cache.{name} must be at least 1")
        if any(not 0 <= depth < 1 for depth in self.attention_depths):
            raise ValueError("cache.attention_depths must lie in [0, 1)")
