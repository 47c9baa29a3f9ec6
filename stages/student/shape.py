"""The student's shape as a recipe states it; vocabulary and special tokens come from the shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentShape:
    hidden_size: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 3
    heads: int = 4
    intermediate_size: int = 688
    conv_kernel: int = 4
    ode_unfolds: int | None = 6
    """Fused Euler steps a token; 0 stands for the exact flow of the ODE."""
    ncp_sparsity: float = 0.5
    ncp_seed: int = 22222
    embedding_rank: int | None = None
    """Width of a factorised embedding; absent, the embedding is [V, hidden_size]."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"student.hidden_size {self.hidden_size} must be a multiple of 2 x heads {self.heads}")
        if not 0 < self.ncp_sparsity < 1:
            raise ValueError("student.ncp_sparsity must lie between 0 and 1")
