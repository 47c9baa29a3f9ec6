"""Results are told as they are: a report made from the committed files alone, and changes beyond noise named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare, report
from benchmarks.record import RESULTS, Row


def results(path: Path, **ratio_of_case: float) -> Path:
    rows = [
        {"case": case, "metric": "time", "unit": "ms", "ours": 1, "reference": ratio, "reference_name": "peer"}
        | {"ratio": ratio, "bound": None}
        for case, ratio in ratio_of_case.items()
    ]
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return path


def test_only_what_moved_beyond_noise_is_named_the_worst_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = results(tmp_path / "old.json", slower=4.0, much_slower=4.0, alike=4.0, faster=4.0, gone=1.0)
    new = results(tmp_path / "new.json", slower=3.0, much_slower=1.0, alike=3.9, faster=8.0)
    assert compare.main([str(old), str(new)]) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    assert [(line.split()[4], line.split()[-1]) for line in lines] == [
        ("much_slower:", "fell"),
        ("slower:", "fell"),
        ("faster:", "rose"),
    ]
    assert total == "new: 4 rows in both, 3 outside a factor of 1.25; 1 in one"
    assert compare.main([str(new), str(new)]) == 0


def test_of_two_folders_what_both_have_is_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "quick").mkdir()
    results(tmp_path / "one.json", alike=2.0, left_out=1.0)
    results(tmp_path / "other.json", alike=2.0)
    results(tmp_path / "quick" / "one.json", alike=2.1)
    assert compare.main([str(tmp_path), str(tmp_path / "quick"), "--all"]) == 0
    row, total = capsys.readouterr().out.splitlines()
    assert row.split() == ["2", "->", "2.1", "1.05x", "alike:", "time", "against", "peer"]
    assert total == "one: 1 rows in both, 0 outside a factor of 1.25; 1 in one"


def test_the_committed_report_is_the_committed_results():
    assert report.REPORT.read_text(encoding="utf-8") == report.report(), "make bench-report writes it anew"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_has_the_one_form_and_a_benchmark_that_makes_it(path: Path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert facts.keys() == {"machine", "versions", "commit", "clock", "rows"}
    assert all(row.keys() == set(Row.__dataclass_fields__) for row in facts["rows"])
    assert (RESULTS.parent / f"{path.stem}.py").is_file()
