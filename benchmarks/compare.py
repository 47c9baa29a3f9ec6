"""What changed between two results of one benchmark: ratios that moved by more than the noise.

    python -m benchmarks.compare old.json new.json [--noise 1.25]

Ratios are taken, not times: both sides of a ratio ran on the same machine in the same run. Exit code 1 where one fell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]


def ratios(path: Path) -> dict[Key, float]:
    """By case, metric and reference."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["case"], row["metric"], row["reference_name"]): float(row["ratio"]) for row in rows}


def changes(old: dict[Key, float], new: dict[Key, float], noise: float) -> Iterator[tuple[Key, float]]:
    """Rows of both whose ratio changed by more than the factor `noise`, and by what factor; the worst first."""
    moved = ((key, new[key] / old[key]) for key in old.keys() & new.keys())
    yield from sorted((item for item in moved if not 1 / noise <= item[1] <= noise), key=lambda item: item[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=1.25, help="factor within which a change means nothing")
    asked = parser.parse_args(arguments)
    old, new = ratios(asked.old), ratios(asked.new)
    found = list(changes(old, new, asked.noise))
    for (case, metric, reference), factor in found:
        print(f"{factor:6.2f}x  {case}: {metric} against {reference}")
    only = len(old.keys() ^ new.keys())
    print(
        f"{len(old.keys() & new.keys())} rows in both, {len(found)} outside a factor of {asked.noise:g}; {only} in one"
    )
    return int(any(factor < 1 for _, factor in found))


if __name__ == "__main__":
    sys.exit(main())
