"""The Contract: everything that must be known, and agreed on, to read a shard. Written once into every shard."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from shards.errors import ContractMismatch, UnknownVersion

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Which teacher layers are summarised (0-based) and how many prompt keys of each row are kept."""

    layers: tuple[int, ...]
    top_m: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a shard set promises. Two sets with equal contracts can be read, resumed and trained on as one."""

    format_version: int = FORMAT_VERSION
    codec: str
    """Name and version of the record codec, e.g. "topk-planes/1"."""
    teacher: str
    """The teacher as the user named it: hub name or folder name."""
    teacher_fingerprint: str
    """sha256 over the names, sizes and contents of the teacher's weight files."""
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

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so that equal contracts have equal bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Parse what `to_json` wrote. Raises UnknownVersion for a format this code does not read."""
        raw: dict[str, Any] = json.loads(text)
        if raw.get("format_version") != FORMAT_VERSION:
            raise UnknownVersion(
                f"format version {raw.get('format_version')!r}, this reader knows {FORMAT_VERSION}",
                hint="upgrade minicodformer, or write the shards again",
            )
        attention = raw.pop("attention")
        if attention is not None:
            attention = AttentionSpec(layers=tuple(attention["layers"]), top_m=attention["top_m"])
        return cls(attention=attention, **raw)

    def require_equal(self, other: Contract, *, where: str) -> None:
        """Raise ContractMismatch naming the first field that differs and both values."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                raise ContractMismatch(
                    f"{where}: {field.name} is {theirs!r} there, {ours!r} here",
                    hint="use another run directory, or the settings that the shards were written with",
                )
