"""What can be set about stage one."""

from __future__ import annotations

from dataclasses import dataclass

from shards.contract import DRAWN, AttentionSpec, Selection, require_curve

ENGINES = ("capture", "prompt_logprobs")
FREE_TEACHER_SETTINGS = ("tensor_parallel", "max_batched_tokens", "gpu_memory_utilization")
"""What may differ between two starts of one run: how the teacher is placed, not what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    model: str = ""
    """A local folder, a hub name, or "demo:NAME" for a teacher that the demo knows how to fetch."""
    revision: str | None = None
    engine: str = "capture"
    """"capture": vLLM with our plugin; "prompt_logprobs": what vLLM itself says, for models without a plugin."""
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
        for name, known in {"engine": ENGINES, "dtype": ("auto", *head), "head_dtype": head}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"teacher.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("teacher.gpu_memory_utilization must be in (0, 1]")
        for name in ("max_model_len", "max_batched_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"teacher.{name} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    selection: str = "topk"
    """Which ids are kept of a position: "topk"; "adaptive": as many as it takes to reach `mass`, none below `floor`, at
    most k; "hybrid": the k most probable and `draws` draws from the rest; "sample": `draws` draws from all."""
    k: int = 64
    """Ids kept a position as the most probable; without meaning for "sample"."""
    draws: int = 12
    """Draws a position of "hybrid" and "sample"."""
    mass: float = 0.95
    floor: float = 1e-3
    sample_logprobs: bool = True
    """Whether "sample" keeps log-probabilities; counts alone take less room and allow no temperature but 1."""
    draw_seed: int = 0
    curve: tuple[float, ...] = ()
    """Falling exponents, at which the partition curve of the tail is kept; (0.5, 0.25) serves every temperature."""
    attention_depths: tuple[float, ...] = (1 / 3, 2 / 3, 35 / 36)
    """Which teacher layers are summarised, as fractions of depth: layer int(depth * layers)."""
    attention_top_m: int = 16
    """Prompt keys kept a row and layer."""
    attention_rows: str = "response"
    """"response", or "all": prompt rows too, which the student's encoder can match."""
    records_per_shard: int = 256
    """The unit of work: one shard, published whole or not at all."""
    pca_width: int = 256
    """Width of the principal components of the teacher's head that are stored for the student's embedding."""

    def __post_init__(self) -> None:
        for name in ("attention_top_m", "records_per_shard", "pca_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"cache.{name} must be at least 1")
        if any(not 0 <= depth < 1 for depth in self.attention_depths):
            raise ValueError("cache.attention_depths must lie in [0, 1)")
        self.chosen()
        self.attention(1)
        require_curve(self.curve)

    def chosen(self) -> Selection:
        """As a Contract says it: what is without meaning for this kind is left out."""
        drawn, adaptive = self.selection in DRAWN, self.selection == "adaptive"
        return Selection(
            kind=self.selection,
            k=0 if self.selection == "sample" else self.k,
            draws=self.draws if drawn else 0,
            mass=self.mass if adaptive else 1.0,
            floor=self.floor if adaptive else 0.0,
            logprobs=self.sample_logprobs or self.selection != "sample",
        )

    def attention(self, layers: int) -> AttentionSpec | None:
        """The summaries of a teacher of so many layers: depths (1/3, 2/3, 35/36) are layers 12, 24 and 35 of 36."""
        chosen = tuple(sorted({int(depth * layers + 1e-9) for depth in self.attention_depths}))
        return AttentionSpec(layers=chosen, top_m=self.attention_top_m, rows=self.attention_rows) if chosen else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RespondSettings:
    """Responses written anew before they are cached."""

    by: str = ""
    """"": the corpus's own responses; "teacher": the teacher writes all (sequence-level distillation);
    "student=PATH": a student's own responses join the corpus's, and the teacher scores them (on-policy rounds)."""
    per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1_024
    """Longer responses are cut, and then end without the end token."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("", "teacher") and not self.student:
            raise ValueError(f"respond.by must be teacher or student=PATH, not {self.by!r}")
        for name in ("per_prompt", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"respond.{name} must be at least 1")
        if not (0 <= self.temperature <= 10 and 0 < self.top_p <= 1):
            raise ValueError("respond.temperature must lie in [0, 10], respond.top_p in (0, 1]")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"respond.seed must be a whole number from 0, not {self.seed}")
        if self.per_prompt > 1 and self.temperature == 0:
            raise ValueError("respond.per_prompt above 1 needs a respond.temperature above 0: else all are the same")

    @property
    def student(self) -> str:
        """The path of the student that writes; empty where none does."""
        who, _, path = self.by.partition("=")
        return path if who == "student" else ""
