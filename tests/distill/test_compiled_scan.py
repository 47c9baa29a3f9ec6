"""Where the compiled scan is used, and by how many threads; that it is the scan: tests/student/test_scan.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.reader import ShardSet
from stages.distill import compiled_scan
from stages.distill.compiled_scan import compile_scans, scan_compiled
from stages.distill.evaluate import evaluate_model
from stages.distill.scan_loops import SPAN
from stages.student.config import MiniCodformerConfig
from stages.student.recurrences import MatrixRecurrence
from tests.student.test_scan import draw, run_with_gradients


def test_O3_heads_that_threads_share_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(SPAN + 9, dtype=torch.float32, heads=5)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run_with_gradients(scan_compiled, inputs))
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)


def test_a_compiled_student_scans_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MiniCodformerConfig(vocab_size=9, hidden_size=32, num_attention_heads=2)
    recurrence = MatrixRecurrence(config)
    recurrence.initialize()
    command = torch.randn(2, 21, 4 * 32, generator=torch.Generator().manual_seed(0))
    expected, last = recurrence(command, None, None)
    compile_scans(recurrence)
    monkeypatch.setattr("stages.student.scan_chunked._ChunkedScan.apply", None)
    read, state = recurrence(command, None, None)
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(state, last)


def test_on_a_cpu_a_student_is_trained_and_measured_with_it(
    train_here: Callable[..., Any], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded: list[bool] = []

    def counted(*inputs: Any) -> Any:
        graded.append(torch.is_grad_enabled())
        return scan_compiled(*inputs)

    monkeypatch.setattr(compiled_scan, "scan_compiled", counted)
    run = train_here(tmp_path, epochs=1).run
    assert True in graded
    graded.clear()
    evaluate_model(run / "final_model", ShardSet(shards))
    assert set(graded) == {False}
