"""R7: what is read is what was written, within the bounds that the codec states; W7: what is no signal is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.attention_planes import SHARE_LEVELS
from shards.codec import CODECS, codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import InvalidRecord, UnknownVersion
from shards.record import AttentionSummary, Record
from shards.topk_planes import LEVELS, level_roots
from shards.validation import require_valid
from shards.writer import build_shard
from tests.shards.bucket_kl import bucket_kl


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    vocab_size = draw(st.sampled_from([1, 2, 17, 256, 257, 49_152, 65_537, 151_936, 1 << 24]))
    return Contract(
        codec="topk-planes/1",
        teacher="t",
        teacher_fingerprint="",
        tokenizer_fingerprint="",
        vocab_size=vocab_size,
        start_token_id=0,
        end_token_id=0,
        selection=Selection(kind="topk", k=draw(st.integers(1, min(vocab_size, 70)))),
        attention=AttentionSpec(layers=tuple(range(draw(st.integers(1, 3)))), top_m=draw(st.integers(1, 9))),
        corpus_fingerprint="",
        engine="",
        dtype="",
    )


@st.composite
def signals(draw: st.DrawFn, contract: Contract) -> dict[str, Any]:
    """Any k + 1 masses that sum to 1, however uneven; ties are common."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = draw(st.integers(1, 5))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0]))
    scores = rng.standard_normal((positions, contract.selection.k + 1)) * spread
    if draw(st.booleans()):
        scores = np.round(scores)
    if contract.selection.k == contract.vocab_size or draw(st.integers(0, 9)) == 0:
        scores[:, -1] = -np.inf
    logs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    ids = np.stack([_distinct(rng, contract.vocab_size, contract.selection.k) for _ in range(positions)])
    order = np.lexsort((ids, -logs[:, :-1]), axis=1)
    return {
        "ids_NK": np.take_along_axis(ids, order, 1).astype(np.int32),
        "logprobs_NK": np.take_along_axis(logs[:, :-1], order, 1).astype(np.float32),
        "log_tail_N": logs[:, -1].astype(np.float32),
        "entropy_N": rng.uniform(0, np.log(contract.vocab_size) + 1e-9, positions).astype(np.float32),
    }


def _distinct(rng: np.random.Generator, bound: int, count: int) -> np.ndarray:
    if bound <= 4096:
        return rng.permutation(bound)[:count]
    found = np.unique(np.concatenate([rng.integers(0, bound, 4 * count), [bound - 1]]))
    return rng.permutation(found)[:count]


@st.composite
def attentions(draw: st.DrawFn, spec: AttentionSpec, positions: int, prompt: int) -> AttentionSummary:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (len(spec.layers), positions)
    sharpness = draw(st.sampled_from([0.01, 0.3, 10.0]))
    rows = rng.dirichlet(np.full(prompt + 1, sharpness), shape)
    if draw(st.integers(0, 4)) == 0:
        rows[..., 1:prompt] = 0
    keys, kept = rows[..., 1:prompt], min(spec.top_m, prompt - 1)
    order = np.argsort(-keys, axis=-1, kind="stable")[..., :kept]
    padding = ((0, 0), (0, 0), (0, spec.top_m - kept))
    return AttentionSummary(
        positions_LNM=np.pad((order + 1).astype(np.int32), padding, constant_values=-1),
        weights_LNM=np.pad(np.take_along_axis(keys, order, -1).astype(np.float32), padding),
        sink_LN=rows[..., 0].astype(np.float32),
        prompt_LN=keys.sum(axis=-1).astype(np.float32),
        entropy_LN=rng.uniform(0, 10, shape).astype(np.float32),
    )


@st.composite
def contracted_records(draw: st.DrawFn) -> tuple[Contract, Record]:
    contract = draw(contracts())
    signal = draw(signals(contract))
    positions, first = signal["ids_NK"].shape[0], draw(st.integers(0, 2))
    prompt = draw(st.sampled_from([1, 2, 3, 8, 300]))
    rng = np.random.default_rng(0)
    assert contract.attention is not None
    return contract, Record(
        sample_id=draw(st.text(max_size=5)),
        prompt_ids_P=rng.integers(0, contract.vocab_size, prompt, np.int32),
        response_ids_R=rng.integers(0, contract.vocab_size, first + positions + draw(st.integers(0, 1)), np.int32),
        first_position=first,
        attention=draw(attentions(contract.attention, positions, prompt)),
        **signal,
    )


