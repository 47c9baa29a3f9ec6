"""How cost grows, drawn from results/*.json: one SVG an axis, both scales logarithmic, so that a slope is an exponent.

A chart is the figures of rows that differ in one number of their case, ours and each reference. Where a result holds
fewer than two such rows, there is no chart. Hand-written SVG: colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PLOTS = RESULTS / "plots"
OURS = "ours"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 320, 64, 190, 34, 44
_NAMESPACE = "http:&#47;&#47;www.w3.org/2000/svg"
"""A name and no address, without which no image is drawn; its slashes are references, for no file here names a host."""
_MOST = 5
"""References of one chart."""
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #61666d; }
.title { font-size: 14px; fill: #1c1e21; }
.grid { stroke: #dcdedf; } .page { fill: #ffffff; }
.s0 { --c: #1d6fb8; } .s1 { --c: #c2571a; } .s2 { --c: #2f8a4c; } .s3 { --c: #8a4fb0; } .s4 { --c: #9a7b12; }
.s5 { --c: #6b7078; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.5; } .s0 polyline { stroke-width: 2.5; }
circle { fill: var(--c); } .s0 text, .s1 text, .s2 text, .s3 text, .s4 text, .s5 text { fill: var(--c); }
@media (prefers-color-scheme: dark) { text { fill: #9aa2ab; } .title { fill: #e6e8ea; } .grid { stroke: #343a41; }
  .page { fill: #1d2125; } .s0 { --c: #62b0f5; } .s1 { --c: #f09a63; } .s2 { --c: #6cc98a; } .s3 { --c: #c697e6; }
  .s4 { --c: #d8bb55; } .s5 { --c: #a6adb5; } }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What is drawn: rows of one metric whose case matches, over the number in it."""

    name: str
    benchmark: str
    case: str
    """A pattern with one group, the number."""
    metric: str
    title: str
    axis: str


CHARTS = (
    Growth(
        name="scan-length",
        benchmark="student",
        case=r"scan T=(\d+)",
        metric="forward + backward",
        title="The liquid scan over the length of a sequence",
        axis="tokens",
    ),
    Growth(
        name="decode-context",
        benchmark="student",
        case=r"decode after (\d+)",
        metric="time a token",
        title="One more token over what is written already",
        axis="tokens written",
    ),
    Growth(
        name="loss-vocabulary",
        benchmark="loss",
        case=r"bucket (\d+)k x 512",
        metric="forward + backward",
        title="The distillation loss over the vocabulary",
        axis="thousand ids",
    ),
    Growth(
        name="loss-memory",
        benchmark="loss",
        case=r"bucket (\d+)k x 512",
        metric="peak memory",
        title="Peak memory of the loss over the vocabulary",
        axis="thousand ids",
    ),
    Growth(
        name="codec-k",
        benchmark="codec",
        case=r"top-(\d+), V = 49,152",
        metric="bytes a token",
        title="A cached position over the number of ids kept",
        axis="ids kept",
    ),
    Growth(
        name="reader-open",
        benchmark="reader",
        case=r"(\d+)M tokens, .*",
        metric="open",
        title="Opening a set over its size",
        axis="million response tokens",
    ),
    Growth(
        name="reader-decode",
        benchmark="reader",
        case=r"(\d+)M tokens, .*",
        metric="decode, shuffled",
        title="Reading in a shuffled order over the size of a set",
        axis="million response tokens",
    ),
    *(
        Growth(
            name=f"processes-{verb}",
            benchmark="processes",
            case=r"(\d+) process(?:es)?",
            metric=f"{stage}, response tokens",
            title=f"{stage.capitalize()} over the number of processes",
            axis="processes",
        )
        for verb, stage in (("teacher-cache", "stage one"), ("distill", "stage two"))
    ),
)

Series = dict[str, list[tuple[float, float]]]


def series(growth: Growth, rows: Sequence[dict[str, Any]]) -> tuple[Series, str]:
    """Points of every line by rising number, and the unit. A reference seen at one number only is none."""
    found: dict[str, dict[float, float]] = {OURS: {}}
    unit = ""
    for row in rows:
        match = re.fullmatch(growth.case, row["case"])
        if match and row["metric"] == growth.metric:
            at, unit = float(match[1]), row["unit"]
            found[OURS][at] = row["ours"]
            found.setdefault(row["reference_name"], {})[at] = row["reference"]
    lines = {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}
    return dict(list(lines.items())[: _MOST + 1]), unit


def draw(growth: Growth, lines: Series, unit: str) -> str:
    across = _Log([x for points in lines.values() for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    up = _Log([y for points in lines.values() for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    return "\n".join(
        [
            f'<svg xmlns="{_NAMESPACE}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
            f"<title>{html.escape(growth.title)}</title><style>{_STYLE}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
            f'<text class="title" x="{_LEFT}" y="20">{html.escape(growth.title)}, {html.escape(unit)}</text>',
            *_frame(across, up, sorted({x for x, _ in lines[OURS]}), growth.axis),
            *_lines(lines, across, up),
            "</svg>\n",
        ]
    )


class _Log:
    """Positive values to pixels by their logarithm."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.high < 1.5 * self.low:  # a flat line lies in the middle, not on the border
            self.low, self.high = self.low / 1.5, self.high * 1.5
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Powers of ten with their halves and fifths where few lie between."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _frame(across: _Log, up: _Log, numbers: Sequence[float], axis: str) -> Iterator[str]:
    for tick in up.ticks():
        y = up(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for number in numbers:
        yield f'<text x="{across(number):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{number:,.0f}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(axis)}</text>'


def _lines(lines: Series, across: _Log, up: _Log) -> Iterator[str]:
    last = max(points[-1][0] for points in lines.values())
    ends = sorted((up(points[-1][1]), name) for name, points in lines.items() if points[-1][0] == last)
    heights: dict[str, float] = {}
    lowest = -math.inf
    for y, name in ends:  # names that would lie on each other move down
        lowest = heights[name] = max(y, lowest + 14)
    for number, (name, points) in enumerate(lines.items()):
        dots = [f"{across(x):.1f},{up(y):.1f}" for x, y in points]
        marks = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*dot.split(",")) for dot in dots)
        x, y = across(points[-1][0]), up(points[-1][1])
        if name in heights:
            at = f'x="{x + 10:.1f}" y="{heights[name] + 4:.1f}"'
        else:  # it ends before the others: its name stands under its end
            at = f'x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle"'
        label = f"<text {at}>{html.escape(name)}</text>"
        yield f'<g class="s{number}"><polyline points="{" ".join(dots)}"/>{marks}{label}</g>'


def charts(results: Path = RESULTS) -> dict[str, tuple[Growth, str]]:
    """By file name: what is drawn, and the SVG."""
    found: dict[str, tuple[Growth, str]] = {}
    for growth in CHARTS:
        path = results / f"{growth.benchmark}.json"
        if path.exists():
            lines, unit = series(growth, json.loads(path.read_text(encoding="utf-8"))["rows"])
            if OURS in lines:
                found[f"{growth.name}.svg"] = growth, draw(growth, lines, unit)
    return found
