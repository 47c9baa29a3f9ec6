"""The student's configuration in transformers' form: flat, and complete enough to rebuild every tensor shape."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .shape import RECURRENCES, WIRINGS


class MiniCodformerConfig(PreTrainedConfig):
    """Shape and special tokens of a MiniCodformer.

    `num_hidden_layers` counts the decoder's layers, because transformers sizes caches from it. `ode_unfolds` is the
    number of fused Euler steps a token, 0 for the exact flow of the ODE. `embedding_rank` is the width of a
    factorised embedding, None for one of `hidden_size`. `layer_types` names the cache of each decoder layer and is
    derived. `recurrence` is what a neuron holds: "matrix", "vector" or "delta" (recurrences.py). `wiring` is "ncp" or
    "dense" (wiring.py). With `prime_state` the decoder starts from the state that it would have after reading the
    encoder's output.
    """

    model_type = "minicodformer"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151_936
    hidden_size: int = 256
    num_encoder_layers: int = 3
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 688
    conv_kernel: int = 4
    ode_unfolds: int = 6
    recurrence: str = "matrix"
    wiring: str = "ncp"
    prime_state: bool = False
    ncp_sparsity: float = 0.5
    ncp_seed: int = 22_222
    embedding_rank: int | None = None
    embedding_std: float = 1.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    layer_types: list[str] | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads "
                f"{self.num_attention_heads}: rotary positions turn pairs of a head's channels"
            )
        if self.ode_unfolds < 0:
            raise ValueError(f"ode_unfolds must be at least 0, not {self.ode_unfolds}")
        for name, known in (("recurrence", RECURRENCES), ("wiring", WIRINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 0.1 <= self.ncp_sparsity < 1:
            raise ValueError(f"ncp_sparsity must lie in [0.1, 1), the range of ncps.AutoNCP, not {self.ncp_sparsity}")
        self.layer_types = ["hybrid"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_size(self) -> int:
        """Columns of the tied embedding."""
        return self.embedding_rank or self.hidden_size
