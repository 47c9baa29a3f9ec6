"""How a benchmark says what it measured: one row a comparison, a table on the terminal, results/NAME.json for good.

`--quick` asks any of them for fewer cases and turns of the same code. Cases keep their names, so that `compare` finds
them in the full results; what it writes lies apart, in results/quick, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
QUICK = RESULTS / "quick"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`ratio` is reference / ours where less is better and ours / reference where more is: above 1, ours is ahead.

    `bound` is what the ratio has to reach, where something is promised.
    """

    case: str
    metric: str
    unit: str
    ours: float
    reference: float
    reference_name: str
    ratio: float
    bound: float | None = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be asked for; `description` is its own docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer cases and turns, into results/quick")
    return made


def compare(
    case: str,
    metric: str,
    unit: str,
    ours: float,
    reference: float,
    name: str,
    *,
    bound: float | None = None,
    more_is_better: bool = False,
) -> Row:
    """Make a row of two figures of the same run, and print it."""
    row = Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=_figure(ours),
        reference=_figure(reference),
        reference_name=name,
        ratio=_figure(ours / reference if more_is_better else reference / ours),
        bound=bound,
    )
    verdict = "" if bound is None else f"bound {bound:g} {'held' if row.ratio >= bound else 'MISSED'}"
    print(
        f"{row.case:24} {row.metric:24} {row.ours:10.5g} {row.unit:8} {row.reference:10.5g} {row.reference_name:32} "
        f"{row.ratio:8.3g}x {verdict}",
        flush=True,
    )
    return row


def write(
    name: str, rows: Iterable[Row], *, clock: str, packages: Iterable[str], threads: int, quick: bool = False
) -> Path:
    """Write results/NAME.json: machine, versions, commit, and the rows. `clock` says how time was taken.

    Packages go by what is imported: vllm is another distribution where there is no GPU.
    """
    providers = packages_distributions()
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device()}, {threads} threads",
        "versions": {"python": platform.python_version()}
        | {package: version(providers[package][0]) for package in packages},
        "commit": _commit(),
        "clock": clock,
        "rows": [asdict(row) for row in rows],
    }
    folder = QUICK if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


@dataclass(frozen=True, slots=True)
class Runs:
    """What trains for long keeps each run as one line of a file, so that it goes on where it stopped."""

    path: Path

    def finished(self) -> list[dict[str, Any]]:
        """All runs so far; a line that a kill cut short is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, facts: dict[str, Any]) -> None:
        whole = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("ab") as file:
            if not whole.endswith(b"\n"):
                file.truncate(whole.rfind(b"\n") + 1)
            file.write(json.dumps(facts).encode() + b"\n")


def _figure(value: float) -> float:
    """Four significant digits: what lies beyond is noise."""
    return float(f"{value:.4g}")


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()


def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
