"""What can be set about stage two."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

Auto = Literal["auto"]
AUTO: Auto = "auto"


TEMPERATURE_MODES = ("fixed", "schedule", "entropy", "adaptive")
WEIGHT_SHAPES = ("linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    kd: str = "tail_bucket_kl"
    """Which distillation loss; the table of them is `stages.distill.losses.table.LOSSES`."""
    kd_weight: float = 1.0
    ce_weight: float = 0.1
    attention_weight: float = 0.1
    """Of the decoder's cross-attention. Falls linearly to 0 at half of the run, and the encoder's with it."""
    encoder_weight: float = 0.05
    """Of the encoder's own attention; only sets that hold attention of the prompt's rows have what it needs."""
    kd_final: float = 1.0
    """Share of `kd_weight` that is left at the last step."""
    ce_final: float = 1.0
    weight_shape: str = "linear"
    """How both weights get there: "linear" or "cosine"."""
    beta: float = 0.5
    """Of `jensen_shannon`: the teacher's share of the mixture."""
    hard_negatives: int = 32
    """Of `water_filled_kl`: how many of the student's best ids may be hard negatives."""
    least_entropy: float = 0.0
    """Where the teacher's entropy is below so many nats it teaches nothing: only the other terms do."""
    temperature_mode: str = "fixed"
    """"fixed", "schedule" (a cosine from `temperature` to 1), or, on top of that schedule, a temperature for each
    position by the teacher's "entropy" or by how far the student is off ("adaptive")."""
    temperature: float = 1.0
    temperature_contrast: float = 0.3
    """How far a position's difficulty moves its temperature: by a factor e^-contrast to e^contrast."""
    temperature_cap: float = 1.5
    """Above it a cached head says little: k = 64 kept less than half of the tempered KL at T = 2."""

    def __post_init__(self) -> None:
        _require_finite("objective", self)
        for name in ("kd_weight", "ce_weight", "attention_weight", "encoder_weight", "kd_final", "ce_final"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} must not be negative")
        if self.kd_weight == self.ce_weight == 0:
            raise ValueError("objective.kd_weight and objective.ce_weight are both 0: nothing to learn")
        for name, known in (("temperature_mode", TEMPERATURE_MODES), ("weight_shape", WEIGHT_SHAPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"objective.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 0 < self.beta < 1:
            raise ValueError("objective.beta must lie between 0 and 1")
        if self.hard_negatives < 1:
            raise ValueError("objective.hard_negatives must be at least 1")
        if self.least_entropy < 0:
            raise ValueError("objective.least_entropy must not be negative")
        if not 1 <= self.temperature <= self.temperature_cap:
            raise ValueError("objective.temperature must lie between 1 and objective.temperature_cap")
        if self.temperature_contrast < 0:
            raise ValueError("objective.temperature_contrast must not be negative")

    @property
    def tempers(self) -> bool:
        """Whether any position is ever compared at a temperature other than 1."""
        return self.temperature > 1 or self.temperature_mode in ("entropy", "adaptive")


def possible_ranks(most: int, global_batch: int) -> list[int]:
    """The rank counts up to `most` that give every rank the same share of the global batch."""
    return [ranks for ranks in range(1, min(most, global_batch) + 1) if global_batch % ranks == 0]


def _require_finite(section: str, settings: Any) -> None:
    """NaN passes every comparison that refuses a number, so it is refused first."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{section}.{item.name} must be a finite number, not {value}")


MOST_MINED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    epochs: int = 3
    global_batch: int = 48
    """Records a step over all ranks. 48 = 3 ranks x micro-batch 4 x accumulation 4; it never changes with the rank
    count, accumulation does."""
    micro_batch: int | Auto = AUTO
    """Records a rank holds at once, at most."""
    bucket_batches: int = 16
    """Global batches whose records are sorted by length together, so that little is padded; 1 sorts none together.
    Records of like length may be of a kind, and a small global batch of one kind teaches less."""
    mining_share: float = 0.0
    """Share of the records, the hardest by their KL, that come twice in every epoch but the first; as many of the
    easiest rest. 0 mines none."""
    mining_memory: float = 0.5
    """What a record's difficulty keeps of its earlier visits when it comes again."""
    learning_rate: float = 2e-3
    layer_decay: float = 0.9
    """Layer l of L learns with learning_rate * layer_decay ** (L - 1 - l)."""
    embedding_rate: float = 0.5
    """The embedding's share of the learning rate; a quarter of it under PCA initialisation is common."""
    weight_decay: float = 0.01
    beta2: float = 0.98
    warmup: float = 0.05
    """Share of all steps spent warming up; a cosine follows, down to `final_rate` of the peak."""
    final_rate: float = 0.05
    clip: float = 1.0
    zero_stage: int | Auto = AUTO
    """0 to 3, see docs/placement.md; "auto" takes the lowest that fits, and says so."""
    offload_optimizer: bool | Auto = AUTO
    offload_parameters: bool | Auto = AUTO
    precision: str = "auto"
    """"bf16", "fp16", "fp32", or "auto": bf16 where the device multiplies it natively, else fp32."""
    pca_init: bool = True
    """Start the embedding from the principal components of the teacher's head that the shards carry."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps between checkpoints; one is written at the end and at SIGTERM in any case."""
    keep_checkpoints: int = 2
    validate_every: int = 100
    answers: int = 2
    """Validation prompts that the student answers whenever it is validated, for the monitor and the report."""
    answer_tokens: int = 48
    """Tokens of such an answer, at most. Rank 0 writes them one by one while the others wait: the metric
    `answer_seconds` says for how long."""

    def __post_init__(self) -> None:
        _require_finite("distill", self)
        for name in _COUNTS:
            if getattr(self, name) != AUTO and getattr(self, name) < 1:
                raise ValueError(f"distill.{name} must be at least 1")
        if self.answers < 0:
            raise ValueError("distill.answers must not be negative")
        if self.zero_stage not in (AUTO, 0, 1, 2, 3):
            raise ValueError("distill.zero_stage must be auto, 0, 1, 2 or 3")
        if self.offload_parameters is True and self.zero_stage not in (AUTO, 3):
            raise ValueError("distill.offload_parameters needs zero_stage 3")
        if self.offload_optimizer is True and self.zero_stage == 0:
            raise ValueError("distill.offload_optimizer needs zero_stage 1, 2 or 3")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise ValueError("distill.precision must be auto, bf16, fp16 or fp32")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"distill.seed must be a whole number from 0, not {self.seed}")
        for name in ("learning_rate", "embedding_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"distill.{name} must be above 0")
        if self.weight_decay < 0:
            raise ValueError("distill.weight_decay must not be negative")
        if not 0 <= self.beta2 < 1:
            raise ValueError("distill.beta2 must lie between 0 and 1, without 1")
        if not 0 <= self.mining_share <= MOST_MINED:
            raise ValueError(f"distill.mining_share must lie between 0 and {MOST_MINED}")
        if self.mining_share and self.epochs < 2:
            raise ValueError("distill.mining_share needs distill.epochs of 2 or more: the first measures difficulty")
        if not 0 <= self.mining_memory < 1:
            raise ValueError("distill.mining_memory must lie between 0 and 1, without 1")
        if not 0 <= self.warmup < 1 or not 0 < self.layer_decay <= 1 or not 0 <= self.final_rate <= 1:
            raise ValueError("distill.warmup, layer_decay and final_rate must lie in [0, 1]")


_COUNTS = (
    "epochs",
    "global_batch",
    "micro_batch",
    "bucket_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "answer_tokens",
)
FREE_SETTINGS = frozenset(
    {
        "micro_batch",
        "zero_stage",
        "offload_optimizer",
        "offload_parameters",
        "precision",
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "answers",
        "answer_tokens",
    }
)
"""How a step is computed, saved or watched, not what it computes: these may differ between two starts of a run. A run
is bound to what its precision came to."""
