"""report.html of a run: what it was made of, its curves and its answers, in one file that needs no other.

Curves are inline SVG drawn from events.jsonl, thinned as the monitor thins them; colours follow the reader's light or
dark setting. Nothing in it is a script, and every word that came from data is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.event_log import EventReader
from pipeline.history import Curve, History
from pipeline.measured import summary_of_this_model
from pipeline.run import ELSEWHERE, RunFolder, write_atomically
from stages.events import Answered

REPORT = "report.html"
_GROUPS: dict[str, dict[str, str]] = {
    "Losses": {
        "loss": "objective",
        "kl": "KL to the teacher, nats",
        "kd": "distillation term",
        "ce": "cross-entropy of labels, nats",
        "attention": "cross-attention term",
        "encoder": "encoder attention term",
    },
    "Validation": {
        "val_kl": "KL to the teacher, nats",
        "val_cross_entropy": "cross-entropy, nats",
        "val_perplexity": "perplexity",
        "val_top1_agreement": "top-1 agreement",
        "val_top5_agreement": "top-5 agreement",
        "val_ece": "calibration error",
    },
    "What the loss looks at": {
        "top1": "top-1 agreement in training",
        "kept": "coverage: teacher's mass on the kept ids",
        "temperature": "temperature",
        "hard_share": "rows with hard negatives",
        "hard_mass": "student's mass on hard negatives",
        "mined_share": "steps' share of mined records",
        "difficulty_spread": "spread of the records' difficulty",
    },
    "Optimiser": {"lr": "highest learning rate", "lr_lowest": "lowest learning rate", "grad_norm": "gradient norm"},
    "Machine": {
        "tokens_per_s": "response tokens a second",
        "data_wait": "share of a step spent waiting for data",
        "memory_gib": "peak memory of a rank, GiB",
        "answer_seconds": "seconds that the answers below took",
    },
}
"""Curves by their names in the log; what a run did not measure is left out, what is unknown here comes last."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 190, 52, 12, 12, 26
_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1c1e21; --soft: #61666d; --line: #dcdedf;
  --curve: #1d6fb8; --band: #e9eef3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --ink: #e6e8ea; --soft: #9aa2ab;
  --line: #343a41; --curve: #62b0f5; --band: #262c32; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 34px 0 12px; }
