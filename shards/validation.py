"""What a record must satisfy to be written under a contract. A teacher's fault is refused here, not learnt from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.contract import AttentionSpec, Contract
from shards.errors import InvalidRecord
from shards.record import AttentionSummary, Record
from shards.schema import MAX_ENTRIES, MAX_PROMPT

MASS_TOLERANCE = 1e-3
"""How far probabilities computed in single precision may miss their sum."""


def require_valid(record: Record, contract: Contract) -> None:
    """Raise InvalidRecord naming the sample and the fault."""
    try:
        _check_tokens(record, contract)
        _check_distribution(record, contract)
        _check_attention(record, contract)
    except ValueError as error:
        raise InvalidRecord(
            f"sample {record.sample_id!r}: {error}", hint="the teacher's output is faulty: nothing of it was written"
        ) from error


def _check_tokens(record: Record, contract: Contract) -> None:
    record.sample_id.encode()  # UnicodeEncodeError is a ValueError
    _require(len(record.prompt_ids_P) <= MAX_PROMPT, f"a prompt of {len(record.prompt_ids_P)} tokens")
    for name in ("prompt_ids_P", "response_ids_R"):
        ids = getattr(record, name)
        _require(ids.dtype == np.int32 and ids.ndim == 1 and len(ids) > 0, f"{name} must be a row of int32 ids")
        _require_ids(name, ids, contract.vocab_size)
    responses, first, positions = len(record.response_ids_R), record.first_position, record.positions
    _require(positions >= 1, "it predicts no position")
    _require(
        0 <= first <= responses - positions,
        f"positions {first} to {first + positions - 1} of a response of {responses} tokens",
    )


def _check_distribution(record: Record, contract: Contract) -> None:
    ids_NK, logprobs_NK = record.ids_NK, record.logprobs_NK
    shape = (record.positions, contract.selection.k)
    _require(logprobs_NK is not None, "it has no log-probabilities")
    assert logprobs_NK is not None
    _require_array("ids_NK", ids_NK, shape, np.int32)
    _require_array("logprobs_NK", logprobs_NK, shape, np.float32)
    _require_array("log_tail_N", record.log_tail_N, shape[:1], np.float32)
    _require_array("entropy_N", record.entropy_N, shape[:1], np.float32)
    _require(ids_NK.size <= MAX_ENTRIES, f"{ids_NK.size} kept ids, at most {MAX_ENTRIES} fit a record")
    _require_ids("ids_NK", ids_NK, contract.vocab_size)
    sorted_NK = np.sort(ids_NK, axis=1)
    _require(bool((sorted_NK[:, 1:] > sorted_NK[:, :-1]).all()), "ids_NK repeats an id within a position")
    _require(bool(np.isfinite(logprobs_NK).all()), "logprobs_NK has a value that is not finite")
    _require(bool((logprobs_NK[:, 1:] <= logprobs_NK[:, :-1]).all()), "logprobs_NK does not fall along a position")
    # NaN fails both comparisons; -inf is a tail without mass.
    _require(bool((record.log_tail_N <= MASS_TOLERANCE).all()), "log_tail_N is above 0 or not a number")
    _require(bool(((record.entropy_N >= -MASS_TOLERANCE) & (record.entropy_N < 64)).all()), "entropy_N is no entropy")
    mass_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1) + np.exp(record.log_tail_N.astype(np.float64))
    worst = int(np.abs(mass_N - 1).argmax())
    _require(
        abs(mass_N[worst] - 1) <= MASS_TOLERANCE,
        f"position {worst}: kept and tail probability sum to {mass_N[worst]:.6f}, not 1",
    )


def _check_attention(record: Record, contract: Contract) -> None:
    spec, summary = contract.attention, record.attention
    if spec is None or summary is None:
        _require((spec is None) == (summary is None), "attention is there or missing against the contract")
        return
    _check_attention_shapes(summary, spec, record.positions)
    entries = summary.positions_LNM.size
    _require(entries <= MAX_ENTRIES, f"{entries} attention keys, at most {MAX_ENTRIES} fit a record")
    keys = len(record.prompt_ids_P) - 1
    kept = min(spec.top_m, keys)
    positions_LNM, weights_LNM = summary.positions_LNM, summary.weights_LNM
    real_LNM = positions_LNM[..., :kept]
    _require(
        bool((positions_LNM[..., kept:] == -1).all() and (weights_LNM[..., kept:] == 0).all()),
        f"attention keeps more keys than the {keys} of the prompt, or pads with something else than -1 and 0",
    )
    _require(bool(((real_LNM >= 1) & (real_LNM <= keys)).all()), f"an attention key lies outside 1 to {keys}")
    sorted_LNM = np.sort(real_LNM, axis=-1)
    _require(bool((sorted_LNM[..., 1:] > sorted_LNM[..., :-1]).all()), "an attention key is repeated")
    _require(bool((weights_LNM[..., 1:] <= weights_LNM[..., :-1]).all()), "attention weights do not fall")
    _require(
        bool((weights_LNM.sum(axis=-1) <= summary.prompt_LN + MASS_TOLERANCE).all()),
        "kept attention weights exceed the prompt's mass",
    )
    _require(
        bool((summary.sink_LN + summary.prompt_LN <= 1 + MASS_TOLERANCE).all()), "attention masses sum to more than 1"
    )


def _check_attention_shapes(summary: AttentionSummary, spec: AttentionSpec, positions: int) -> None:
    shape = (len(spec.layers), positions, spec.top_m)
    _require_array("positions_LNM", summary.positions_LNM, shape, np.int32)
    for name in ("weights_LNM", "sink_LN", "prompt_LN", "entropy_LN"):
        values = getattr(summary, name)
        _require_array(name, values, shape if values.ndim == 3 else shape[:2], np.float32)
        _require(bool((np.isfinite(values) & (values >= -MASS_TOLERANCE)).all()), f"{name} is negative or not finite")
    _require(bool((summary.entropy_LN < 64).all()), "entropy_LN is no entropy")


def _require_ids(name: str, ids: NDArray[np.int32], vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    _require(low >= 0 and high < vocab_size, f"{name} holds {low if low < 0 else high}, outside 0 to {vocab_size - 1}")


def _require_array(name: str, array: NDArray[np.generic], shape: tuple[int, ...], dtype: type) -> None:
    _require(
        array.shape == shape and array.dtype == dtype,
        f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}",
    )


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
