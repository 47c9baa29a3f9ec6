"""A decoded `signal` cell: the part of a record that says how the teacher spread its probability."""

from __future__ import annotations

from dataclasses import dataclass

from shards.record import Float32, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """The teacher's distributions over N positions; fields as in `Record`."""

    topk_ids_NK: Int32
    topk_logprobs_NK: Float32
    log_tail_N: Float32
    entropy_N: Float32
