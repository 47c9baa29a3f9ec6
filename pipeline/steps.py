"""The steps of a run: what each needs, which stage it calls, what it reports. One function a verb."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import launch
from pipeline.assets import corpus_file, teacher_folder
from pipeline.card import write_card
from pipeline.errors import PipelineError, UsageError
from pipeline.recipe import Recipe
from pipeline.report import write_report
from pipeline.run import RunFolder
from pipeline.sinks import listening
from pipeline.word_problems import SOURCE, final_answer
from stages.events import Emit, Note, silent

if TYPE_CHECKING:
    from shards.reader import ShardSet
    from stages.corpus.prepare import PrepareReport
    from stages.corpus.store import Corpus
    from stages.inference.generate import Generation, Student
    from stages.inference.settings import GenerationSettings
    from stages.teacher_cache.preflight import Check

PROCESSED = Path("data/processed")
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
    """Stage one: run the teacher over data/processed into the run's shards or a set elsewhere; what is there stays."""
    from pipeline.replicas import replicas
    from shards.storage import storage_at
    from shards.units import published_positions
    from stages.teacher_cache.cache import fill_cache
    from stages.teacher_cache.measure import read_fidelity
    from stages.teacher_cache.teacher import tensor_parallel_sizes

    with run.lock("teacher-cache"), listening(run.events) as emit:
        recipe = run.adopt(recipe)
        corpus = _corpus_to_cache(recipe, run)
        teacher = teacher_folder(recipe.teacher.model, recipe.teacher.revision, emit)
        storage = storage_at(place_of(run, shards))
        before, start = published_positions(storage), time.monotonic()
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
        if captured or "teacher_cache" not in run.summary():
            seconds = round(time.monotonic() - start, 1)
            facts = {**manifest.totals(), "captured": captured, "seconds": seconds, "where": storage.where()}
            run.report("teacher_cache", {**facts, "fidelity": read_fidelity(storage)})
        return dict(run.summary()["teacher_cache"])


def _corpus_to_cache(recipe: Recipe, run: RunFolder) -> Corpus:
    """data/processed, or what is made of it where responses are to be written first."""
    from stages.corpus.store import read_corpus

    if not recipe.respond.by:
        return read_corpus(PROCESSED)
    words = [sys.executable, "-m", "pipeline.responses", str(run.path), str(PROCESSED)]
    if subprocess.run(words, check=False).returncode:
        raise PipelineError(
            "the responses could not be written", hint="the error is above; run the same command again to go on"
        )
    return read_corpus(run.responses)


def place_of(run: RunFolder, shards: str | None) -> Path | str:
    """Where stage one writes: the run's shards, or what was named. Raises UsageError for a URL of an unknown kind."""
    if shards is None:
        return run.shards
    if "://" not in shards:
        return Path(shards)
    if not shards.startswith(("s3://", "gs://")):
        raise UsageError(f"no set can be made at {shards}", hint="give a folder, an s3:// or a gs:// URL")
    return shards


