"""The comparison of one record, against a naive reading of the same record and against the evaluation of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shards.reader import ShardSet
from stages.distill.compare import ComparedToken, compare_record
from stages.distill.evaluate import evaluate_model
from stages.inference.loading import load_model


@pytest.fixture(scope="module")
def shards(standing_run: Path) -> ShardSet:
    return ShardSet(standing_run / "shards")


def compared(standing_run: Path, shards: ShardSet, record: int) -> list[ComparedToken]:
    model = load_model(standing_run / "final_model")
    return compare_record(model, shards.split("dev")[record], shards.contract, lambda ids: f"<{ids[0]}>")


def test_it_says_what_a_naive_reading_of_record_and_model_says(standing_run: Path, shards: ShardSet) -> None:
    record, model = shards.split("dev")[1], load_model(standing_run / "final_model")
    start = [shards.contract.start_token_id, *record.response_ids_R[:-1].tolist()]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(record.prompt_ids_P[None].astype(np.int64)),
            decoder_input_ids=torch.tensor([start]),
            output_attentions=True,
        )
    log_q = out.logits[0].double().log_softmax(-1).numpy()
    tokens = compared(standing_run, shards, 1)
    assert [token.position for token in tokens] == list(range(record.response_ids_R.size))
    assert record.logprobs_NK is not None
    assert record.attention is not None
    for n, token in enumerate(tokens):
        label = int(record.response_ids_R[n])
        p, ids = np.exp(record.logprobs_NK[n].astype(np.float64)), record.ids_NK[n]
        q = np.exp(log_q[n])
        rest_p, rest_q = np.exp(record.log_tail_N[n].astype(np.float64)), 1 - q[ids].sum()
        kl = (p * np.log(p / q[ids])).sum() + rest_p * np.log(rest_p / rest_q)
        assert token.kl == pytest.approx(kl, abs=2e-4)
        assert token.label == f"<{label}>"
        assert token.label_by_student == pytest.approx(q[label], abs=1e-5)
        kept = dict(zip(ids.tolist(), p.tolist(), strict=True))
        assert token.label_by_teacher == (pytest.approx(kept[label], abs=1e-6) if label in kept else None)
        assert [t.text for t in token.teacher] == [f"<{id_}>" for id_ in ids[:3]]
        assert [t.text for t in token.student] == [f"<{id_}>" for id_ in np.argsort(-q)[:3]]
        keys = record.attention.positions_LNM[-1, n, :3]
        assert [t.text for t in token.teacher_looks] == [f"<{record.prompt_ids_P[key]}>" for key in keys]
        seen = out.cross_attentions[-1][0, :, n].mean(0)[1:]
        best = int(seen.argmax())
        assert token.student_looks[0].text == f"<{record.prompt_ids_P[best + 1]}>"
        assert token.student_looks[0].share == pytest.approx(float(seen[best]), abs=1e-5)


def test_it_says_the_same_by_blocks(standing_run: Path, shards: ShardSet) -> None:
    model, record = load_model(standing_run / "final_model"), shards.split("dev")[1]
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    whole, cut = (
        compare_record(model, record, shards.contract, lambda ids: f"<{ids[0]}>", block_rows=size)
        for size in (record.positions, 3)
    )
    assert rows[0] == sum(rows[1:]) == record.positions > 3 == max(rows[1:])
    for one, other in zip(whole, cut, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=1e-4, abs=1e-6)
        assert other.label_by_student == pytest.approx(one.label_by_student, rel=1e-4)
        assert [token.text for token in other.student] == [token.text for token in one.student]


def test_over_a_split_it_adds_up_to_the_evaluation(standing_run: Path, shards: ShardSet) -> None:
    tokens = [token for record in range(2) for token in compared(standing_run, shards, record)]
    report = evaluate_model(standing_run / "final_model", shards)
    assert report.positions == len(tokens)
    assert report.kl == pytest.approx(np.mean([token.kl for token in tokens]), rel=1e-4)
    agreed = np.mean([token.teacher[0].text == token.student[0].text for token in tokens])
    assert report.top1_agreement == pytest.approx(agreed)
