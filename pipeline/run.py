"""The run directory: one folder that holds everything a run made, and the lock that lets one process write to it.

    runs/<name>/{recipe.toml, events.jsonl, summary.json, responses/, shards/, checkpoints/, final_model/}

`recipe.toml` is the resolved recipe. A section of it may change until a stage that depends on it has begun; from then
on another value is refused, naming the key, because what stands in the folder was made with the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.recipe import Recipe, load
from pipeline.turn import take_turn
from shards.durable import sync
from stages.distill.settings import FREE_SETTINGS
from stages.teacher_cache.settings import FREE_TEACHER_SETTINGS

RUNS = Path("runs")
ELSEWHERE = "evaluate_elsewhere"
"""Where summary.json holds what was measured beside the standing report, by what it was measured on."""
CACHE_SECTIONS = ("corpus", "teacher", "respond", "cache")
STUDENT_SECTIONS = ("student", "distill", "objective")
# What may differ between two starts of one run without changing what it makes.
_FREE_KEYS = frozenset(
    [f"teacher.{name}" for name in FREE_TEACHER_SETTINGS] + [f"distill.{name}" for name in FREE_SETTINGS]
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run and the few files that more than one verb writes."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def responses(self) -> Path:
        return self.path / "responses"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_model(self) -> Path:
        return self.path / "final_model"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    def lock(self, verb: str) -> AbstractContextManager[None]:
        """Hold the run for one writing process: see `pipeline.turn`. Raises PipelineError naming the holder if any."""
        return take_turn(self.path, verb)

    def recipe(self) -> Recipe:
        """The recipe this run was made with."""
        if not self.recipe_file.is_file():
            raise PipelineError(
                f"{self.path} is not a run: no recipe.toml in it", hint="see `cli.py runs` or `ls runs`"
            )
        return load(str(self.recipe_file))

    def adopt(self, recipe: Recipe) -> Recipe:
        """Make `recipe` this run's recipe as far as stages that have begun allow, and return what holds from now on.

        Raises PipelineError naming the first key that differs from what a begun stage was started with.
        """
        if self.recipe_file.is_file():
            standing = self.recipe()
            for sections, hint in self._begun():
                _require_equal(standing, recipe, sections, self.path, hint)
            recipe = replace(recipe, name=standing.name)
        write_atomically(self.recipe_file, recipe.to_toml())
        return recipe

    def _begun(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The sections that a stage has begun with, and what to do for another value in them."""
        from shards.manifest import CONTRACT_NAME

        if (self.shards / CONTRACT_NAME).exists():
            yield CACHE_SECTIONS, "give the new settings a run of their own: NAME=… (--name …)"
        if self.checkpoints.exists() or self.final_model.exists():
            same = f"SHARDS={self.known_shards() or '…'} (--name …, --shards …)"
            yield STUDENT_SECTIONS, f"train another student from the same shards: NAME=… {same}"

    def require_model(self) -> None:
        """Raises PipelineError where stage two has not come to its end."""
        if not self.final_model.is_dir():
            raise PipelineError(
                f"{self.path} has no final model yet", hint="run make distill first; it resumes where it stopped"
            )

    def known_shards(self) -> str | None:
        """The run's own shards, or else the set that its student was last trained from."""
        if self.shards.is_dir():
            return str(self.shards)
        place: str | None = self.summary().get("distill", {}).get("shards")
        return place

    def summary(self) -> dict[str, Any]:
        """What the stages have reported so far, by stage."""
        if not self.summary_file.is_file():
            return {}
        facts: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        return facts

    def report(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Put a stage's closing facts into summary.json."""
        merged = {**self.summary(), stage: dict(facts)}
        write_atomically(self.summary_file, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def _require_equal(standing: Recipe, asked: Recipe, sections: tuple[str, ...], where: Path, hint: str) -> None:
    ours, theirs = standing.values(sections), asked.values(sections)
    for key, value in ours.items():
        if key not in _FREE_KEYS and theirs[key] != value:
            raise PipelineError(f"{where} was begun with {key} = {value!r}, not {theirs[key]!r}", hint=hint)


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