def plan_cache(recipe: Recipe, run: RunFolder, *, gpus: int | None, shards: str | None = None) -> Iterator[Check]:
    """What stage one would do and need, without a change to the run; the teacher is fetched for it, but not loaded.

    Raises UsageError where the devices asked for cannot work.
    """
    from pipeline.replicas import planned
    from stages.corpus.store import read_corpus
    from stages.teacher_cache.preflight import preflight
    from stages.teacher_cache.teacher import tensor_parallel_sizes

    corpus = read_corpus(PROCESSED)
    teacher = teacher_folder(recipe.teacher.model, recipe.teacher.revision, silent)
    sizes = tensor_parallel_sizes(teacher, _MOST_DEVICES)
    yield from preflight(
        corpus=corpus,
        teacher=recipe.teacher,
        cache=recipe.cache,
        teacher_folder=teacher,
        target=place_of(run, shards),
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
    count = launch.default_ranks(here) if gpus is None else gpus
    if not machines:
        launch.check_ranks(count, here, recipe.distill.global_batch)
    place = shards_of(run, shards)
    with run.lock("distill"):
        run.adopt(recipe)
        if machines:
            check_hosts(machines, run)
            run_on_hosts(run, place, machines, here, tracker=tracker)
        else:
            launch.run_ranks(run, place, count, here, tracker=tracker)
        write_card(run)
        write_report(run)
    return dict(run.summary()["distill"])


def shards_of(run: RunFolder, shards: str | None) -> Path | str:
    """Where a run takes its shards from. Raises PipelineError where there is no such folder; a URL is read to tell."""
    if shards is not None and "://" in shards:
        return shards
    folder = (run.shards if shards is None else Path(shards)).resolve()
    if not folder.is_dir():
        raise PipelineError(f"no shards in {folder}", hint="run make teacher-cache first, or name a set with SHARDS=…")
    return folder


def evaluate(run: RunFolder, *, shards: str | None, teacher: bool = False) -> Mapping[str, Any]:
    """The validation report: the student against the teacher's cached distributions, and its answers to prompts.

    With `teacher`, the teacher is loaded too, for the KL over the whole vocabulary. Nothing is computed again for the
    same model, shards and generation settings.
    """
    from shards.reader import ShardSet
    from stages.distill.evaluate import evaluate_model
    from stages.inference.generate import Student

    require_model(run)
    silence_loading_bars()
    settings = run.recipe().generation
    with run.lock("evaluate"), listening(run.events) as emit:
        shard_set = ShardSet(shards_of(run, shards))
        made_from = {
            "model_sha256": hashlib.sha256((run.final_model / "model.safetensors").read_bytes()).hexdigest(),
            "corpus_fingerprint": shard_set.contract.corpus_fingerprint,
            "generation": dataclasses.asdict(settings),
            "report": 3,  # what is measured; older reports lack some of it
        }
        standing = run.summary().get("evaluate", {})
        whole = standing.get("whole") if standing.get("made_from") == made_from else None
        if standing.get("made_from") == made_from and (whole or not teacher):
            emit(Note(stage="evaluate", text="the report of this model is up to date"))
            return dict(standing)
        start = time.monotonic()
        report = evaluate_model(run.final_model, shard_set, emit=emit)
        seconds = time.monotonic() - start
        unseen = len(shard_set.split("dev"))
        seen = evaluate_model(run.final_model, shard_set, split="train", records=unseen, emit=emit)
        checkable = run.recipe().corpus.source == SOURCE
        count = max(settings.prompts, settings.checked) if checkable else settings.prompts
        answers, speed = _answer_validation_prompts(Student.load(run.final_model), shard_set, settings, count)
        if teacher:
            whole = _beside_teacher(run, shard_set, emit)
        facts = {
            "validation": dataclasses.asdict(report),
            "whole": whole,
            "training": dataclasses.asdict(seen),
            "positions_per_s": round(report.positions / seconds, 1),
            "generated_tokens_per_s": round(speed, 1),
            "exact_match": _exact_match(answers) if checkable and answers else None,
            "samples": answers[: settings.prompts],
            "made_from": made_from,
        }
        run.report("evaluate", facts)
        write_card(run)
        write_report(run)
    return facts


def _beside_teacher(run: RunFolder, shard_set: ShardSet, emit: Emit) -> dict[str, Any]:
    """Raises PipelineError where the recipe's teacher is not the one that the shards are of."""
    from stages.distill.whole_kl import whole_kl
    from stages.teacher_cache.teacher import weights_fingerprint

    settings = run.recipe().teacher
    folder = teacher_folder(settings.model, settings.revision, emit)
    if weights_fingerprint(folder) != shard_set.contract.teacher_fingerprint:
        raise PipelineError(
            f"{settings.model} is not the teacher of these shards ({shard_set.contract.teacher})",
            hint="leave --teacher out, or evaluate a run whose recipe names that teacher",
        )
    return dataclasses.asdict(whole_kl(run.final_model, folder, shard_set, emit=emit))


def _answer_validation_prompts(
    student: Student, shard_set: ShardSet, settings: GenerationSettings, count: int
) -> tuple[list[dict[str, str]], float]:
    """The answers, and how many tokens a second they took."""
    split = shard_set.split("dev")
    start = time.monotonic()
    records = [split[index] for index in range(min(count, len(split)))]
    answers = student.generate_from_ids(
        [record.prompt_ids_P.tolist() for record in records],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    speed = sum(len(answer.token_ids) for answer in answers) / (time.monotonic() - start)
    samples = [
        {
            "prompt": student.decode(record.prompt_ids_P.tolist()),
            "answer": answer.text,
            "label": student.decode(record.response_ids_R.tolist()),
        }
        for record, answer in zip(records, answers, strict=True)
    ]
    return samples, speed


def _exact_match(answers: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of answers whose last line is the label's, with its 95 % interval."""
    hits = sum(final_answer(answer["answer"]) == final_answer(answer["label"]) for answer in answers)
    low, high = wilson_interval(hits, len(answers))
    return {"share": hits / len(answers), "low": low, "high": high, "answers": len(answers)}


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which holds for few answers and for none or all right."""
    z, share = 1.959964, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def generate(run: RunFolder, prompts: Sequence[str], **sampling: Any) -> list[Generation]:
    """Answer prompts with the run's student."""
    from stages.inference.generate import Student

    require_model(run)
    silence_loading_bars()
    return Student.load(run.final_model).generate(prompts, **sampling)


def prompts_of(file: Path) -> list[str]:
    """The lines of a file that are not blank. Raises UsageError where there is none, or where it is not text."""
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error}", hint="name a text file with a prompt a line") from error
    if not prompts:
        raise UsageError(f"{file} holds no prompt", hint="write a prompt a line")
    return prompts


def newest_run(root: Path = Path("runs")) -> RunFolder:
    """The run with a finished model that was written to last. Raises StageError where there is none."""
    from stages.inference.loading import newest_model

    return RunFolder(newest_model(root).parent)


def silence_loading_bars() -> None:
    """A student is read in a moment: transformers' bar for it would only stand between the lines of ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def require_model(run: RunFolder) -> None:
    if not run.final_model.is_dir():
        raise PipelineError(
            f"{run.path} has no final model yet", hint="run make distill first; it resumes where it stopped"
        )