def nearest_level(probability: float) -> int:
    """The naive search over all levels."""
    roots = level_roots()
    return int(np.abs(roots - np.sqrt(probability)).argmin())


def oracle(record: Record, position: int) -> tuple[list[int], list[float], float]:
    """What a position decodes to, by the definition and entry by entry: ids, log-probs, log tail."""
    log_head = np.log(sum(np.exp(float(value)) for value in record.logprobs_NK[position]))
    log_tail = float(record.log_tail_N[position])
    if log_tail == -np.inf:
        head, decoded_tail = 1.0, -np.inf
    else:
        odds = np.clip(round(128 * (log_tail - log_head)), -32767, 32767) / 128
        head, decoded_tail = 1 / (1 + np.exp(odds)), -np.log1p(np.exp(-odds))
    levels = [nearest_level(np.exp(float(value))) for value in record.logprobs_NK[position]]
    entries = sorted(zip(levels, record.ids_NK[position].tolist(), strict=True))
    masses = [float(level_roots()[level]) ** 2 for level, _ in entries]
    logprobs = [float(np.log(mass / sum(masses)) + np.log(head)) for mass in masses]
    return [id_ for _, id_ in entries], logprobs, float(decoded_tail)


@settings(max_examples=150, deadline=None)
@given(contracted_records())
def test_R7_a_signal_comes_back_as_the_naive_oracle_says(given_: tuple[Contract, Record]) -> None:
    contract, record = given_
    require_valid(record, contract)
    codec = codec_for(contract, None)
    (cell,) = codec.encode_signals([record])
    decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=record.ids_NK.size)
    for position in range(record.positions):
        ids, logprobs, log_tail = oracle(record, position)
        assert decoded.ids_NK[position].tolist() == ids
        np.testing.assert_allclose(decoded.logprobs_NK[position], logprobs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(decoded.log_tail_N[position], log_tail, rtol=1e-6, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(contracted_records())
def test_R7_the_stated_bounds_hold(given_: tuple[Contract, Record]) -> None:
    contract, record = given_
    codec = codec_for(contract, None)
    (cell,) = codec.encode_signals([record])
    decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=record.ids_NK.size)
    assert (np.sort(decoded.ids_NK) == np.sort(record.ids_NK)).all()
    assert (np.diff(decoded.logprobs_NK) <= 0).all()
    assert np.isfinite(decoded.logprobs_NK).all()
    mass_N = np.exp(decoded.logprobs_NK.astype(float)).sum(1) + np.exp(decoded.log_tail_N.astype(float))
    np.testing.assert_allclose(mass_N, 1, atol=1e-5)
    assert np.abs(decoded.entropy_N - record.entropy_N).max() <= 1 / 2048 + 1e-6
    kl_N = bucket_kl(record, decoded)
    assert kl_N.max() <= 5e-5 * contract.selection.k + 2e-6 + 1e-6


def test_R7_the_worst_level_keeps_the_stated_bound() -> None:
    """KL over a head is at most the sum of (p - q)^2 / q over its entries, whatever the scale: check every border."""
    roots = level_roots()
    assert len(roots) == LEVELS
    assert (np.diff(roots) < 0).all()
    borders = (roots[1:] + roots[:-1]) / 2
    worst = max(
        float(((borders**2 - level**2) ** 2 / level**2).max())
        for levels in (roots[1:], roots[:-1])
        for level in [levels]
    )
    assert worst <= 5e-5


def test_R7_mean_kl_is_below_the_goal_on_zipfian_distributions(contract: Contract) -> None:
    rng = np.random.default_rng(0)
    contract = dataclasses.replace(contract, vocab_size=49_152, selection=Selection(kind="topk", k=64), attention=None)
    logits = -1.2 * np.log(np.arange(1, 49_153)) + rng.standard_normal((50, 49_152))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logprobs, axis=1)
    falling = np.take_along_axis(logprobs, order, 1)
    record = Record(
        sample_id="zipf",
        prompt_ids_P=np.zeros(1, np.int32),
        response_ids_R=np.zeros(50, np.int32),
        first_position=0,
        ids_NK=order[:, :64].astype(np.int32),
        logprobs_NK=falling[:, :64].astype(np.float32),
        log_tail_N=np.logaddexp.reduce(falling[:, 64:], axis=1).astype(np.float32),
        entropy_N=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
    )
    require_valid(record, contract)
    codec = codec_for(contract, None)
    (cell,) = codec.encode_signals([record])
    assert bucket_kl(record, codec.decode_signal(cell, labels_N=record.labels_N, entries=50 * 64)).mean() <= 2e-4


