"""The student's shape as a recipe states it; vocabulary and special tokens come from the shards."""

from __future__ import annotations

from dataclasses import dataclass

RECURRENCES = ("matrix", "vector", "delta")
WIRINGS = ("ncp", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentShape:
    hidden_size: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 3
    heads: int = 4
    intermediate_size: int = 688
    conv_kernel: int = 4
    ode_unfolds: int = 6
    """Fused Euler steps a token; 0 stands for the exact flow of the ODE."""
    recurrence: str = "matrix"
    """What a liquid neuron holds: "matrix", "vector" (the plain LTC neuron) or "delta" (Gated DeltaNet's rule)."""
    wiring: str = "ncp"
    """"ncp", a Neural Circuit Policy, or "dense", every synapse present."""
    prime_state: bool = False
    """Start the decoder from the state that it would have after reading the encoder's output."""
    ncp_sparsity: float = 0.5
    ncp_seed: int = 22222
    embedding_rank: int | None = None
    """Width of a factorised embedding; absent, the embedding is [V, hidden_size]."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"student.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("ode_unfolds", "ncp_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"student.{name} must be a whole number from 0, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"student.hidden_size {self.hidden_size} must be a multiple of 2 x heads {self.heads}")
        if not 0.1 <= self.ncp_sparsity < 1:
            raise ValueError("student.ncp_sparsity must lie in [0.1, 1), the range of ncps.AutoNCP")
        for name, known in (("recurrence", RECURRENCES), ("wiring", WIRINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"student.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")


_COUNTS = (
    "hidden_size",
    "encoder_layers",
    "decoder_layers",
    "heads",
    "intermediate_size",
    "conv_kernel",
    "embedding_rank",
)
