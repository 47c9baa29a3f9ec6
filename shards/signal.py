"""A decoded `signal` cell: the part of a record that says how the teacher spread its probability."""

from __future__ import annotations

from dataclasses import dataclass

from shards.record import Float32, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """The teacher's distributions over N positions; fields as in `Record`."""

    ids_NK: Int32
    logprobs_NK: Float32 | None
    draws_NK: Int32 | None = None
    log_tail_N: Float32
    entropy_N: Float32
    curve_NJ: Float32 | None = None
