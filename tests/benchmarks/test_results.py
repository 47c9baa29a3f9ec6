"""Results are told as they are: a report made from the committed files alone, and changes beyond noise named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import compare, plots, report
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


def test_the_committed_charts_are_the_committed_results():
    drawn = {file: svg for file, (_, svg) in plots.charts().items()}
    assert {path.name: path.read_text(encoding="utf-8") for path in plots.PLOTS.glob("*.svg")} == drawn
    text = report.REPORT.read_text(encoding="utf-8")
    assert all(f"(results/plots/{file})" in text for file in drawn)


def test_a_chart_shows_every_figure_at_its_number_on_logarithmic_scales():
    growth = plots.Growth(name="n", benchmark="b", case=r"T=(\d+)", metric="time", title="t", axis="tokens")
    told = [(1, 10, 20, "peer"), (10, 100, 20, "peer"), (100, 1000, 20, "peer"), (100, 1000, 7, "seen once")]
    rows = [
        {"case": f"T={at}", "metric": "time", "unit": "ms", "ours": ours, "reference": other, "reference_name": name}
        for at, ours, other, name in told
    ]
    lines, unit = plots.series(growth, [*rows, {**rows[0], "metric": "memory"}, {**rows[0], "case": "U=3"}])
    assert (lines, unit) == ({"ours": [(1, 10), (10, 100), (100, 1000)], "peer": [(1, 20), (10, 20), (100, 20)]}, "ms")
    ours, peer = re.findall(r'<polyline points="([^"]+)"', plots.draw(growth, lines, unit))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, dot.split(",")) for dot in ours.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1, "more is higher"
    assert len({dot.split(",")[1] for dot in peer.split()}) == 1


def test_the_quick_set_is_every_benchmark_that_has_one():
    makefile = (RESULTS.parent.parent / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^QUICK_BENCHMARKS = (.+)$", makefile, re.MULTILINE)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in RESULTS.parent.glob("*.py")}
    assert listed is not None
    assert set(listed[1].split()) == {name for name, text in sources.items() if "parser(__doc__)" in text}


def test_what_was_measured_on_no_gpu_says_so():
    """The rows of a GPU say "not measured" for as long as no result names one."""
    machines = [json.loads(path.read_text(encoding="utf-8"))["machine"] for path in RESULTS.glob("*.json")]
    assert not any("NVIDIA" in machine for machine in machines)
    assert report.report().count("| not measured | not measured |") == len(report.ON_A_GPU)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_has_the_one_form_and_a_benchmark_that_makes_it(path: Path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert facts.keys() == {"machine", "versions", "commit", "clock", "rows"}
    assert all(row.keys() == set(Row.__dataclass_fields__) for row in facts["rows"])
    assert (RESULTS.parent / f"{path.stem}.py").is_file()
