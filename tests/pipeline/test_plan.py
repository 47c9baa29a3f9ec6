"""The cost model on paper against arithmetic by hand, and from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import plan as planning
from pipeline.errors import PipelineError, UsageError
from pipeline.plan import Assumptions, Measured, Student, Teacher, plan, told
from stages.student.model import build_student
from stages.student.shape import StudentShape

KNOWN = Measured(bytes_a_token=100, capture=0.5, encode=1000, decode=2000, loss=0.5)
GIVEN = Assumptions(
    peak=1,
    utilisation=0.5,
    student_utilisation=0.25,
    store=0.001,
    gpus_a_machine=2,
    cores_a_gpu=5,
    prompt=100,
    response=100,
    epochs=2,
    global_batch=2,
    step_seconds=0.36,
)
TEACHER = Teacher(layers=1, hidden_size=10, query_size=10, key_size=5, intermediate_size=20, vocab_size=1000)
STUDENT = Student(hidden_size=10, encoder_weights=400, decoder_weights=600)


def test_every_resource_takes_what_it_takes_by_hand():
    found = plan(4, 3.6e9, known=KNOWN, given=GIVEN, teacher=TEACHER, student=STUDENT)
    # A token of the body: 2 (10 (20 + 10) + 3 * 10 * 20) + 4 * 10 * 200 / 2 = 5,800; its head: 2 * 10 * 1000 = 20,000.
    # Two tokens a response token, 31,600 in all; 4 GPUs at 1e12 * 0.5 * 0.5.
    assert found.caching.hours == pytest.approx(
        {
            "prefill and head on the GPUs": 1e6 * 31_600 / 1e12,
            "encoding on the cores": 1e6 / (20 * 1000),
            "writing to the store": 1e6 * 100 / 2e6,
        }
    )
    assert found.caching.bottleneck == "encoding on the cores"
    assert (found.bytes, found.caching.total) == (3.6e11, 50)
    # 6 (400 + 600 + 10 * 1000) = 66,000 a token, twice; two of four ranks have a record, at 1e12 * 0.25 * 0.5 each.
    assert found.training.hours == pytest.approx(
        {
            "the student on the GPUs": 2e6 * 66_000 / 2.5e11,
            "steps one after the other": 2e6 / 200 * 0.36,
            "decoding on the cores": 2e6 / (20 * 2000),
            "reading from the store": 2e6 * 100 / 2e6,
        }
    )
    assert (found.training.bottleneck, found.training.total) == ("steps one after the other", pytest.approx(3600))


def test_the_model_of_qwen3_8b_has_its_weights():
    """Qwen3-8B: 8.19 billion, of which 6.95 are neither embedding nor head."""
    teacher = Teacher()
    assert teacher.body_flops(0) / 2 == pytest.approx(6.95e9, rel=0.002)
    assert teacher.body_flops(0) / 2 + teacher.head_flops == pytest.approx(8.19e9, rel=0.002)


def test_the_model_of_the_student_has_the_weights_of_the_default_shape():
    student = build_student(StudentShape(), vocab_size=10, start_token_id=0, end_token_id=1, seed=0)
    halves = (student.model.encoder.layers, student.model.decoder.layers)
    counted = [sum(parameter.numel() for parameter in half.parameters()) for half in halves]
    assert [Student().encoder_weights, Student().decoder_weights] == counted


def test_the_bottleneck_is_told_with_every_ground_and_its_file():
    lines = told(Assumptions(), as_json=False)
    assert sum(" B " in line and line.rstrip().split()[2].isdigit() for line in lines[2:8]) == 6
    text = "\n".join(lines)
    for file in ("codec", "teacher_cache", "reader", "loss"):
        assert f"benchmarks/results/{file}.json" in text
    assert "assumed, measured by nobody here:\n  peak 989, utilisation 0.4" in text
    (document,) = told(Assumptions(store=2), as_json=True)
    assert json.loads(document)["assumed"]["store"] == 2


def test_a_result_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(PipelineError, match=r"codec\.json: no figure for top-64"):
        planning.measured(tmp_path)


@pytest.mark.parametrize("wrong", [{"peak": 0}, {"utilisation": 1.5}, {"store": -1}, {"step_seconds": float("nan")}])
def test_an_assumption_that_means_nothing_is_refused(wrong: dict[str, float]):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Assumptions(**wrong)  # type: ignore[arg-type]