.soft { color: var(--soft); }
.tiles, .charts { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); margin-top: 20px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.tile, figure, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
figure { margin: 0; } figcaption { display: flex; justify-content: space-between; gap: 10px; font-size: 13px; }
figcaption b { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke: var(--curve); stroke-width: 1.8; }
.curve-dot { fill: var(--curve); }
.sample { margin-bottom: 12px; } .sample dt { color: var(--soft); font-size: 12px; } .sample dd { margin: 0 0 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 6px 12px 6px 0; text-align: left; }
pre { background: var(--band); padding: 12px; border-radius: 8px; overflow: auto; font-size: 13px; }
"""


def write_report(run: RunFolder) -> Path:
    """Write run/report.html anew, whole or not at all; returns its path."""
    reader, history = EventReader(run.events), History()
    history.take(reader.read())
    path = run.path / REPORT
    write_atomically(path, render(run, history))
    return path


def render(run: RunFolder, history: History) -> str:
    """The page of a run whose log is `history`."""
    summary = summary_of_this_model(run)
    curves = {name: curve for stage in history.stages.values() for name, curve in stage.curves.items()}
    recipe = run.recipe_file.read_text(encoding="utf-8") if run.recipe_file.is_file() else ""
    body = [
        f"<h1>{_text(run.path.name)}</h1>",
        f'<p class="soft">{_text(_subtitle(summary))}</p>',
        f'<div class="tiles">{"".join(_tiles(summary))}</div>',
        *_elsewhere(summary[ELSEWHERE]),
        *_charts(curves),
        *_samples(summary.get("evaluate", {}).get("samples", ())),
        *_samples_over_time(history.answers.values()),
        f"<h2>Recipe</h2><details><summary>every value</summary><pre>{_text(recipe)}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(run.path.name)}: distillation report</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _subtitle(summary: Mapping[str, Any]) -> str:
    distilled = summary.get("distill")
    if not distilled:
        return "not trained to the end yet"
    state = "finished" if distilled["finished"] else "stopped"
    return (
        f"{state} after {distilled['steps']:,} steps on {distilled['ranks']} ranks in {distilled['precision']}, "
        f"{distilled['positions']:,} positions, {figures.clock(distilled['seconds'])} of training"
    )


def _tiles(summary: Mapping[str, Any]) -> Iterable[str]:
    distilled = summary.get("distill") or {}
    cached = distilled.get("cached") if distilled else summary.get("teacher_cache")
    before = distilled.get("untrained")
    after = distilled.get("validation") or summary.get("evaluate", {}).get("validation")
    if after:
        was = f", untrained {before['kl']:.3f}" if before else ""
        yield _tile(f"{after['kl']:.3f}", f"validation KL, nats{was}")
        yield _tile(f"{after['perplexity']:.2f}", "validation perplexity")
        yield _tile(f"{after['top1_agreement']:.1%}", f"top-1 agreement, top-5 {after['top5_agreement']:.1%}")
        yield _tile(f"{after['ece']:.1%}", "expected calibration error")
    evaluated = summary.get("evaluate", {})
    if whole := evaluated.get("whole"):
        yield _tile(f"{whole['kl']:.3f}", "validation KL over the whole vocabulary, nats")
    if match := evaluated.get("exact_match"):
        words = f"of {match['answers']} answers are right; 95 % interval {match['low']:.1%} to {match['high']:.1%}"
        yield _tile(f"{match['share']:.1%}", words)
    if distilled.get("seconds"):
        yield _tile(f"{distilled['positions'] / distilled['seconds']:,.0f}", "response tokens a second in training")
    if cached and cached.get("positions"):
        yield _tile(
            f"{cached['bytes'] / cached['positions']:.1f} B", f"a position cached, {cached['positions']:,} in all"
        )


def _tile(figure: str, words: str) -> str:
    return f'<div class="tile"><b>{_text(figure)}</b><span class="soft">{_text(words)}</span></div>'


def _charts(curves: Mapping[str, Curve]) -> Iterable[str]:
    named = {name for group in _GROUPS.values() for name in group}
    others = {name: name for name in sorted(curves.keys() - named)}
    for title, group in {**_GROUPS, "Others": others}.items():
        shown = [chart(words, curves[name]) for name, words in group.items() if name in curves]
        if shown:
            yield f'<h2>{_text(title)}</h2><div class="charts">{"".join(shown)}</div>'


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def chart(words: str, curve: Curve) -> str:
    """A metric over steps as SVG, its newest value in the caption. Values that are not finite are gaps."""
    finite = [(step, value) for step, value in curve.points if math.isfinite(value)]
    newest = figures.number(curve.newest)
    caption = f"<figcaption><span>{_text(words)}</span><b>{newest}</b></figcaption>"
    if not finite:
        return f'<figure>{caption}<p class="soft">no finite value</p></figure>'
    across = _axis([step for step, _ in finite], _LEFT, _WIDTH - _RIGHT)
    up = _axis([value for _, value in finite], _HEIGHT - _BOTTOM, _TOP)
    marks = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in up.ticks(4)
    ]
    marks += [
        f'<text x="{across(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:,.0f}</text>'
        for tick in across.ticks(5)
        if tick == int(tick)
    ]
    for piece in _pieces(curve.points):
        dots = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in piece)
        step, value = piece[-1]
        single = f'<circle class="curve-dot" cx="{across(step):.1f}" cy="{up(value):.1f}" r="2.5"/>'
        marks.append(f'<polyline class="curve" points="{dots}"/>' if len(piece) > 1 else single)
    label = f"{words}: {newest} at step {curve.points[-1][0]}"
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">{"".join(marks)}</svg>'
    return f"<figure>{caption}{drawing}</figure>"


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(high), 1e-9):  # a constant lies in the middle
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    return _Axis(low, high, start, end)


def _pieces(points: Iterable[tuple[int, float]]) -> Iterable[list[tuple[int, float]]]:
    """Runs of finite values."""
    piece: list[tuple[int, float]] = []
    for point in points:
        if math.isfinite(point[1]):
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


_COLUMNS = {
    "positions": "{:,}",
    "kl": "{:.4f}",
    "cross_entropy": "{:.4f}",
    "perplexity": "{:.2f}",
    "top1_agreement": "{:.1%}",
    "top5_agreement": "{:.1%}",
    "top1_accuracy": "{:.1%}",
    "top5_accuracy": "{:.1%}",
    "ece": "{:.1%}",
}
"""What is told of other text, and how; agreement is with a teacher, accuracy with the text."""


def _elsewhere(measured: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """A table of the text beside the validation split that the student was measured on."""
    if not measured:
        return
    names = [name for name in _COLUMNS if any(name in facts for facts in measured.values())]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("measured on", *names))
    yield f'<h2>Other text</h2><div class="wide"><table><tr>{head}</tr>'
    for where, facts in measured.items():
        cells = [_COLUMNS[name].format(facts[name]) if name in facts else "" for name in names]
        yield f"<tr><td>{_text(where)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if samples:
        yield "<h2>Answers to validation prompts</h2>"
    for sample in samples:
        rows = "".join(f"<dt>{name}</dt><dd>{_text(sample[name])}</dd>" for name in ("prompt", "answer", "label"))
        yield f'<dl class="sample">{rows}</dl>'


def _samples_over_time(prompts: Iterable[Sequence[tuple[int, Answered]]]) -> Iterable[str]:
    """What was answered to each prompt as training went on."""
    if prompts:
        yield "<h2>Answers over time</h2>"
    for answers in prompts:
        newest = answers[-1][1]
        rows = [("prompt", newest.prompt), ("label", newest.label)]
        rows += [(f"after {step:,} steps", answered.answer.strip() or "(nothing)") for step, answered in answers]
        yield f'<dl class="sample">{"".join(f"<dt>{name}</dt><dd>{_text(words)}</dd>" for name, words in rows)}</dl>'


def _text(value: object) -> str:
    return html.escape(str(value))
