"""The steps of a run: what each needs, which stage it calls, what it reports. One function a verb."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import launch
from pipeline.assets import corpus_file, teacher_folder
from pipeline.card import write_card
from pipeline.errors import PipelineError, UsageError
from pipeline.locations import new_set, standing_set
from pipeline.prepared import PROCESSED, prepared_corpus
from pipeline.recipe import Recipe
from pipeline.report import write_report
from pipeline.run import RunFolder
from pipeline.sinks import listening
from stages.events import silent

if TYPE_CHECKING:
    from stages.checks import Check
    from stages.corpus.prepare import PrepareReport
    from stages.corpus.store import Corpus

_MOST_DEVICES = 64
"""To one copy of the teacher."""


def prepare(recipe: Recipe, run: RunFolder) -> PrepareReport:
    """Tokenise the recipe's corpus with its teacher's tokenizer into data/processed."""
    from stages.corpus.prepare import prepare as prepare_corpus

    if not recipe.corpus.source:
        raise UsageError("no data given", hint="name your JSONL: make prepare DATA=rows.jsonl (--data rows.jsonl)")
    with run.lock("prepare"), listening(run.events) as emit:
        recipe = run.adopt(recipe)
        source = corpus_file(recipe.corpus.source, emit)
        tokenizer = teacher_folder(recipe.teacher.model, recipe.teacher.revision, emit)
        return prepare_corpus(
            settings=recipe.corpus, source=source, tokenizer_folder=tokenizer, out=PROCESSED, emit=emit
        )


def teacher_cache(recipe: Recipe, run: RunFolder, *, gpus: int | None, shards: str | None = None) -> Mapping[str, Any]:
    """Stage one: run the teacher over data/processed into the run's shards or a set elsewhere; what is there stays.

    Raises PipelineError where data/processed is not what the recipe prepares.
    """
    from pipeline.replicas import replicas
    from shards.manifest import is_sealed, read_manifest
    from shards.reader import ShardSet
    from shards.storage import storage_at
    from shards.units import published_positions
    from stages.teacher_cache.cache import fill_cache
    from stages.teacher_cache.teacher import tensor_parallel_sizes

    with run.lock("teacher-cache"), listening(run.events) as emit:
        recipe = run.adopt(recipe)
        storage = storage_at(place_of(run, shards))
        corpus = prepared_corpus(recipe.corpus, storage, run.responses, emit)
        if recipe.respond.by:
            corpus = _with_responses(run)
        teacher = teacher_folder(recipe.teacher.model, recipe.teacher.revision, emit)
        before = read_manifest(storage).totals()["positions"] if is_sealed(storage) else published_positions(storage)
        start = time.monotonic()
        sizes = tensor_parallel_sizes(teacher, _MOST_DEVICES)
        with replicas(gpus, recipe.teacher.tensor_parallel, launch.machine(), sizes) as spread:
            manifest = fill_cache(
                corpus=corpus,
                teacher=recipe.teacher,
                cache=recipe.cache,
                teacher_folder=teacher,
                target=storage,
                emit=emit,
                spread=spread,
            )
        captured = manifest.totals()["positions"] - before
        if captured or run.summary().get("teacher_cache", {}).get("where") != storage.where():
            seconds = round(time.monotonic() - start, 1)
            facts = {**manifest.totals(), "captured": captured, "seconds": seconds, "where": storage.where()}
            run.report("teacher_cache", {**facts, "fidelity": ShardSet(storage).fidelity()})
        return dict(run.summary()["teacher_cache"])


def _with_responses(run: RunFolder) -> Corpus:
    """What is made of data/processed where responses are to be written first."""
    from stages.corpus.store import read_corpus

    words = [sys.executable, "-m", "pipeline.responses", str(run.path), str(PROCESSED)]
    code = subprocess.run(words, check=False).returncode
    if code:
        failure = UsageError if code == 2 else PipelineError
        raise failure(
            "the responses could not be written", hint="the error is above; run the same command again to go on"
        )
    return read_corpus(run.responses)


def place_of(run: RunFolder, shards: str | None) -> Path | str:
    """Where stage one writes: the run's shards, or what was named. Raises UsageError where no set can be made."""
    return run.shards if shards is None else new_set(shards)


def plan_cache(recipe: Recipe, run: RunFolder, *, gpus: int | None, shards: str | None = None) -> Iterator[Check]:
    """What stage one would do and need, without a change to the run; the teacher is fetched for it, but not loaded.

    Raises UsageError where the devices asked for cannot work, PipelineError where the recipe prepares another corpus.
    """
    from pipeline.replicas import planned
    from shards.storage import storage_at
    from stages.teacher_cache.preflight import preflight
    from stages.teacher_cache.teacher import tensor_parallel_sizes

    storage = storage_at(place_of(run, shards))
    with listening() as emit:
        corpus = prepared_corpus(recipe.corpus, storage, run.responses, emit)
    teacher = teacher_folder(recipe.teacher.model, recipe.teacher.revision, silent)
    sizes = tensor_parallel_sizes(teacher, _MOST_DEVICES)
    yield from preflight(
        corpus=corpus,
        teacher=recipe.teacher,
        cache=recipe.cache,
        teacher_folder=teacher,
        target=storage,
        devices=planned(gpus, recipe.teacher.tensor_parallel, launch.machine(), sizes),
    )


def distill(
    recipe: Recipe,
    run: RunFolder,
    *,
    shards: str | None,
    gpus: int | None,
    hosts: Path | None = None,
    tracker: str = "tensorboard",
) -> Mapping[str, Any]:
    """Stage two: train the student on `gpus` ranks here, or on the machines of a hostfile; resumes where it stopped."""
    from pipeline import trackers
    from pipeline.hosts import check_hosts, read_hosts, run_on_hosts

    trackers.require_tracker(tracker)
    if hosts and gpus is not None:
        raise UsageError("GPUS and HOSTS cannot both be given", hint="the slots of the hostfile are the ranks")
    here, machines = launch.machine(), read_hosts(hosts, recipe.distill.global_batch) if hosts else []
    count = launch.default_ranks(here, recipe.distill.global_batch) if gpus is None else gpus
    if not machines:
        launch.check_ranks(count, here, recipe.distill.global_batch)
    place = shards_of(run, shards)
    with run.lock("distill"):
        run.adopt(recipe)
        if machines:
            check_hosts(machines, run, place)
            run_on_hosts(run, place, machines, tracker=tracker)
        else:
            launch.run_ranks(run, place, count, tracker=tracker)
        result: dict[str, Any] = run.summary()["distill"]
        if result["finished"]:  # a stop may reach a rank alone: what is saved then is no model yet
            write_card(run)
        write_report(run)
    return result


def shards_of(run: RunFolder, shards: str | None) -> Path | str:
    """Where a run takes its shards from: the set that is named, or the one that the run knows.

    Raises PipelineError where there is no such folder; a URL is read to tell.
    """
    named = run.known_shards() if shards is None else shards
    if named is None:
        raise PipelineError(
            f"no shards in {run.shards.resolve()}",
            hint="run make teacher-cache first, or name a set with SHARDS=… (--shards …)",
        )
    place = standing_set(named)
    return place if isinstance(place, str) else place.resolve()


def silence_loading_bars() -> None:
    """A student is read in a moment: transformers' bar for it would only stand between the lines of ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
