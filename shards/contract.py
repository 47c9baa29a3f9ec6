"""The Contract: everything that must be known, and agreed on, to read a shard. Written once into every shard."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from shards.errors import ContractMismatch, Corrupt, UnknownVersion

FORMAT_VERSION = 1

MAX_VOCABULARY = 1 << 24
MAX_KEPT = 4_096
MAX_ATTENTION_KEYS = 1_024
MAX_LAYERS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Which teacher layers are summarised (0-based) and how many prompt keys of each row are kept."""

    layers: tuple[int, ...]
    top_m: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS or not all(
            type(layer) is int and layer >= 0 for layer in self.layers
        ):
            raise ValueError(f"attention layers must be 1 to {MAX_LAYERS} whole numbers from 0, not {self.layers!r}")
        _require_within("attention top_m", self.top_m, MAX_ATTENTION_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a shard set promises. Two sets with equal contracts can be read, resumed and trained on as one."""

    format_version: int = FORMAT_VERSION
    codec: str
    """Name and version of the record codec, e.g. "topk-planes/1"."""
    teacher: str
    """The teacher as the user named it: hub name or folder name."""
    teacher_fingerprint: str
    """sha256 over the names, sizes and contents of the teacher's weight files and its config.json."""
    tokenizer_fingerprint: str
    """sha256 over the tokenizer's files, chat template included."""
    vocab_size: int
    """Width of the teacher's logits: every id is below it."""
    start_token_id: int
    """First decoder input of the student; never the end token."""
    end_token_id: int
    """The token that ends a response."""
    selection: str
    """How ids were kept: "topk"."""
    k: int
    attention: AttentionSpec | None
    corpus_fingerprint: str
    engine: str
    """Engine and version that ran the teacher, e.g. "vllm 0.32.0"."""
    dtype: str
    """Precision of the teacher's body and of its head, e.g. "bfloat16+float32"."""

    def __post_init__(self) -> None:
        _require_within("vocab_size", self.vocab_size, MAX_VOCABULARY)
        _require_within("k", self.k, min(MAX_KEPT, self.vocab_size))
        for field in dataclasses.fields(self):
            if field.type == "str" and not isinstance(getattr(self, field.name), str):
                raise ValueError(f"{field.name} must be text, not {getattr(self, field.name)!r}")
        for name in ("start_token_id", "end_token_id"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be an id below {self.vocab_size}, not {getattr(self, name)!r}")

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so that equal contracts have equal bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Parse what `to_json` wrote. Raises UnknownVersion for another format, Corrupt for anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            version = raw["format_version"]
            if version == FORMAT_VERSION:
                attention = raw.pop("attention")
                if attention is not None:
                    attention = AttentionSpec(layers=tuple(attention.pop("layers")), **attention)
                return cls(attention=attention, **raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Corrupt(f"not a contract: {error}", hint="restore the file or write the shards again") from error
        raise UnknownVersion(
            f"format version {version!r}, this reader knows {FORMAT_VERSION}",
            hint="upgrade minicodformer, or write the shards again",
        )

    def require_equal(self, other: Contract, *, where: str) -> None:
        """Raise ContractMismatch naming the first field that differs and both values."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                raise ContractMismatch(
                    f"{where}: {field.name} is {theirs!r} there, {ours!r} here",
                    hint="use another run directory, or the settings that the shards were written with",
                )


def _require_within(name: str, value: object, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number from 1 to {largest}, not {value!r}")
