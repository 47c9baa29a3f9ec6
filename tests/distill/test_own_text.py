"""A student against plain text: against its whole distributions in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from shards.reader import ShardSet
from stages.distill.evaluate import evaluate_model
from stages.distill.own_text import evaluate_text
from stages.distill.passages import Passage
from stages.distill.settings import DistillSettings
from stages.distill.start import fresh_student
from stages.student.model import MiniCodformerForConditionalGeneration
from stages.student.shape import StudentShape


@pytest.fixture(scope="module")
def student_folder(
    shards: Path, settings: DistillSettings, shape: StudentShape, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("student")
    student = fresh_student(ShardSet(shards), settings, shape)
    with torch.no_grad():
        student.output_weight().mul_(6)  # confident, so that several bins are filled
    student.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("block_rows", [3, 128])
def test_it_is_what_dense_probabilities_say(block_rows: int, shards: Path, student_folder: Path) -> None:
    texts = [
        Passage(prompt_ids_P=record.prompt_ids_P, response_ids_R=record.response_ids_R)
        for record in ShardSet(shards).split("dev")
    ]
    report = evaluate_text(student_folder, texts, block_rows=block_rows)
    student = MiniCodformerForConditionalGeneration.from_pretrained(student_folder, dtype=torch.float64).eval()
    losses, ranks, best = [], [], []
    with torch.no_grad():
        for text in texts:
            labels = torch.from_numpy(text.response_ids_R).long()
            inputs = torch.tensor([[0, *labels[:-1].tolist()]])
            prompt = torch.from_numpy(text.prompt_ids_P).long()[None]
            q = student(input_ids=prompt, decoder_input_ids=inputs).logits[0].softmax(1)
            own = q[torch.arange(len(labels)), labels]
            losses += (-own.log()).tolist()
            ranks += (q > own[:, None]).sum(1).tolist()
            best += q.max(1).values.tolist()
    count = len(losses)
    gaps = [
        abs(sum(c - (rank == 0) for c, rank in zip(best, ranks, strict=True) if min(int(c * 15), 14) == chosen))
        for chosen in range(15)
    ]
    assert report.positions == count
    assert report.cross_entropy == pytest.approx(sum(losses) / count, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(sum(losses) / count), rel=1e-4)
    assert report.top1_accuracy == pytest.approx(sum(rank == 0 for rank in ranks) / count)
    assert report.top5_accuracy == pytest.approx(sum(rank < 5 for rank in ranks) / count)
    assert sum(gap > 0 for gap in gaps) > 4
    assert report.ece == pytest.approx(sum(gaps) / count, rel=1e-4)


def test_of_cached_records_it_says_what_their_evaluation_says(shards: Path, student_folder: Path) -> None:
    shard_set = ShardSet(shards)
    cached, plain = evaluate_model(student_folder, shard_set), evaluate_text(student_folder, shard_set.split("dev"))
    for name in ("positions", "cross_entropy", "perplexity", "ece"):
        assert getattr(plain, name) == pytest.approx(getattr(cached, name), rel=1e-5)