@settings(max_examples=150, deadline=None)
@given(contracted_records())
def test_R7_attention_comes_back_within_its_bounds(given_: tuple[Contract, Record]) -> None:
    contract, record = given_
    require_valid(record, contract)
    codec, truth, keys = codec_for(contract, None), record.attention, len(record.prompt_ids_P) - 1
    assert truth is not None
    decoded = codec.decode_attention(codec.encode_attention(record), positions=record.positions, prompt_length=keys + 1)
    assert (np.sort(decoded.positions_LNM) == np.sort(truth.positions_LNM)).all()
    assert (np.diff(decoded.weights_LNM) <= 0).all()
    assert np.abs(decoded.sink_LN - truth.sink_LN).max() <= 1 / 131070 + 1e-7
    assert np.abs(decoded.prompt_LN - truth.prompt_LN).max() <= 1 / 131070 + 1e-7
    assert np.abs(decoded.entropy_LN - truth.entropy_LN).max() <= 1 / 2048 + 1e-6
    assert (decoded.weights_LNM.sum(-1) <= decoded.prompt_LN * (1 + 1e-6)).all()
    for layer, position in np.ndindex(*truth.sink_LN.shape):
        expected = naive_weights(truth, layer, position, keys, float(decoded.prompt_LN[layer, position]))
        found = dict(
            zip(
                decoded.positions_LNM[layer, position].tolist(),
                decoded.weights_LNM[layer, position].tolist(),
                strict=True,
            )
        )
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def naive_weights(truth: AttentionSummary, layer: int, position: int, keys: int, prompt: float) -> dict[int, float]:
    """The decoded weight of each key, by the definition."""
    mass = float(truth.prompt_LN[layer, position])
    shares = {}
    for key, weight in zip(
        truth.positions_LNM[layer, position].tolist(), truth.weights_LNM[layer, position].tolist(), strict=True
    ):
        root = np.sqrt(min(1.0, weight / mass)) if mass > 0 else 0.0
        shares[key] = (round(SHARE_LEVELS * root) / SHARE_LEVELS) ** 2
    total = sum(shares.values())
    everything = keys <= truth.positions_LNM.shape[-1]
    divisor = (total or 1.0) if everything else max(1.0, total)
    return {key: share / divisor * prompt for key, share in shares.items()}


def test_a_codec_is_found_by_its_name_and_an_unknown_one_is_refused(contract: Contract) -> None:
    assert all(name == codec.name for name, codec in CODECS.items())
    with pytest.raises(UnknownVersion, match="topk-planes/0") as error:
        codec_for(dataclasses.replace(contract, codec="topk-planes/0"), None)
    assert error.value.hint


def edit(name: str, index: Any, value: float) -> Callable[[Record], Record]:
    def changed(record: Record) -> Record:
        array = getattr(record, name).copy()
        array[index] = value
        return dataclasses.replace(record, **{name: array})

    return changed


def edit_attention(name: str, index: Any, value: float) -> Callable[[Record], Record]:
    def changed(record: Record) -> Record:
        assert record.attention is not None
        array = getattr(record.attention, name).copy()
        array[index] = value
        return dataclasses.replace(record, attention=dataclasses.replace(record.attention, **{name: array}))

    return changed


def with_fields(**fields: Any) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(record, **fields)


