"""Which recipe and which run a command means, and why: the part of a command line that every verb shares."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.recipe import Recipe, load
from pipeline.run import RUNS, RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    recipe: Recipe
    run: RunFolder
    why: str


def choose(recipe: str | None, *, name: str | None, data: Path | None, overrides: Sequence[str]) -> Choice:
    """Resolve the options of a command line.

    Without a recipe, a run that exists keeps its own; for a new run the machine decides. Raises UsageError for a bad
    name, key or value.
    """
    if name is not None:
        _require_name(name)
    why = "as asked"
    if recipe is None:
        recipe, why = _by_machine()
        standing = RunFolder(RUNS / (name or recipe)).recipe_file
        if standing.is_file():
            recipe, why = str(standing), "this run's own"
    if data is not None:
        overrides = [*overrides, f"corpus.source={json.dumps(str(data.resolve()), ensure_ascii=False)}"]
    loaded = load(recipe, overrides)
    run = RunFolder(RUNS / _require_name(name or loaded.name))
    return Choice(recipe=loaded, run=run, why=f"recipe {loaded.name} ({why}), run {run.path}")


def _require_name(name: str) -> str:
    """`name`, where it cannot lead out of runs/."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} cannot name a run", hint="give --name letters, digits, '.', '_' and '-'")
    return name


def _by_machine() -> tuple[str, str]:
    from pipeline.launch import machine

    here = machine()
    return ("qwen3-8b" if here.gpus else "smollm2-demo"), here.describe()
