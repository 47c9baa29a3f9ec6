"""The Contract: everything that must be known, and agreed on, to read a shard. Written once into every shard."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from shards.errors import ContractMismatch, Corrupt, UnknownVersion

FORMAT_VERSION = 2
_FLAT_VERSION = 1
"""The first format: always a top-k, stated as two flat fields; no curve, no tables, attention of response rows only."""

MAX_VOCABULARY = 1 << 24
MAX_KEPT = 4_096
MAX_ATTENTION_KEYS = 1_024
MAX_LAYERS = 1_024
MAX_DRAWS = 4_096
MAX_NODES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How the ids of a position were chosen.

    topk      the k most probable
    adaptive  the most probable until their mass reaches `mass` or the next is less probable than `floor`, at most k
    hybrid    the k most probable, exact, and `draws` draws from what is left (Sparse Logit Sampling, 2503.16870)
    sample    `draws` draws from the whole distribution
    """

    kind: str
    k: int = 0
    """Most ids kept as the most probable; 0 for "sample"."""
    draws: int = 0
    """Draws a position; 0 for "topk" and "adaptive"."""
    mass: float = 1.0
    floor: float = 0.0
    logprobs: bool = True
    """Whether log-probabilities are kept; only "sample" can do without."""
    tail_known: bool = True
    """Whether the mass outside the exact ids is known. An imported cache may not say it; its `log_tail_N` is NaN."""

    def __post_init__(self) -> None:
        if self.kind not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, not {self.kind!r}")
        exact, drawn = self.kind != "sample", self.kind in DRAWN
        _require_within("k", self.k, MAX_KEPT) if exact else _require_none("k", self.k, self.kind)
        _require_within("draws", self.draws, MAX_DRAWS) if drawn else _require_none("draws", self.draws, self.kind)
        for name in ("logprobs", "tail_known"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("mass", "floor"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} must be a number, not {getattr(self, name)!r}")
        if self.kind != "adaptive" and (self.mass, self.floor) != (1.0, 0.0):
            raise ValueError(f"mass and floor belong to an adaptive selection, not to {self.kind!r}")
        if not (0 < self.mass <= 1 and 0 <= self.floor < 1):
            raise ValueError(f"mass must lie in (0, 1] and floor in [0, 1), not {self.mass!r} and {self.floor!r}")
        if not self.logprobs and self.kind != "sample":
            raise ValueError(f"a selection {self.kind!r} keeps log-probabilities")
        if not self.tail_known and drawn:
            raise ValueError(f"draws of a selection {self.kind!r} need the mass that they were drawn from")

    @property
    def least_kept(self) -> int:
        """The fewest ids that a position can have."""
        return self.k if self.kind in ("topk", "hybrid") else 1

    @property
    def most_kept(self) -> int:
        """The most ids that a position can have."""
        return self.k + self.draws


SELECTIONS = ("topk", "adaptive", "hybrid", "sample")
DRAWN = ("hybrid", "sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Which teacher layers are summarised (0-based), how many prompt keys of each row are kept, and for which rows."""

    layers: tuple[int, ...]
    top_m: int
    rows: str = "response"
    """"response": one row a predicted position; "all": rows of the prompt before them."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS or not all(
            type(layer) is int and layer >= 0 for layer in self.layers
        ):
            raise ValueError(f"attention layers must be 1 to {MAX_LAYERS} whole numbers from 0, not {self.layers!r}")
        _require_within("attention top_m", self.top_m, MAX_ATTENTION_KEYS)
        if self.rows not in ("response", "all"):
            raise ValueError(f"attention rows must be 'response' or 'all', not {self.rows!r}")


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
    selection: Selection
    curve: tuple[float, ...] = ()
    """Exponents, falling, at which the tail's partition curve is kept; empty where it is not."""
    tables: str | None = None
    """sha256 of the codec's learnt tables, which stand in every shard; None for a codec without."""
    attention: AttentionSpec | None
    corpus_fingerprint: str
    engine: str
    """Engine and version that ran the teacher, e.g. "vllm 0.32.0"."""
    dtype: str
    """Precision of the teacher's body and of its head, e.g. "bfloat16+float32"."""

    def __post_init__(self) -> None:
        _require_within("vocab_size", self.vocab_size, MAX_VOCABULARY)
        if self.selection.k > self.vocab_size:
            raise ValueError(f"k must be at most the vocabulary of {self.vocab_size}, not {self.selection.k}")
        require_curve(self.curve)
        if self.curve and not self.selection.tail_known:
            raise ValueError("a curve belongs to a tail that is known")
        for field in dataclasses.fields(self):
            if field.type == "str" and not isinstance(getattr(self, field.name), str):
                raise ValueError(f"{field.name} must be text, not {getattr(self, field.name)!r}")
        for name in ("start_token_id", "end_token_id"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be an id below {self.vocab_size}, not {getattr(self, name)!r}")

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, so that equal contracts have equal bytes."""
        raw = dataclasses.asdict(self)
        if self.format_version == _FLAT_VERSION:
            _flatten(raw)
        return json.dumps(raw, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Parse what `to_json` wrote. Raises UnknownVersion for another format, Corrupt for anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            version = raw["format_version"]
            if version == _FLAT_VERSION:
                raw["selection"] = {"kind": raw["selection"], "k": raw.pop("k")}
            if version in (FORMAT_VERSION, _FLAT_VERSION):
                attention = raw.pop("attention")
                if attention is not None:
                    attention = AttentionSpec(layers=tuple(attention.pop("layers")), **attention)
                selection, curve = Selection(**raw.pop("selection")), tuple(raw.pop("curve", ()))
                return cls(attention=attention, selection=selection, curve=curve, **raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Corrupt(f"not a contract: {error}", hint="restore the file or write the shards again") from error
        raise UnknownVersion(
            f"format version {version!r}, this reader knows {_FLAT_VERSION} and {FORMAT_VERSION}",
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


def require_curve(curve: tuple[float, ...]) -> None:
    """Raise ValueError where these are no exponents of a partition curve."""
    inside = all(type(node) is float and 0 < node < 1 for node in curve)
    if len(curve) > MAX_NODES or not inside or list(curve) != sorted(set(curve), reverse=True):
        raise ValueError(f"curve must be at most {MAX_NODES} exponents falling within (0, 1), not {curve!r}")


def _require_within(name: str, value: object, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number from 1 to {largest}, not {value!r}")


def _require_none(name: str, value: object, kind: str) -> None:
    if type(value) is not int or value != 0:
        raise ValueError(f"a selection {kind!r} has no {name}, not {value!r}")


def _flatten(raw: dict[str, Any]) -> None:
    """Into the fields of the first format, whose bytes must not change: they are sealed."""
    selection = raw["selection"]
    raw["selection"], raw["k"] = selection["kind"], selection["k"]
    del raw["curve"], raw["tables"]
    if raw["attention"] is not None:
        del raw["attention"]["rows"]
