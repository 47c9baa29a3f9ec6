"""What a record must satisfy to be written under a contract. A teacher's fault is refused here, not learnt from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import InvalidRecord
from shards.record import AttentionSummary, Record, keys_in_sight
from shards.schema import MAX_ENTRIES, MAX_PROMPT

MASS_TOLERANCE = 1e-3
"""How far probabilities computed in single precision may miss their sum."""

DRAW_TOLERANCE = 1 / 16
"""How far log-probabilities of draws may be off together: what the codec does to each, twice."""

CURVE_TOLERANCE = 0.02
"""How far the steps of a curve may have the wrong sign: what rounding and the codec do to them."""


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
    selection = contract.selection
    _check_ids(record, contract)
    shape = record.ids_NK.shape
    _require((record.logprobs_NK is not None) == selection.logprobs, "log-probabilities are there or missing")
    _require((record.draws_NK is not None) == bool(selection.draws), "draws are there or missing")
    if record.logprobs_NK is not None:
        _require_array("logprobs_NK", record.logprobs_NK, shape, np.float32)
        _check_logprobs(record, selection.k)
    if record.draws_NK is not None:
        _require_array("draws_NK", record.draws_NK, shape, np.int32)
        _check_draws(record, record.draws_NK, selection)
    _require_array("log_tail_N", record.log_tail_N, shape[:1], np.float32)
    _require_array("entropy_N", record.entropy_N, shape[:1], np.float32)
    _check_masses(record, selection)
    _check_curve(record, contract)


def _check_ids(record: Record, contract: Contract) -> None:
    """How many there are, and that none is repeated; where a row has fewer, the rest is -1."""
    ids_NK, selection = record.ids_NK, contract.selection
    _require(ids_NK.dtype == np.int32 and ids_NK.ndim == 2, "ids_NK must be rows of int32 ids")
    width = ids_NK.shape[1]
    least = selection.least_kept
    _require(least <= width <= selection.most_kept, f"{width} ids a position are not {least} to {selection.most_kept}")
    _require(ids_NK.size <= MAX_ENTRIES, f"{ids_NK.size} kept ids, at most {MAX_ENTRIES} fit a record")
    there_NK = ids_NK != -1
    _require(bool(there_NK[:, :least].all()), f"a position keeps fewer than {least} ids")
    _require(bool((there_NK[:, 1:] <= there_NK[:, :-1]).all()), "an id follows one that is absent")
    _require_ids("ids_NK", ids_NK[there_NK], contract.vocab_size)
    sorted_NK = np.sort(ids_NK, axis=1)
    distinct_NK = (sorted_NK[:, 1:] > sorted_NK[:, :-1]) | (sorted_NK[:, :-1] == -1)
    _require(bool(distinct_NK.all()), "ids_NK repeats an id within a position")


def _check_logprobs(record: Record, k: int) -> None:
    there_NK, logprobs_NK = record.ids_NK != -1, record.logprobs_NK
    assert logprobs_NK is not None
    _require(bool(np.isfinite(logprobs_NK[there_NK]).all()), "logprobs_NK has a value that is not finite")
    _require(bool(np.isneginf(logprobs_NK[~there_NK]).all()), "logprobs_NK is not -inf where the id is absent")
    for part_NK in (logprobs_NK[:, :k], logprobs_NK[:, k:]):
        _require(bool((part_NK[:, 1:] <= part_NK[:, :-1]).all()), "logprobs_NK does not fall along a position")


def _check_draws(record: Record, draws_NK: NDArray[np.int32], selection: Selection) -> None:
    drawn_NK = record.ids_NK != -1
    drawn_NK[:, : selection.k] = False
    _require(bool((draws_NK[drawn_NK] >= 1).all()), "an id was drawn less than once")
    _require(bool((draws_NK[~drawn_NK] == 0).all()), "draws_NK counts an id that was not drawn")
    expected_N = np.where(np.isneginf(record.log_tail_N), 0, selection.draws)
    _require(bool((draws_NK.sum(axis=1) == expected_N).all()), f"draws_NK does not sum to {selection.draws}")
    if record.logprobs_NK is None:
        _require(bool((draws_NK[:, 1:] <= draws_NK[:, :-1]).all()), "draws_NK does not fall along a position")


def _check_masses(record: Record, selection: Selection) -> None:
    log_tail_N, entropy_N = record.log_tail_N, record.entropy_N
    if selection.tail_known:
        # NaN fails every comparison; -inf is a tail without mass.
        _require(bool((log_tail_N <= MASS_TOLERANCE).all()), "log_tail_N is above 0 or not a number")
        _require(bool(((entropy_N >= -MASS_TOLERANCE) & (entropy_N < 64)).all()), "entropy_N is no entropy")
    else:
        unknown = bool(np.isnan(log_tail_N).all() and np.isnan(entropy_N).all())
        _require(unknown, "log_tail_N and entropy_N are not NaN, and the tail is not known")
    tail_N = np.exp(log_tail_N.astype(np.float64))
    mass_NK = np.zeros(record.ids_NK.shape)
    if record.logprobs_NK is not None:
        mass_NK = np.exp(record.logprobs_NK.astype(np.float64))
    head_N, drawn_N = mass_NK[:, : selection.k].sum(axis=1), mass_NK[:, selection.k :].sum(axis=1)
    total_N = head_N if not selection.tail_known else head_N + tail_N
    worst = int(np.abs(total_N - 1).argmax() if selection.tail_known else total_N.argmax())
    _require(
        total_N[worst] <= 1 + MASS_TOLERANCE and (not selection.tail_known or total_N[worst] >= 1 - MASS_TOLERANCE),
        f"position {worst}: kept and tail probability sum to {total_N[worst]:.6f}, not 1",
    )
    if selection.draws:
        most_N = tail_N * np.exp(DRAW_TOLERANCE) + MASS_TOLERANCE
        _require(bool((drawn_N <= most_N).all()), "drawn ids weigh more than what they are drawn from")


def _check_curve(record: Record, contract: Contract) -> None:
    curve_NJ, nodes = record.curve_NJ, len(contract.curve)
    _require((curve_NJ is not None) == bool(nodes), "the curve is there or missing against the contract")
    if curve_NJ is None:
        return
    _require_array("curve_NJ", curve_NJ, (record.positions, 2 * nodes), np.float32)
    empty_N = np.isneginf(record.log_tail_N)
    values_NJ, slopes_NJ = curve_NJ[:, :nodes], curve_NJ[:, nodes:]
    nothing = bool(np.isneginf(values_NJ[empty_N]).all() and (slopes_NJ[empty_N] == 0).all())
    _require(nothing, "the curve of a tail without mass is not -inf with slope 0")
    values_NJ, slopes_NJ = values_NJ[~empty_N], slopes_NJ[~empty_N]
    rising_NJ = np.diff(values_NJ, axis=1, prepend=record.log_tail_N[~empty_N, None])
    falling_NJ = np.diff(slopes_NJ, axis=1, prepend=np.float32(0))
    curved = (rising_NJ >= -CURVE_TOLERANCE) & (falling_NJ <= CURVE_TOLERANCE) & np.isfinite(slopes_NJ)
    highest = np.log(contract.vocab_size) + CURVE_TOLERANCE
    _require(bool((curved & (values_NJ <= highest)).all()), "curve_NJ is no log-partition of a tail")


def _check_attention(record: Record, contract: Contract) -> None:
    spec, summary = contract.attention, record.attention
    if spec is None or summary is None:
        _require((spec is None) == (summary is None), "attention is there or missing against the contract")
        return
    sight_N = keys_in_sight(spec, positions=record.positions, prompt_length=len(record.prompt_ids_P))
    _check_attention_shapes(summary, spec, len(sight_N))
    entries = summary.positions_LNM.size
    _require(entries <= MAX_ENTRIES, f"{entries} attention keys, at most {MAX_ENTRIES} fit a record")
    ordered = len(spec.layers) * len(record.prompt_ids_P)
    _require(ordered <= MAX_ENTRIES, f"{ordered} prompt tokens over all layers, at most {MAX_ENTRIES} fit a record")
    positions_LNM, weights_LNM, keys = summary.positions_LNM, summary.weights_LNM, len(record.prompt_ids_P) - 1
    real_LNM = np.broadcast_to(np.arange(spec.top_m) < sight_N[:, None], positions_LNM.shape)
    _require(
        bool((positions_LNM[~real_LNM] == -1).all() and (weights_LNM[~real_LNM] == 0).all()),
        f"attention keeps more keys than the {keys} of the prompt, or pads with something else than -1 and 0",
    )
    seen_LNM = (positions_LNM >= 1) & (positions_LNM <= sight_N[:, None])
    _require(bool(seen_LNM[real_LNM].all()), f"an attention key lies outside 1 to {keys}, or after its row")
    sorted_LNM = np.sort(positions_LNM, axis=-1)
    distinct_LNM = (sorted_LNM[..., 1:] > sorted_LNM[..., :-1]) | (sorted_LNM[..., :-1] == -1)
    _require(bool(distinct_LNM.all()), "an attention key is repeated")
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