NOT_A_SIGNAL: dict[str, tuple[Callable[[Record], Record], str]] = {
    "id at the vocabulary's size": (edit("ids_NK", (1, 2), 300), "ids_NK holds 300"),
    "negative id": (edit("ids_NK", (1, 2), -1), "keeps fewer than 4 ids"),
    "prompt id outside": (edit("prompt_ids_P", 0, 300), "prompt_ids_P holds 300"),
    "response id outside": (edit("response_ids_R", 0, -5), "response_ids_R holds -5"),
    "duplicate id": (
        lambda record: edit("ids_NK", (0, 0), record.ids_NK[0, 3])(record),
        "repeats an id",
    ),
    "NaN log-prob": (edit("logprobs_NK", (0, 1), np.nan), "not finite"),
    "infinite log-prob": (edit("logprobs_NK", (0, 3), -np.inf), "not finite"),
    "rising log-probs": (
        lambda record: with_fields(logprobs_NK=np.ascontiguousarray(record.logprobs_NK[:, ::-1]))(record),
        "does not fall",
    ),
    "NaN tail": (edit("log_tail_N", 0, np.nan), "log_tail_N"),
    "tail above 1": (edit("log_tail_N", 0, 0.5), "log_tail_N"),
    "mass above 1": (edit("log_tail_N", 0, 0.0), "sum to 1."),
    "mass below 1": (edit("log_tail_N", 0, -np.inf), "sum to 0."),
    "NaN entropy": (edit("entropy_N", 0, np.nan), "entropy_N"),
    "negative entropy": (edit("entropy_N", 0, -1), "entropy_N"),
    "endless entropy": (edit("entropy_N", 0, np.inf), "entropy_N"),
    "another k": (lambda record: with_fields(ids_NK=record.ids_NK[:, :3])(record), "3 ids a position are not 4 to 4"),
    "another type": (
        lambda record: with_fields(logprobs_NK=record.logprobs_NK.astype(np.float64))(record),
        "float64",
    ),
    "positions beyond the response": (with_fields(first_position=1), "positions 1 to 5"),
    "positions before the response": (with_fields(first_position=-1), "positions -1 to 3"),
    "id that is no text": (with_fields(sample_id="\ud800"), "surrogates"),
    "no attention": (with_fields(attention=None), "against the contract"),
    "attention key 0": (edit_attention("positions_LNM", (0, 0, 0), 0), "outside 1 to 5"),
    "attention key beyond the prompt": (edit_attention("positions_LNM", (0, 0, 0), 6), "outside 1 to 5"),
    "padding where there are keys": (edit_attention("positions_LNM", (0, 0, 2), -1), "outside 1 to 5"),
    "attention weight NaN": (edit_attention("weights_LNM", (0, 0, 0), np.nan), "weights_LNM"),
    "attention weight negative": (edit_attention("weights_LNM", (0, 0, 2), -0.5), "weights_LNM"),
    "attention weights rise": (edit_attention("weights_LNM", (0, 0, 2), 1), "do not fall"),
    "attention mass above 1": (edit_attention("sink_LN", (0, 0), 1.5), "more than 1"),
    "prompt mass below its keys": (edit_attention("prompt_LN", (0, 0), 0), "exceed the prompt"),
    "attention entropy infinite": (edit_attention("entropy_LN", (1, 0), np.inf), "entropy_LN"),
}


@pytest.mark.parametrize("fault", NOT_A_SIGNAL)
def test_W7_what_is_no_signal_is_refused_at_encode(contract: Contract, records: list[Record], fault: str) -> None:
    change, message = NOT_A_SIGNAL[fault]
    with pytest.raises(InvalidRecord) as error:
        build_shard("u", "train", contract, [records[1], change(records[0])])
    assert message in str(error.value)
    assert "sample " in str(error.value)
    assert error.value.hint


def test_W7_a_repeated_attention_key_is_refused(contract: Contract, records: list[Record]) -> None:
    first = records[0].attention
    assert first is not None
    with pytest.raises(InvalidRecord, match="repeated"):
        build_shard(
            "u",
            "train",
            contract,
            [edit_attention("positions_LNM", (0, 0, 1), first.positions_LNM[0, 0, 0])(records[0])],
        )
