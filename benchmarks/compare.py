"""What changed between two results of one benchmark, or two folders of them: ratios that moved by more than the noise.

    python -m benchmarks.compare old.json new.json [--noise 1.25] [--all]
    python -m benchmarks.compare benchmarks/results benchmarks/results/quick

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


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """The two files; of two folders those that the newer one has and the older one too."""
    if not new.is_dir():
        return [(old, new)]
    return [(old / path.name, path) for path in sorted(new.glob("*.json")) if (old / path.name).exists()]


def told(old: Path, new: Path, noise: float, *, everything: bool) -> bool:
    """Print what moved, or every row of both; whether a ratio fell."""
    before, after = ratios(old), ratios(new)
    moved = dict(changes(before, after, noise))
    both = [key for key in after if key in before]
    for key in both if everything else moved:
        case, metric, reference = key
        mark = "" if key not in moved else "  fell" if moved[key] < 1 else "  rose"
        print(
            f"{before[key]:9.4g} -> {after[key]:9.4g}  {after[key] / before[key]:6.2f}x  "
            f"{case}: {metric} against {reference}{mark}"
        )
    only = len(before.keys() ^ after.keys())
    print(f"{new.stem}: {len(both)} rows in both, {len(moved)} outside a factor of {noise:g}; {only} in one")
    return any(factor < 1 for factor in moved.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=1.25, help="factor within which a change means nothing")
    parser.add_argument("--all", action="store_true", help="every row of both, not only those that moved")
    asked = parser.parse_args(arguments)
    fell = [told(*pair, asked.noise, everything=asked.all) for pair in pairs(asked.old, asked.new)]
    return int(any(fell))


if __name__ == "__main__":
    sys.exit(main())
