"""The monitor's view, drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline import figures
from pipeline.load import Load
from pipeline.monitor import AnswerView, CurveView, RunView, StageView
from pipeline.terminal.capture import as_text

_STATES = {"running": "bold green", "finished": "green", "stopped": "yellow", "failed": "bold red"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_NARROW = 72
_SAMPLE_CHARACTERS = 240
_STAGES = 4
_SAMPLE_ROWS = 12
"""Rows that one sample may take on a narrow screen."""


def live(look: Callable[[], RunView], *, every: float) -> None:
    """Draw what `look` returns, again and again, on the whole screen; Ctrl-C ends it and leaves the last view."""
    view = look()
    console = Console()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as screen:
            while True:
                screen.update(dashboard(view, console.width, console.height), refresh=True)
                time.sleep(every)
                view = look()
    except KeyboardInterrupt:
        pass
    console.print(dashboard(view, console.width))


def rendered(view: RunView) -> str:
    """The view as text, with colours only on a terminal."""
    return as_text(lambda console: console.print(dashboard(view, console.width)))


def dashboard(view: RunView, width: int, height: int | None = None) -> RenderableType:
    """Everything about a run in one look, the urgent first; of what does not fit into `height`, the newest stages and
    the first curves."""
    stages, curves, samples = view.stages, view.curves, view.samples
    if height is not None:
        stages = stages[-_STAGES:]
        room = height - 4 - len(view.warnings) - len(stages) - len(view.notes) - len(view.load.gpus)
        curves = curves[: max(room - 2, 3)]
        samples = samples[: (room - 2 - len(curves)) // _SAMPLE_ROWS]
    parts: list[RenderableType] = [_heading(view)]
    parts += [Text(f"! {warning}", style="bold yellow") for warning in view.warnings]
    parts += [_stages(stages, width)] if stages else [Text("nothing reported yet", style="dim")]
    parts += [_curves(curves, width)] if curves else []
    parts.append(_machine(view))
    parts += [_notes(view)] if view.notes else []
    parts += [_samples(samples)] if samples else []
    return Group(*parts)


def _heading(view: RunView) -> Text:
    facts = view.facts
    text = Text.assemble((facts.name, "bold"), "  ", (facts.state, _STATES[facts.state]))
    if facts.verb:
        text.append(f"  {facts.verb}")
    if facts.updated is not None:
        text.append(f"  last said {figures.age(view.time - facts.updated)} ago", style="dim")
    if facts.state == "stopped" and facts.message:
        text.append(f"  {facts.message}", style="yellow")
    return text


def _stages(stages: Sequence[StageView], width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for stage in stages:
        finished = stage.done >= stage.total
        cells: list[RenderableType] = [
            Text(stage.stage, style="dim" if finished else "bold"),
            ProgressBar(total=max(stage.total, 1e-9), completed=stage.done, width=20 if width >= _NARROW else 8),
            Text(f"{stage.done / max(stage.total, 1e-9):.0%}"),
            Text(figures.share(stage.done, stage.total, stage.unit)),
            Text("" if stage.rate is None else figures.pace(stage.rate, stage.unit, named=False), style="cyan"),
            Text("" if stage.left is None else f"ETA {figures.clock(stage.left)}", style="cyan"),
            Text(figures.size(stage.bytes) if stage.bytes else "", style="dim"),
        ]
        table.add_row(*cells)
    return table


def _curves(curves: Sequence[CurveView], width: int) -> Panel:
    table = Table.grid(padding=(0, 2))
    room = max(8, min(_SPARK_WIDTH, width - 60))
    for curve in curves:
        finite = [value for value in curve.values if math.isfinite(value)]
        span = f"{figures.number(min(finite))} … {figures.number(max(finite))}" if finite else ""
        table.add_row(
            Text(curve.name),
            Text(figures.number(curve.newest), style="bold"),
            Text(sparkline(curve.values, room), style="cyan"),
            Text(span, style="dim"),
            Text(f"step {curve.steps[-1]}", style="dim"),
        )
    return Panel(table, title="curves", title_align="left", border_style="dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as blocks of eight heights, the last `width` buckets of equal size; a gap where none is finite."""
    buckets = min(width, len(values))
    edges = [round(index * len(values) / buckets) for index in range(buckets + 1)]
    means: list[float | None] = []
    for start, end in pairwise(edges):
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * buckets
    low, span = min(known), max(known) - min(known)
    top = len(_BLOCKS) - 1
    return "".join(" " if m is None else _BLOCKS[round((m - low) / span * top) if span else 0] for m in means)


def _machine(view: RunView) -> Text:
    load = view.load
    parts = [
        f"CPU {load.cpu:.0%} of {load.cores} cores",
        f"memory {figures.size(load.memory_used)} of {figures.size(load.memory_total)}",
        f"disk {figures.size(load.disk_free)} free",
    ]
    if load.processes:
        parts.append(
            f"the run: {load.processes} process{'es' * (load.processes != 1)}, {load.run_cores:.1f} cores, "
            f"{figures.size(load.run_memory)}"
        )
    if view.coverage is not None:
        parts.append(f"coverage {view.coverage:.3f}")
    return Text("\n".join([" · ".join(parts), *_gpus(load)]), style="dim")


def _gpus(load: Load) -> list[str]:
    lines = []
    for gpu in load.gpus:
        parts = [f"GPU {gpu.index}"]
        parts += [] if gpu.busy is None else [f"{gpu.busy:.0%} busy"]
        if gpu.memory_used is not None and gpu.memory_total is not None:
            parts.append(f"{figures.size(gpu.memory_used)} of {figures.size(gpu.memory_total)}")
        parts += [] if gpu.celsius is None else [f"{gpu.celsius:.0f} °C"]
        parts += [] if gpu.watts is None else [f"{gpu.watts:.0f} W"]
        lines.append(" · ".join(parts))
    return lines


def _notes(view: RunView) -> Group:
    return Group(
        *(
            Text(
                f"{figures.age(view.time - note.time):>7} ago  {note.stage}: {note.text}",
                style="yellow" if note.level == "warning" else "dim",
            )
            for note in view.notes
        )
    )


def _samples(samples: Sequence[AnswerView]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for sample in samples:
        table.add_row(Text("prompt", style="dim"), Text(_tail(sample.prompt)))
        table.add_row(Text("answer", style="bold"), Text(_head(sample.answer)))
        table.add_row(Text("label", style="dim"), Text(_head(sample.label), style="dim"))
        table.add_row("", "")
    step = samples[0].step
    title = "answers of the newest evaluation" if step is None else f"answers after {step:,} steps"
    return Panel(table, title=title, title_align="left", border_style="dim")


def _head(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SAMPLE_CHARACTERS else flat[:_SAMPLE_CHARACTERS] + " …"


def _tail(text: str) -> str:
    """The end of a prompt: that is where the question is."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _SAMPLE_CHARACTERS else "… " + flat[-_SAMPLE_CHARACTERS:]
