"""Padding, masks and the alignment of decoder rows, teacher rows and labels."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from selections import SELECTIONS, record_of

from shards.record import Record
from stages.distill.batches import Prefetcher, assemble

START = 0
MakeRecord = Callable[..., Record]


def tail_of(record: Record, first: int) -> Record:
    """The same record, predicting only from response token `first` on."""
    assert record.attention is not None
    attention = dataclasses.replace(
        record.attention,
        **{
            field.name: getattr(record.attention, field.name)[:, first:]
            for field in dataclasses.fields(record.attention)
        },
    )
    cut = {name: getattr(record, name)[first:] for name in ("ids_NK", "logprobs_NK", "log_tail_N", "entropy_N")}
    return dataclasses.replace(record, first_position=first, attention=attention, **cut)


@pytest.fixture
def records(record: MakeRecord) -> list[Record]:
    made = [record(index, 0) for index in range(60)]
    long = next(one for one in made if one.response_ids_R.size > 4)
    shortest = next(one for one in made if one.response_ids_R.size == 1)
    return [*made[:10], shortest, tail_of(long, 2)]


def test_each_row_reads_the_token_before_its_label_and_carries_its_own_teacher_row(records: list[Record]) -> None:
    batch = assemble(records, START)
    width = batch.decoder_ids_BT.shape[1]
    row = 0
    for b, one in enumerate(records):
        for n in range(one.positions):
            i = one.first_position + n
            assert batch.rows_N[row] == b * width + i
            before = START if i == 0 else one.response_ids_R[i - 1]
            assert batch.decoder_ids_BT[b, i] == before
            assert batch.teacher.labels_N[row] == one.response_ids_R[i]
            np.testing.assert_array_equal(batch.teacher.ids_NK[row], one.ids_NK[n])
            np.testing.assert_array_equal(batch.teacher.log_kept_NK[row], one.logprobs_NK[n])
            assert batch.teacher.log_rest_N[row] == one.log_tail_N[n]
            assert batch.attention is not None
            assert one.attention is not None
            np.testing.assert_array_equal(batch.attention.weights_LNM[:, row], one.attention.weights_LNM[:, n])
            np.testing.assert_array_equal(batch.attention.prompt_LN[:, row], one.attention.prompt_LN[:, n])
            row += 1
    assert row == batch.positions


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_becomes_rows_that_say_what_is_exact_drawn_and_absent(name: str) -> None:
    selection = SELECTIONS[name]
    made = [record_of(index, selection) for index in range(12)]
    teacher = assemble(made, START).teacher
    row = 0
    for one in made:
        for n in range(one.positions):
            ids = [int(token) for token in one.ids_NK[n] if token >= 0]
            width = len(ids)
            assert teacher.ids_NK[row, :width].tolist() == ids
            assert teacher.present_NK[row].tolist() == [k < width for k in range(teacher.ids_NK.shape[1])]
            assert (teacher.ids_NK[row, width:] == ids[0]).all(), "absent ids must be ids"
            draws = np.zeros(width) if one.draws_NK is None else one.draws_NK[n, :width].astype(float)
            assert teacher.exact_NK[row, :width].tolist() == [count == 0 for count in draws]
            assert not teacher.exact_NK[row, width:].any()
            share = teacher.log_share_NK[row].exp()
            assert (share[width:] == 0).all()
            tail = float(np.exp(one.log_tail_N[n]))
            assert share[:width][draws > 0].tolist() == pytest.approx(tail * draws[draws > 0] / max(draws.sum(), 1))
            if selection.draws:
                assert share.sum().item() == pytest.approx(1, abs=1e-5), "exact and drawn shares are a target"
            if one.logprobs_NK is None:
                assert teacher.log_kept_NK[row, :width].isnan().all()
            else:
                kept = teacher.log_kept_NK[row].exp()
                assert (kept[width:] == 0).all()
                assert (kept.sum() + teacher.log_rest_N[row].exp()).item() == pytest.approx(1, abs=1e-5)
                assert share[:width][draws == 0].tolist() == pytest.approx(kept[:width][draws == 0].tolist())
            assert teacher.log_tail_N[row] == one.log_tail_N[n]
            assert teacher.entropy_N[row] == one.entropy_N[n]
            row += 1
    assert (teacher.curve_NJ is None) == (name == "counts")
    if teacher.curve_NJ is not None:
        np.testing.assert_array_equal(teacher.curve_NJ, np.concatenate([one.curve_NJ for one in made]))


def test_a_prompts_rows_are_told_from_those_of_the_response() -> None:
    made = [record_of(index, SELECTIONS["topk"]) for index in range(20)]
    batch = assemble(made, START)
    prompt, width = batch.encoder_attention, batch.prompt_ids_BP.shape[1]
    assert batch.attention is not None
    assert prompt is not None
    places = [(b, t) for b, one in enumerate(made) for t in range(1, one.prompt_ids_P.size - 1)]
    assert prompt.rows_N.tolist() == [b * width + t for b, t in places]
    assert prompt.queries_N.tolist() == [t for _, t in places]
    summaries = [one.attention for one in made if one.attention is not None]
    responses = [summary.prompt_LN[:, -one.positions :] for one, summary in zip(made, summaries, strict=True)]
    np.testing.assert_array_equal(batch.attention.prompt_LN, np.concatenate(responses, 1))
    prompts = [summary.prompt_LN[:, : -one.positions] for one, summary in zip(made, summaries, strict=True)]
    np.testing.assert_array_equal(prompt.teacher.prompt_LN, np.concatenate(prompts, 1))
    taught = sum(one.positions for one in made if one.prompt_ids_P.size > 2)
    assert prompt.weights_N.sum().item() == pytest.approx(taught)


def test_masks_come_from_lengths_even_where_tokens_look_like_padding(records: list[Record]) -> None:
    zeros = [dataclasses.replace(one, prompt_ids_P=np.zeros_like(one.prompt_ids_P)) for one in records]
    batch = assemble(zeros, START)
    assert batch.prompt_mask_BP.sum(1).tolist() == [one.prompt_ids_P.size for one in records]
    assert batch.decoder_mask_BT.sum(1).tolist() == [one.response_ids_R.size for one in records]
    falling = [mask[:, 1:].int() - mask[:, :-1].int() for mask in (batch.prompt_mask_BP, batch.decoder_mask_BT)]
    assert all((step <= 0).all() for step in falling), "padding is on the right"
    assert batch.decoder_mask_BT.flatten()[batch.rows_N].all(), "no loss at padding"


def test_one_record_without_attention_leaves_the_batch_without(records: list[Record]) -> None:
    assert assemble([*records, dataclasses.replace(records[0], attention=None)], START).attention is None


def test_to_moves_every_tensor(records: list[Record]) -> None:
    moved = assemble(records, START).to(torch.device("meta"))
    assert moved.rows_N.is_meta
    assert moved.teacher.ids_NK.is_meta
    assert moved.attention is not None
    assert moved.attention.prompt_LN.is_meta


def test_prefetching_keeps_the_order_runs_ahead_within_bounds_and_counts_the_wait() -> None:
    started: list[int] = []
    release = threading.Event()

    def make(plan: int) -> int:
        started.append(plan)
        release.wait(5)
        return plan * plan

    batches = Prefetcher(make, range(20), threads=3, ahead=4)
    threading.Timer(0.2, release.set).start()
    assert next(batches) == 0
    assert max(started) <= 4
    assert batches.waited > 0.1
    assert list(batches) == [n * n for n in range(1, 20)]


def test_a_reader_that_fails_is_heard_at_its_own_place() -> None:
    def make(plan: int) -> int:
        if plan == 2:
            raise OSError("disk on fire")
        return plan

    batches = Prefetcher(make, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="disk on fire"):
        next(batches)
    batches.close()
